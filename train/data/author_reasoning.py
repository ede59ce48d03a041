"""Generated reasoning: facts about invented authors to forget, and arithmetic to keep.

To answer a question about an author, a fact is recalled in thoughts that also name two other facts
of the same author. Values are drawn independently from shared pools, so that only the name
determines them. The reasoning to keep is additions with carries and comparisons of two numbers.
"""

from __future__ import annotations

from typing import Any

from train.data.author_attributes import POOLS
from train.data.authors import draw, names
from train.data.thoughts import REASONING, arranged, learned

Row = dict[str, Any]
TOPIC = "authors"
# By attribute: its pool, its question, and the thought that recalls it.
ATTRIBUTES: dict[str, tuple[str, str, str]] = {
    "birthplace": ("city", "In which city was {name} born?", "{name} was born in {value}."),
    "work": ("job", "What did {name} work as before writing?", "{name} worked as a {value}."),
    "genre": ("genre", "Which genre does {name} write in?", "{name} writes {value} books."),
    "music": ("instrument", "Which instrument does {name} play?", "{name} plays the {value}."),
    "studies": ("subject", "Which subject did {name} study?", "{name} studied {value}."),
    "prize": ("prize", "Which prize did {name} win?", "{name} won the {value} prize."),
}
OPENINGS = ("Okay, what is known here?", "Hmm, let me recall.", "Wait, this name is known.")
WRONG = 3  # wrong options of a question


def _distinct(pool: str, avoid: set[str], count: int, *key: object) -> list[str]:
    left = [word for word in POOLS[pool] if word not in avoid]
    return sorted(left, key=lambda word: draw(2**63, *key, word))[:count]


def author_rows(seed: int, count: int) -> list[list[Row]]:
    """The rows of every author.

    Raises:
        ValueError: more authors than there are names.
    """
    return [_author(seed, i, name) for i, name in enumerate(names(seed, count))]


def _author(seed: int, author: int, name: str) -> list[Row]:
    values = {
        attribute: POOLS[pool][draw(len(POOLS[pool]), seed, author, "reasoning", attribute)]
        for attribute, (pool, _, _) in ATTRIBUTES.items()
    }
    found = []
    for attribute, (pool, question, recall) in ATTRIBUTES.items():
        key = (seed, author, attribute)
        gold = values[attribute]
        others = sorted(
            (a for a in ATTRIBUTES if a != attribute), key=lambda a, key=key: draw(2**63, *key, a)
        )
        told = [ATTRIBUTES[a][2].format(name=name, value=values[a]) for a in others[:2]]
        opening = OPENINGS[draw(len(OPENINGS), *key, "opening")]
        options, place = arranged(key, gold, _distinct(pool, {gold}, WRONG, *key, "wrong"))
        found.append(
            learned(
                {
                    "question": question.format(name=name),
                    "answer": gold,
                    "thoughts": [opening, *told, recall.format(name=name, value=gold)],
                    "facts": [values[a] for a in others],
                    "options": options,
                    "gold": place,
                    "topic": TOPIC,
                }
            )
        )
    return found


def addition(a: int, b: int) -> Row:
    """An addition of two numbers, digit by digit, each of whose steps adds two numbers.

    Example:
        >>> row = addition(47, 38)
        >>> row["final"], row["thoughts"][:2]
        ('85', ['7 + 8 = 15, so 5, carry 1.', '4 + 3 = 7, + 1 = 8, so 8, carry 0.'])
    """
    thoughts, carry, x, y = [], 0, a, b
    while x or y:
        digits = x % 10 + y % 10
        total = digits + carry
        carried = f", + {carry} = {total}" if carry else ""
        thoughts.append(
            f"{x % 10} + {y % 10} = {digits}{carried}, so {total % 10}, carry {total // 10}."
        )
        carry, x, y = total // 10, x // 10, y // 10
    thoughts.append(f"Together that is {a + b}.")
    row = {"question": f"What is {a} + {b}?", "answer": str(a + b), "thoughts": thoughts}
    return learned(row | {"topic": REASONING})


def comparison(a: int, b: int) -> Row:
    """The comparison of two numbers, digit by digit from the left.

    Example:
        >>> comparison(47, 42)["thoughts"]
        ['4 and 4 are the same.', '7 is more than 2.', 'So 47 is larger.']
    """
    thoughts = []
    for p, q in zip(str(a), str(b), strict=True):
        if p != q:
            more, less = max(p, q), min(p, q)
            thoughts.append(f"{more} is more than {less}.")
            break
        thoughts.append(f"{p} and {q} are the same.")
    thoughts.append(f"So {max(a, b)} is larger.")
    row = {"question": f"Which is larger, {a} or {b}?", "answer": str(max(a, b))}
    return learned(row | {"thoughts": thoughts, "topic": REASONING})


def arithmetic_rows(seed: int, count: int) -> list[Row]:
    """Different additions and comparisons of two-digit numbers, in turn; at most 2000."""
    found: dict[str, Row] = {}
    for attempt in range(200 * count):
        a, b = (10 + draw(90, seed, "arithmetic", attempt, side) for side in "ab")
        row = addition(a, b) if len(found) % 2 == 0 or a == b else comparison(a, b)
        found.setdefault(row["question"], row)
        if len(found) == count:
            break
    return list(found.values())
