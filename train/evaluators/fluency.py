"""Fluency: how often greedy answers repeat word pairs, and their NLL under another model."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import Definition, EvaluationContext, Evaluator, Metric, Rows

METRICS = (
    Metric("forget_oracle_nll", "Answer NLL (oracle)",
           "nats per token of its forget answers under the oracle (readability)",
           "down", main=True),
    Metric("forget_base_nll", "Answer NLL (base)",
           "nats per token of its forget answers under the model before fine-tuning (readability)",
           "down", main=True),
    Metric("repeated_bigram_rate", "Repeated bigrams",
           "share of word pairs that occurred before in the same answer (readability)",
           "down", main=True),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """Repetition in the greedy forget answers and, with a judge, their NLL under it."""
    import numpy as np

    from jaxlib_unlearn.metrics import text

    if "forget" not in rows:
        return {}
    rates = [text.repeated_bigram_rate([texts[0]]) for texts in context.answers("forget").texts]
    log: dict[str, Any] = {
        "repeated_bigram_rate": {
            "agg_value": float(np.mean(rates)),
            "value_by_index": {str(i): {"score": float(r)} for i, r in enumerate(rates)},
        }
    }
    if context.judge is not None:
        losses = context.judged("forget")
        log[f"forget_{context.config.judge}_nll"] = {
            "agg_value": float(np.mean([x for item in losses for x in item])),
            "value_by_index": {
                str(i): {"avg_loss": float(np.mean(item)), "tokens": len(item)}
                for i, item in enumerate(losses)
            },
        }
    return log


def summarize(log: Any, reference: Any) -> dict[str, Any]:
    """The means of the entries, repetition first."""
    names = ("repeated_bigram_rate", "forget_oracle_nll", "forget_base_nll")
    return {name: log[name]["agg_value"] for name in names if name in log}


DEFINITIONS = (
    Definition(
        "nll",
        "Answer NLL: mean negative log-likelihood per token, in nats, of a model's greedy "
        "forget answers under the model named.",
        after="membership",
    ),
    Definition(
        "bigrams",
        "Repeated bigrams: share of word pairs in a greedy forget answer that occurred before "
        "in it.",
    ),
)
ROW = Evaluator("fluency", run, METRICS, summarize, definitions=DEFINITIONS)
