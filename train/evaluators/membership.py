"""Membership inference: whether attacks distinguish rows to forget from rows never trained on."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import (
    REFERENCE,
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Log,
    Metric,
    Results,
    Rows,
    Verdict,
)
from train.evaluators.numbers import format_number as show
from train.evaluators.tofu import summarize

PRIVLEAK = 25.0
METRICS = (
    Metric("mia_loss_auc", "Membership AUC, loss",
           "how well the loss tells forget rows from unseen rows (0.5: not at all)",
           "near", REFERENCE),
    Metric("mia_zlib_auc", "Membership AUC, zlib",
           "the same with the loss divided by the compressed length", "near", REFERENCE),
    Metric("mia_min_k_auc", "Membership AUC, min-k",
           "the same with the least likely tokens of an answer", "near", REFERENCE),
    Metric("mia_min_k_plus_plus_auc", "Membership AUC, min-k++",
           "the same with those tokens standardised by the model's own spread",
           "near", REFERENCE),
    Metric("privleak", "PrivLeak",
           "membership AUC against the oracle's: -100 still a member, above 0 over-forgotten",
           "near", 0.0, main=True, compare=7),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """Attacks on the true answers of the forget rows against those of the holdout rows."""
    from jaxlib_unlearn.metrics import tofu

    if "forget" not in rows or "holdout" not in rows:
        return {}
    members, others = (context.scores(split)["answers"] for split in ("forget", "holdout"))
    return tofu.membership_log(members, others)


def compare(log: Log, reference: Any) -> dict[str, Any]:
    """The log with `privleak` relative to the reference instead of an AUC of 0.5."""
    from jaxlib_unlearn.metrics import tofu

    return tofu.with_reference(log, reference)


def member(results: Results) -> Finding:
    """PrivLeak, and whether the attack has any power."""
    question, s = "Does it still look like a member?", results.scores("privleak")
    if s.judged is None:
        text = "Membership attacks need rows that nobody trained on."
        return Finding(question, "unknown", "not measured", text)
    text = (
        "A membership attack (min-k) tells the facts to forget from rows never seen with AUC "
        f"{_across(results, 'mia_min_k_auc')}. PrivLeak {show(s.judged)}"
        + (f" (before: {show(s.start)})" if s.start is not None else "")
        + f": -100 is fully memorised, 0 as if never seen (limit: within {PRIVLEAK:.0f} of 0)."
    )
    if abs(s.judged) <= PRIVLEAK:
        if s.start is not None and abs(s.start) <= PRIVLEAK:
            text += " It does not even see the original as a member: it has no power here."
            return Finding(question, "unknown", "the attack has no power", text)
        return Finding(question, "good", "no longer a member", text)
    if s.judged > 0:
        text += " Facts that look stranger than unseen ones give away that they were unlearned."
        return Finding(question, "mixed", "over-forgotten", text)
    half = s.start is not None and s.judged >= s.start / 2
    return Finding(question, "mixed" if half else "bad", "still a member", text)


def _across(results: Results, name: str) -> str:
    """`0.951 (original 0.990, oracle 0.502)`."""
    s, roles = results.scores(name), results.roles
    pairs = ((roles.start, s.start), (roles.held_to(roles.judged), s.reference))
    others = [f"{model} {show(value)}" for model, value in pairs if value is not None]
    return show(s.judged) + (f" ({', '.join(others)})" if others else "")


DEFINITIONS = (
    Definition(
        "membership",
        "Membership AUC: chance that an unseen answer looks less familiar than a forgotten one. "
        "PrivLeak: that AUC (min-k) relative to the oracle's, in percent.",
    ),
)
ROW = Evaluator(
    "membership",
    run,
    METRICS,
    summarize,
    compare=compare,
    verdicts=(Verdict("member", member),),
    definitions=DEFINITIONS,
)
