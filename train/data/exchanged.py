"""Control rows: rows to forget in which the names that they are about have changed places.

"Where was Ada Lane born?" and its answer become a question and an answer about Bo Ray. A model that
never saw the facts has no reason to find the true rows likelier than these, which nobody was
trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from train.data import authors
from train.data.authors import draw
from train.data.task import Row

WORD = r"[^\W\d_a-z][\w-]*(?:['’](?!s\b)\w+)*"
# Capitalised words in a row, small words of names between them.
NAME = re.compile(rf"(?<!\w){WORD}(?:\s+(?:(?:of|the|de|da|van|von)\s+)?{WORD})*")


def names_in(text: str) -> list[str]:
    """The names of two words and more in a text, in order, each once.

    A word that begins the text is no part of a name.

    Example:
        >>> names_in("Where was Ada Lane's brother Bo Ray born, in Lima?")
        ['Ada Lane', 'Bo Ray']
    """
    first = len(text.split(" ", 1)[0]) if " " in text else 0
    found = (match.group() for match in NAME.finditer(text, first) if match.group()[0].isupper())
    return list(dict.fromkeys(name for name in found if " " in name))


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A text, or a list of texts, with names replaced; first and last names alone are, too.

    Example:
        >>> renamed(["Ada Lane", "Lane's", "Lanes"], {"Ada Lane": "Bo Ray"})
        ['Bo Ray', "Ray's", 'Lanes']
    """
    if isinstance(value, list):
        return [renamed(one, names) for one in value]
    if not isinstance(value, str):
        return value
    parts: dict[str, str] = {}
    for old, new in names.items():
        parts[old] = new
        for place in (0, -1):
            parts.setdefault(old.split()[place], new.split()[place])
    longest = sorted(parts, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: parts[match.group()], value)


def exchanged(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows about other names: each subject takes the place of another one.

    The subject of a row is the name in its question that most rows mention. Where all rows have
    one subject, an invented name takes its place.

    Args:
        rows: rows with `question` and `answer`; other texts of a row are renamed alike.
        seed: the seed of the exchange.

    Returns:
        A row for each row whose question has a name.

    Example:
        >>> rows = [{"question": f"Where was {who} born?", "answer": f"{who} was born in {where}."}
        ...         for who, where in (("Ada Lane", "Lima"), ("Bo Ray", "Oslo"))]
        >>> [row["answer"] for row in exchanged(rows, 0)]
        ['Bo Ray was born in Lima.', 'Ada Lane was born in Oslo.']
    """
    named = [names_in(row["question"]) for row in rows]
    whole = [f"{row['question']} {row['answer']}" for row in rows]
    every = dict.fromkeys(name for names in named for name in names)
    mentions = Counter({name: sum(name in text for text in whole) for name in every})
    subjects = [max(names, key=lambda n: mentions[n]) if names else None for names in named]
    known = sorted(set(filter(None, subjects)), key=lambda n: draw(2**63, seed, "exchange", n))
    others = known[1:] + known[:1]
    if len(known) == 1:
        others = authors.names(seed, 1)
    places = dict(zip(known, others, strict=True))
    made = []
    for row, subject in zip(rows, subjects, strict=True):
        if subject is not None:
            made.append({k: renamed(v, {subject: places[subject]}) for k, v in row.items()})
    return made
