"""Readability: which forget answers are empty, cut off or broken, and by which test.

Where the true answer is a sentence of the author generator, the answer must be one too. Elsewhere
it needs three words and the end of a sentence, if the true answer has them, and its NLL per token
under the run's judge must not exceed that of 99 % of the oracle's own answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.metrics import text
from train.data.author_sentences import is_sentence, values_in
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
from train.evaluators.base import items_of as _items
from train.evaluators.numbers import format_number as show
from train.evaluators.numbers import number

ENTRY = "forget_readability"
METRIC, RULE = "forget_unreadable", "unreadable_rule"
NLLS = ("forget_oracle_nll", "forget_base_nll")
UNREADABLE, BROKEN = 0.10, 0.25
REPEATED = 0.05
# The judge, and the largest excess in nats per token of an answer's NLL over the oracle's own.
JUDGES = {
    "forget_oracle_nll": ("the oracle", 2.0),
    "forget_base_nll": ("the model before fine-tuning", 1.0),
}
METRICS = (
    Metric(METRIC, "Unreadable answers",
           "share of its forget answers that are empty, cut or broken text",
           "down", main=True, compare=6),
)  # fmt: skip
PERCENTILE = 99
NO_TEMPLATE = "no sentence of the generator"
TOO_COSTLY = f"NLL above the {PERCENTILE}th percentile of the oracle's answers"


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The tests of the greedy forget answers that need only their texts."""
    if "forget" not in rows:
        return {}
    limit = context.config.max_new_tokens
    truths, answers = context.scores("forget")["answers"], context.answers("forget")
    # A model without an end-of-text token never stops; its answers do not count as cut off.
    ends = model.tokenizer.eos_id is not None
    entry = log_entry(
        [texts[0] for texts in answers.texts],
        [row["answer"] for row in rows["forget"]],
        [ends and len(ids[0]) >= limit for ids in answers.ids],
        [len(truth.logp) - 1 > limit for truth in truths],  # all but the end of the text
    )
    return {ENTRY: entry}


class Judged(NamedTuple):
    """Forget answers of one model: reasons by index ("": readable), and the tests applied."""

    reasons: dict[str, str]
    rule: str

    @property
    def rate(self) -> float:
        """Share of answers that are not readable."""
        return sum(map(bool, self.reasons.values())) / len(self.reasons)


def why_not(answer: str, truth: str, cut: bool = False, may_be_cut: bool = False) -> str:
    """The reason why an answer is unreadable, from its text alone; "" for a readable one.

    Args:
        answer: the model's answer.
        truth: the right answer.
        cut: whether generation stopped at its length limit.
        may_be_cut: whether the right answer exceeds that limit too.

    Example:
        >>> why_not("A contract with a a a a a driver.", "The author was born in Lima on May 7.")
        'no sentence of the generator'
    """
    if values_in(truth) is None:
        return text.unfinished(answer, truth, cut, may_be_cut)
    if is_sentence(answer, begun=cut and may_be_cut):
        return ""
    if not answer.strip():
        return "empty"
    return "cut" if cut and is_sentence(answer, begun=True) else NO_TEMPLATE


def log_entry(
    answers: Sequence[str], truths: Sequence[str], cut: Sequence[bool], may_be_cut: Sequence[bool]
) -> dict[str, Any]:
    """The readability entry of an evaluation log, from the texts alone.

    The NLL test needs the oracle's log as well: `judge` adds it.
    """
    items = {}
    for i, (answer, truth, *ends) in enumerate(zip(answers, truths, cut, may_be_cut, strict=True)):
        reason = why_not(answer, truth, *ends)
        by = "text" if values_in(truth) is None else "template"
        items[str(i)] = {
            "score": float(bool(reason)),
            "readable": not reason,
            "reason": reason,
            "by": by,
        }
    return {
        "agg_value": float(np.mean([item["score"] for item in items.values()])),
        "value_by_index": items,
    }


def _nll(log: Any, name: str) -> dict[str, float]:
    values = {key: number(item.get("avg_loss")) for key, item in _items(log, name).items()}
    return {key: value for key, value in values.items() if value is not None}


def judge(log: Mapping[str, Any], reference: Any = None) -> Judged | None:
    """Apply all tests to the forget answers of a log.

    Args:
        log: the log of the evaluated model.
        reference: the log of the oracle, under the same judge; without its NLL by item (a log of
            another program, or no oracle) that test is left out, and the rule says so.

    Returns:
        `Judged`; None for a log without this entry (from an earlier version or another program).
    """
    items = _items(log, ENTRY)
    if not items:
        return None
    reasons = {k: str(item.get("reason", "")) for k, item in items.items()}
    by_text = [k for k, item in items.items() if item.get("by") == "text"]
    rules = [] if len(by_text) == len(items) else ["empty, cut or no sentence of the generator"]
    if by_text:
        rule = "empty, cut, under 3 words or without an end"
        for name in NLLS:
            mine, oracles = _nll(log, name), list(_nll(reference, name).values())
            if mine and oracles:
                limit = float(np.percentile(oracles, PERCENTILE))
                for k in by_text:
                    if not reasons[k] and mine.get(k, 0.0) > limit:
                        reasons[k] = TOO_COSTLY
                rule += f", or {TOO_COSTLY}"
                break
        else:
            rule += " (without an oracle and a judge NLL is not compared)"
        rules.append(rule)
    return Judged(reasons, "; ".join(rules))


def summarize(log: Mapping[str, Any], reference: Any = None) -> dict[str, Any]:
    """`forget_unreadable` and the tests behind it in words; empty where it was not measured."""
    judged = judge(log, reference)
    return {} if judged is None else {METRIC: judged.rate, RULE: judged.rule}


def readable(results: Results) -> Finding:
    """The share of unreadable answers, repetition, and the answers' NLL under the judge."""
    question = "Are its answers readable?"
    counted, rate = results.scores(METRIC), results.scores("repeated_bigram_rate")
    checks, parts = [], []
    if counted.judged is not None:
        rule = str(results.judged.get(RULE) or "empty, cut or broken text")
        words = f"{100 * counted.judged:.1f} % of its forget answers are unreadable ({rule})"
        if counted.reference is not None:
            words += f", {100 * counted.reference:.1f} % of the oracle's"
        parts.append(f"{words}; the limit is {100 * UNREADABLE:.0f} %.")
    if rate.judged is not None:
        checks.append(rate.judged <= REPEATED)
        parts.append(
            f"{100 * rate.judged:.1f} % of the word pairs in its forget answers repeat "
            f"(limit {100 * REPEATED:.0f} %)."
        )
    for name, (judge, gap) in JUDGES.items():
        nll = results.scores(name)
        if nll.judged is None:
            continue
        words = f"Under {judge} its answers cost {show(nll.judged)} nats a token"
        if nll.reference is not None:
            checks.append(nll.judged - nll.reference <= gap)
            words += f", the oracle's own {show(nll.reference)} (limit: {gap} more)"
        parts.append(words + ".")
    if counted.judged is None:
        parts.append("Empty, cut and broken answers were not counted in this run.")
        return Finding(question, "unknown", "not judged", " ".join(parts))
    if counted.judged >= BROKEN or (checks and not any(checks)):
        return Finding(question, "bad", "unreadable", " ".join(parts))
    if counted.judged < UNREADABLE and all(checks):
        return Finding(question, "good", "readable", " ".join(parts))
    return Finding(question, "mixed", "partly unreadable", " ".join(parts))


DEFINITIONS = (
    Definition(
        "unreadable",
        "Unreadable answers: share of the greedy forget answers that are empty, cut or broken. "
        "For generated authors: all that is no sentence of the generator, whatever its values. "
        "Elsewhere, where the true answer has them: fewer than three words, or no end; and, "
        "with an oracle, an NLL per token under the judge above the 99th percentile of the "
        "oracle's own answers.",
        after="fact recall",
    ),
)
ROW = Evaluator(
    "readability",
    run,
    METRICS,
    derive=summarize,
    verdicts=(Verdict("readable", readable, after="kept"),),
    definitions=DEFINITIONS,
)
