"""Answers to questions about a text: token F1 against the best of the right answers."""

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
from train.evaluators.curves import learning_curve, learning_curves
from train.evaluators.numbers import format_number
from train.evaluators.paired import paired

METRICS = (
    Metric("f1", "Answer F1",
           "words that a greedy answer shares with the nearest right one, test rows", "up",
           main=True),
    Metric("exact_match", "Exact match", "share of the greedy answers that are a right one", "up"),
    Metric("dev_f1", "Dev F1", "the F1 on the dev rows", "up"),
    Metric("dev_exact_match", "Dev exact match", "exact match on the dev rows", "up"),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
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


def learnt(results: Results) -> Finding | None:
    """Whether answers come nearer to a right one than before, beyond chance."""
    found = paired(results, "f1", "score")
    before, _, share = results.scores("f1")
    if found is None or before is None or share is None:
        return None
    state, answer = found.judged(("good", f"F1 {format_number(share)}"))
    if state != "mixed" and (found.gained > found.lost) != (share > before):
        state, answer = "mixed", "the mean says otherwise than most answers"
    return Finding(
        "Did it learn the task?",
        state,
        answer,
        f"Answer F1 on the test rows: {results.across('f1')}; {found.gained} answers are nearer to "
        f"a right one than before and {found.lost} further from it ({found.p}). Answers that are a "
        f"right one: {results.across('exact_match')}.",
    )


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
    verdicts=(Verdict("answer", learnt),),
    pictures=(learning_curve("f1"),),
    overlays=(learning_curves("f1"),),
    definitions=DEFINITIONS,
    lead="A model was fine-tuned to answer questions about a passage. Below: how well it does, "
    "before and after, and how that was measured.",
)
