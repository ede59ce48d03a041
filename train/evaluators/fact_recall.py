"""Fact recall: the share of the true values of a fact that occur in the greedy answer."""

from __future__ import annotations

from typing import Any

from train.data import author_sentences
from train.evaluators.base import (
    REFERENCE,
    Definition,
    EvaluationContext,
    Evaluator,
    Metric,
    Picture,
    Results,
    Rows,
)

SPLITS = ("forget", "retain")
METRICS = (
    Metric("forget_fact_recall", "Forget fact recall",
           "share of the true values (names, dates, words) in the greedy answers, facts to forget",
           "near", REFERENCE, main=True, after="forget_rouge", compare=2),
    Metric("retain_fact_recall", "Retain fact recall",
           "share of the true values in the greedy answers, facts to keep",
           "up", main=True, after="retain_rouge"),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The share of its fact's values in each answer; only generated rows say what those are."""
    import numpy as np

    from jaxlib_unlearn.metrics import text

    log = {}
    for split in (name for name in rows if name in SPLITS):
        items = {}
        answers = context.answers(split).texts
        for i, (row, texts) in enumerate(zip(rows[split], answers, strict=True)):
            if values := author_sentences.values_in(row["answer"]):
                score = text.fact_recall(texts[0], values)
                items[str(i)] = {"score": score, "values": list(values)}
        if items:
            mean = float(np.mean([item["score"] for item in items.values()]))
            log[f"{split}_fact_recall"] = {"agg_value": mean, "value_by_index": items}
    return log


def draw(results: Results) -> Any:
    """Bar chart of the recall on the facts to forget and to keep."""
    from train.evaluators import plots

    label = "true values in the answer, %"
    return plots.shares(results.summary, "fact_recall", "facts", label, results.roles)


PICTURE = Picture(
    "facts.png",
    "Fact recall",
    draw,
    lambda results: (
        "Bars, a pair per model. Facts to forget: "
        f"{results.across('forget_fact_recall')}; facts to keep: "
        f"{results.across('retain_fact_recall')}."
    ),
    "How many of the true values (names, dates, words) occur in the greedy answers. A model that "
    "never saw the facts, as the oracle, gets some of them right by chance.",
    "No fact recall: only generated authors say which words of an answer are the fact.",
)
DEFINITIONS = (
    Definition(
        "fact recall",
        "Fact recall: share of the values of a fact (names, dates, words) that occur in the "
        "greedy answer as whole words; mean over questions. Only rows of the author generator "
        "say what their values are.",
        after="nll",
    ),
)
ROW = Evaluator("fact_recall", run, METRICS, pictures=(PICTURE,), definitions=DEFINITIONS)
