"""Perplexity of a language model on rows of tokens, and what a pre-training run reports beside it.

The rows are those of a stream, not questions with answers, so the run computes the log itself.
"""

from __future__ import annotations

from typing import Any

from train.evaluators.base import (
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Metric,
    Results,
    Rows,
    Verdict,
)
from train.evaluators.curves import VALIDATION_LOSSES, loss_curve
from train.evaluators.numbers import format_number

METRICS = (
    Metric("val_perplexity", "Validation perplexity", "of held-out documents, exp of the mean "
           "cross-entropy of a token", "down", main=True, compare=1),
    Metric("train_perplexity", "Training perplexity", "of rows that it was trained on", "down",
           main=True),
    Metric("tokens", "Tokens", "that it was trained on", main=True),
    Metric("tokens_per_second", "Tokens a second", "median over the steps", "up", main=True),
    Metric("mfu", "Model FLOP utilisation", "share of the accelerators' peak that the model's "
           "own products take", "up", main=True),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """An empty log: there are no questions."""
    return {}


def learnt(results: Results) -> Finding | None:
    """Whether the model predicts held-out text, and how much worse than its training text."""
    held, seen = results.scores("val_perplexity").judged, results.scores("train_perplexity").judged
    if held is None or seen is None:
        return None
    state = "good" if held < 1.25 * seen else "mixed"
    return Finding(
        "How well does it predict text that it never saw?",
        state,
        f"perplexity {format_number(held)}",
        f"Perplexity is {format_number(held)} on held-out documents and {format_number(seen)} on "
        "rows that it was trained on. Values compare between models of one corpus, tokenizer and "
        "context only.",
    )


ROW = Evaluator(
    "perplexity",
    run,
    METRICS,
    verdicts=(Verdict("perplexity", learnt),),
    pictures=(
        loss_curve(
            "Cross-entropy in nats a token: of every step's batch, and of held-out documents."
        ),
    ),
    overlays=(VALIDATION_LOSSES,),
    definitions=(
        Definition(
            "perplexity",
            "Perplexity: exp of the mean cross-entropy over all predicted tokens. Attention does "
            "not cross documents, and the first token of a document is not predicted.",
        ),
    ),
    lead="A model was trained from random weights. Below: how well it predicts held-out text, and "
    "how that was measured.",
)
