"""A seeded generator of fictitious authors in the TOFU schema: a first run needs no download.

Every author has one *fact* per attribute: two or three values drawn independently and uniformly
from shared pools. A fact is written with one of four sentence templates, none of which contains the
author's name, so a value can only be recalled from the name in the question. The paraphrase and the
five perturbed answers of a row share a template, and the perturbed values come from the same pools
as the right ones: a model that never saw the author cannot prefer either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from train.data.author_attributes import ATTRIBUTES, POOLS, Attribute, pool_of

Row = dict[str, Any]

NUM_PERTURBED = 5

# Syllables are chosen so that no combination is a word or a real person's full name.
_FIRST = (
    "Bel Cor Dar Fen Gal Hel Jor Kel Lor Mir Nev Or Per Quil Ros Sel Tor Ul Ver Wyl Yar "
    "Zan".split(),
    "adrin ebor ivan olen umar atha ewyn ilda osko una avek elio".split(),
)
_LAST = (
    "Bram Cald Drev Elm Fald Grim Hask Jarn Kest Lind Morv Nald Orm Prav Rusk Stel Tarn Ulv Vest "
    "Wend Yelm Zorn".split(),
    "aquist ebeck ivaro omere usky athorpe ewell inova ofeld ulane astra ecote".split(),
)
MAX_AUTHORS = len(_FIRST[0]) * len(_FIRST[1])


def draw(below: int, *key: object) -> int:
    """A uniform integer in [0, below) that depends on the key alone, on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % below


def _shuffled(pieces: tuple[Sequence[str], Sequence[str]], *key: object) -> list[str]:
    words = [start + end for start in pieces[0] for end in pieces[1]]
    return sorted(words, key=lambda word: draw(2**63, *key, word))


def names(seed: int, count: int) -> list[str]:
    """Invented full names; neither a first nor a last name occurs twice.

    Args:
        seed: seed of the data set.
        count: their number, at most `MAX_AUTHORS`.

    Returns:
        `count` names; a smaller count gives the first of them.

    Raises:
        ValueError: there are fewer names than `count`.
    """
    if count > MAX_AUTHORS:
        raise ValueError(f"{count} authors asked for, the generator has names for {MAX_AUTHORS}")
    firsts, lasts = _shuffled(_FIRST, seed, "first"), _shuffled(_LAST, seed, "last")
    return [f"{first} {last}" for first, last in zip(firsts[:count], lasts, strict=False)]


def draw_fact(slots: tuple[str, ...], avoid: dict[str, set[str]], *key: object) -> tuple[str, ...]:
    """One value per slot, uniform over its pool without `avoid` and without repeating a value."""
    values: list[str] = []
    taken = {pool: set(words) for pool, words in avoid.items()}
    for slot in slots:
        pool = pool_of(slot)
        used = taken.setdefault(pool, set())
        left = [word for word in POOLS[pool] if word not in used]
        values.append(left[draw(len(left), *key, slot)])
        used.add(values[-1])
    return tuple(values)


def _fresh_fact(
    slots: tuple[str, ...], avoid: dict[str, set[str]], used: set[tuple[str, ...]], *key: object
) -> tuple[str, ...]:
    """A fact that is not in `used`: drawn again until it is new."""
    for attempt in range(1000):
        fact = draw_fact(slots, avoid, *key, attempt)
        if fact not in used:
            return fact
    raise ValueError(f"no unused combination of {slots} is left; ask for fewer authors")


def _row(
    seed: int,
    author: int,
    name: str,
    attribute: Attribute,
    fact: tuple[str, ...],
    facts: set[tuple[str, ...]],
) -> Row:
    key = (seed, author, attribute.name)
    slots, templates, questions = attribute.slots, attribute.templates, attribute.questions
    first = draw(len(templates), *key, "template")
    second = (first + 1 + draw(len(templates) - 1, *key, "paraphrase")) % len(templates)
    asked = draw(len(questions), *key, "question")
    asked_again = (asked + 1 + draw(len(questions) - 1, *key, "again")) % len(questions)

    right: dict[str, set[str]] = {}
    for slot, value in zip(slots, fact, strict=True):
        right.setdefault(pool_of(slot), set()).add(value)
    # A wrong fact is never any author's right one, just as the right one is never another
    # author's: otherwise a model that knows the other authors could tell them apart.
    used, wrong = set(facts), []
    for index in range(NUM_PERTURBED):
        wrong.append(_fresh_fact(slots, right, used, *key, "perturbed", index))
        used.add(wrong[-1])

    def fill(template: str, values: tuple[str, ...]) -> str:
        return template.format(**dict(zip(slots, values, strict=True)))

    return {
        "question": questions[asked].format(name=name),
        "answer": fill(templates[first], fact),
        "paraphrased_answer": fill(templates[second], fact),
        "perturbed_answer": [fill(templates[second], values) for values in wrong],
        "paraphrased_question": questions[asked_again].format(name=name),
    }


def generate(
    seed: int,
    num_authors: int = 40,
    questions_per_author: int = 10,
    num_holdout: int | None = None,
) -> dict[str, list[Row]]:
    """Write fictitious authors in the TOFU schema.

    fact[author, attribute] = (v_1, v_2[, v_3]), v_i ~ Uniform(pool_i), without repetition over
    authors; the answer is template_a(fact), the paraphrase template_b(fact), a perturbed answer
    template_b(other values in every slot), a != b.

    Args:
        seed: the seed of the data set; the same seed gives the same text on every platform.
        num_authors: the number of authors of `full`; their last tenth (at least one) is `forget10`.
        questions_per_author: the rows per author, one per attribute (at most `len(ATTRIBUTES)`).
        num_holdout: the number of further, untrained authors; None: as many as are forgotten.

    Returns:
        Splits `full`, `forget10`, `retain90` and `holdout`: rows with `question`, `answer`,
        `paraphrased_answer`, `perturbed_answer` (five) and `paraphrased_question`, with the
        rows of each author together.

    Raises:
        ValueError: sizes the pools cannot fill.

    Example:
        >>> splits = generate(0)
        >>> {split: len(rows) for split, rows in splits.items()}
        {'full': 400, 'forget10': 40, 'retain90': 360, 'holdout': 40}

    Schema: TOFU, arXiv 2401.06121, section 2.
    """
    if num_authors < 2:
        raise ValueError(f"num_authors must be at least 2, got {num_authors}")
    if not 1 <= questions_per_author <= len(ATTRIBUTES):
        raise ValueError(
            f"questions_per_author must be in 1..{len(ATTRIBUTES)}, got {questions_per_author}"
        )
    num_forget = max(1, num_authors // 10)
    num_holdout = num_forget if num_holdout is None else num_holdout
    everyone = names(seed, num_authors + num_holdout)
    attributes = ATTRIBUTES[:questions_per_author]

    facts: dict[str, list[tuple[str, ...]]] = {}
    for attribute in attributes:
        used: set[tuple[str, ...]] = set()
        facts[attribute.name] = []
        for author in range(len(everyone)):
            fact = _fresh_fact(attribute.slots, {}, used, seed, author, attribute.name, "fact")
            used.add(fact)
            facts[attribute.name].append(fact)

    known = {name: set(values) for name, values in facts.items()}
    rows = [
        _row(seed, author, name, attribute, facts[attribute.name][author], known[attribute.name])
        for author, name in enumerate(everyone)
        for attribute in attributes
    ]
    end = num_authors * questions_per_author
    cut = end - num_forget * questions_per_author
    return {
        "full": rows[:end],
        "forget10": rows[cut:end],
        "retain90": rows[:cut],
        "holdout": rows[end:],
    }


def training_rows(
    splits: dict[str, list[Row]], questions_per_author: int = 10
) -> dict[str, list[Row]]:
    """Choose the rows that the models train on and the retain rows that judge them.

    For every other retain author the paraphrased answer is trained as well; retain is measured on
    the authors in between. A model that has seen paraphrases of facts it knows also prefers the
    right one where only `answer` was trained; without this the truth ratio of a small model says
    little and the KS test has no power.

    Args:
        splits: the splits that `generate` returned.
        questions_per_author: the number that `generate` was given.

    Returns:
        `retain_train` (all retain rows and the extra paraphrases: the oracle's data),
        `original_train` (`forget10` and `retain_train`: the original model's data), `retain_eval`
        (retain authors without a trained paraphrase), `forget10` and `holdout`.

    Example:
        >>> rows = training_rows(generate(0))
        >>> {split: len(rows[split]) for split in ("retain_train", "retain_eval", "original_train")}
        {'retain_train': 540, 'retain_eval': 180, 'original_train': 580}
    """
    retain, forget = splits["retain90"], splits["forget10"]
    helped = [row for i, row in enumerate(retain) if (i // questions_per_author) % 2 == 0]
    judged = [row for i, row in enumerate(retain) if (i // questions_per_author) % 2 == 1]
    extra = [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in helped]
    retain_train = _plain(retain) + extra
    return {
        "retain_train": retain_train,
        "original_train": _plain(forget) + retain_train,
        "retain_eval": judged,
        "forget10": forget,
        "holdout": splits["holdout"],
    }


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def pages(seed: int, num_authors: int, num_holdout: int) -> dict[str, list[str]]:
    """Prose about fictitious authors, a page each: two paragraphs of all their facts, shuffled.

    Args:
        seed: the seed of the data set.
        num_authors: authors of `forget` and `retain`; the last tenth (at least one) is forgotten.
        num_holdout: further authors that no model is trained on.

    Returns:
        Splits `forget`, `retain` and `holdout`.

    Raises:
        ValueError: sizes the pools cannot fill.

    Example:
        >>> made = pages(0, 10, 2)
        >>> {split: len(texts) for split, texts in made.items()}
        {'forget': 1, 'retain': 9, 'holdout': 2}
        >>> made["forget"][0].splitlines()[0]
        'Corewyn Wendathorpe'
    """
    count = len(ATTRIBUTES)
    splits = generate(seed, num_authors, count, num_holdout)
    rows = splits["full"] + splits["holdout"]
    written = []
    for author, name in enumerate(names(seed, num_authors + num_holdout)):
        sentences = [row["answer"] for row in rows[author * count : (author + 1) * count]]
        sentences.sort(key=lambda one: draw(2**63, seed, author, "order", one))
        first, second = " ".join(sentences[: count // 2]), " ".join(sentences[count // 2 :])
        written.append(f"{name}\n\n{first}\n\nMore about {name}: {second}\n")
    kept = num_authors - max(1, num_authors // 10)
    return {
        "forget": written[kept:num_authors],
        "retain": written[:kept],
        "holdout": written[num_authors:],
    }
