"""Generated questions whose traces search before they solve: made in the run, no download.

On a ring of ten letters, `a` to `j`, one to six steps move from a first letter to a last one: `u d`
is step u, which moves on by d, so by three. The trace restates the steps, takes them
back in turn, which leads nowhere, and only then derives the answer step by step: problem
understanding, exploration, solution, of 8 to 40 thoughts, a line each. The question determines
their number.

As in EPiC's picture of traces, the two ends matter: of the thoughts that `edge` keeps at tau 0.3
and more, the first half covers the restatement and the second half the derivation. The exploration
does not help to answer. It is easy to learn, since every word of a trace follows from the words
before it: unpredictable results would be noise to a model that trains for minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

from jaxlib_unlearn.cot import CLOSE, OPEN
from train.data.batches import random_bits

RING = "abcdefghij"
LONGEST = 5  # the most places that a step moves on
STEPS = "uvwxyz"
THOUGHTS = (8, 14, 20, 27, 34, 40)  # the thoughts of a trace of one, two, ... six steps


def search_row(draw: Callable[[int], int]) -> dict[str, Any]:
    """A row: `question`, and `answer` with its trace, whose thoughts are lines.

    Of n thoughts, k restate the k steps, n - 2 k try one of them backwards, in turn and numbered,
    and k derive the answer: `v c: g i` is step v, which moves on by two, from g to i.

    Args:
        draw: a function that draws a whole number from 0 to below its argument.

    Example:
        >>> row = search_row(lambda below: below // 3)
        >>> row["question"]
        'Start at d\\nu c\\nv c\\nw c\\nWhich is last?'
        >>> thoughts = row["answer"].split("\\n")
        >>> thoughts[1], thoughts[4], thoughts[5], thoughts[-4], thoughts[-1]
        ('u c', 'u c back 1', 'v c back 2', 'w c: h j', 'At j')
    """
    steps = 1 + draw(len(THOUGHTS))
    start, *moves = draw(len(RING)), *(1 + draw(LONGEST) for _ in range(steps))
    told = [f"{step} {RING[move]}" for step, move in zip(STEPS, moves, strict=False)]
    places = [total % len(RING) for total in itertools.accumulate([start, *moves])]
    tries = range(THOUGHTS[steps - 1] - 2 * steps)
    tried = [f"{told[i % steps]} back {i + 1}" for i in tries]
    derived = [
        f"{step}: {RING[before]} {RING[after]}"
        for step, before, after in zip(told, places[:-1], places[1:], strict=True)
    ]
    trace = "\n".join([*told, *tried, *derived])
    return {
        "question": "\n".join([f"Start at {RING[start]}", *told, "Which is last?"]),
        "answer": f"{OPEN}\n{trace}\n{CLOSE}\n\nAt {RING[places[-1]]}",
    }


def search_rows(
    seed: int, split: str, count: int, without: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The first rows of a split, each drawn by itself.

    Args:
        seed: the seed of the task.
            split: any name; splits are drawn independently.
            count: the number of rows.
            without: questions to leave out, such as those of a training split, which soon holds all
            questions of one and of two steps, so that tests ask for three and more.
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
