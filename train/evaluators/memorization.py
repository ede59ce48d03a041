"""Memorisation: how much of the answers to forget a model knows token for token."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import REFERENCE, Definition, EvaluationContext, Evaluator, Metric, Rows
from train.evaluators.tofu import summarize

METRICS = (
    Metric("extraction_strength", "Extraction strength",
           "share of an answer that it completes, token for token, from the part before",
           "near", REFERENCE, main=True),
    Metric("exact_memorization", "Exact memorisation",
           "share of answer tokens that are the model's first choice", "near", REFERENCE),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """Extraction strength and exact memorisation of the true forget answers."""
    from jaxlib_unlearn.metrics import tofu

    if "forget" not in rows:
        return {}
    return tofu.memorization_log(context.scores("forget")["answers"])


DEFINITIONS = (
    Definition(
        "memorization",
        "Extraction strength: 1 − k/n with k the shortest prefix of the true answer (of a "
        "document: of a chunk) after which every greedy token is right. Exact memorisation: share "
        "of tokens right under teacher forcing.",
    ),
)
ROW = Evaluator("memorization", run, METRICS, summarize, definitions=DEFINITIONS)
