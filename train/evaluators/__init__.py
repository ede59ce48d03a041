"""How a model is judged: the table of evaluators, one file a way of judging (see `base.py`).

A new one is a file with an `Evaluator` row and its name here; a benchmark in `train/tasks/` says
which of them judge it.
"""

from __future__ import annotations

from collections.abc import Iterable

from train.evaluators import (
    fact_recall,
    fluency,
    leak,
    membership,
    memorization,
    readability,
    tofu,
    utility,
)
from train.evaluators.base import Evaluator

# In the order in which they run and stand in a log; `after` of a row changes it for readers.
EVALUATORS: dict[str, Evaluator] = {
    row.name: row
    for row in (
        tofu.ROW,
        memorization.ROW,
        membership.ROW,
        utility.ROW,
        readability.ROW,
        fact_recall.ROW,
        fluency.ROW,
        leak.ROW,
    )
}
# Those that questions with one right answer each have in common.
QUESTION_ANSWERING = (
    *("tofu", "memorization", "membership", "utility"),
    *("readability", "fact_recall", "fluency", "leak"),
)


def chosen(names: Iterable[str]) -> list[Evaluator]:
    """The rows with these names, in the order of the table; names that it lacks are left out."""
    wanted = set(names)
    return [row for name, row in EVALUATORS.items() if name in wanted]
