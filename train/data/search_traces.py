"""Generated questions whose traces search before they solve: made in the run, no download.

On a ring of ten letters, `a` to `j`, one to six steps move from a first letter to a last one: `ud`
is step u, which moves on by d, so by three. The trace restates the steps, tries results that are
wrong, and only then derives the answer step by step: problem understanding, exploration, solution,
of 8 to 40 thoughts. The question alone decides how many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

from train.data.batches import random_bits

RING = "abcdefghij"
STEPS = "uvwxyz"
THOUGHTS = (8, 14, 20, 27, 34, 40)  # of a trace, by the number of its steps, from one on


def search_row(draw: Callable[[int], int]) -> dict[str, Any]:
    """A row: `question`, `thoughts`, `answer`.

    Of n thoughts, k restate the k steps, n - 2 k try results of the first step that are wrong, in
    capital letters, and k derive the answer.

    Args:
        draw: gives a whole number from 0 to below its argument.

    Example:
        >>> row = search_row(lambda below: below // 3)
        >>> row["question"]
        'Start at d\\nud\\nvd\\nwd\\nWhich is last?'
        >>> row["thoughts"][0], row["thoughts"][3], row["thoughts"][-1], row["answer"]
        ('ud', 'Try 1: A?', 'wd + j = c', 'c')
    """
    steps = 1 + draw(len(THOUGHTS))
    start, *moves = (draw(10) for _ in range(steps + 1))
    told = [f"{step}{RING[move]}" for step, move in zip(STEPS, moves, strict=False)]
    places = [total % 10 for total in itertools.accumulate([start, *moves])]
    tries = range(1, THOUGHTS[steps - 1] - 2 * steps + 1)
    tried = [f"Try {i}: {RING[(places[1] + 1 + draw(9)) % 10].upper()}?" for i in tries]
    derived = [
        f"{step} + {RING[before]} = {RING[after]}"
        for step, before, after in zip(told, places[:-1], places[1:], strict=True)
    ]
    return {
        "question": "\n".join([f"Start at {RING[start]}", *told, "Which is last?"]),
        "thoughts": [*told, *tried, *derived],
        "answer": RING[places[-1]],
    }


def search_rows(
    seed: int, split: str, count: int, without: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The first rows of a split, each drawn by itself.

    Args:
        seed: of the task.
        split: any name; splits are drawn independently.
        count: number of rows.
        without: questions that are left out: those of a training split, which has seen all of one
            step soon, so that tests ask for two steps and more.
    """
    rows: list[dict[str, Any]] = []
    for number in itertools.count():
        if len(rows) == count:
            return rows
        bits = random_bits(seed, f"search/{split}", number)
        row = search_row(lambda below, bits=bits: int(bits.random_raw() % below))
        if row["question"] not in without:
            rows.append(row)
    raise AssertionError("the numbers have no end")
