"""The table of evaluators, one file per kind of evaluation (see `base.py`).

To add one, write a file with an `Evaluator` row and list it here; each benchmark in `train/tasks/`
names the evaluators that it uses.
"""

from __future__ import annotations

from collections.abc import Iterable

from train.evaluators import (
    answer,
    choice,
    concept,
    control,
    fact_recall,
    final_answer,
    fluency,
    leak,
    membership,
    memorization,
    perplexity,
    readability,
    reasoning,
    tofu,
    utility,
    verbatim,
)
from train.evaluators.base import Evaluator

# In the order in which they run and appear in a log; a metric's `after` changes it in reports.
EVALUATORS: dict[str, Evaluator] = {
    row.name: row
    for row in (
        tofu.ROW,
        verbatim.ROW,
        memorization.ROW,
        membership.ROW,
        control.ROW,
        utility.ROW,
        readability.ROW,
        fact_recall.ROW,
        fluency.ROW,
        leak.ROW,
        choice.ROW,
        answer.ROW,
        final_answer.ROW,
        perplexity.ROW,
        reasoning.ROW,
        concept.ROW,
    )
}
# The evaluators of questions that are thought about before they are answered.
REASONING_QUESTIONS = ("reasoning",)


def chosen(names: Iterable[str]) -> list[Evaluator]:
    """The rows with these names, in table order; unknown names are ignored."""
    wanted = set(names)
    return [row for name, row in EVALUATORS.items() if name in wanted]
