"""Answers to questions about a text: token F1 against the best of the right answers."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import Context, Definition, Evaluator, Metric, Rows
from train.evaluators.curves import learning_curve, learning_curves

METRICS = (
    Metric("f1", "Answer F1",
           "words that a greedy answer shares with the nearest right one, test rows", "up",
           main=True),
    Metric("exact_match", "Exact match", "share of the greedy answers that are a right one", "up"),
    Metric("dev_f1", "Dev F1", "the F1 on the dev rows", "up"),
    Metric("dev_exact_match", "Dev exact match", "exact match on the dev rows", "up"),
)  # fmt: skip


def run(model: Any, rows: Rows, context: Context) -> dict[str, Any]:
    """F1 and exact match of every greedy answer."""
    import numpy as np

    from jaxlib_unlearn.metrics import answers

    log = {}
    for split, mine in rows.items():
        before = "" if split == "test" else f"{split}_"
        texts = [found[0] for found in context.answers(split).texts]
        for name, score in (("f1", answers.best_f1), ("exact_match", answers.exact_match)):
            items = {
                str(i): {"score": score(text, row["answers"]), "generation": text}
                for i, (row, text) in enumerate(zip(mine, texts, strict=True))
            }
            mean = float(np.mean([item["score"] for item in items.values()]))
            log[f"{before}{name}"] = {"agg_value": mean, "value_by_index": items}
    return log


DEFINITIONS = (
    Definition(
        "answer",
        "Answer F1: harmonic mean of precision and recall of the words of a greedy answer, without "
        "case, punctuation and articles; the best over a row's right answers (SQuAD).",
    ),
)
ROW = Evaluator(
    "answer",
    run,
    METRICS,
    pictures=(learning_curve("f1"),),
    overlays=(learning_curves("f1"),),
    definitions=DEFINITIONS,
    lead="A model was fine-tuned to answer questions about a passage. Below: how well it does, "
    "before and after, and how that was measured.",
)
