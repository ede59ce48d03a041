"""Which forget answers are no readable answers: empty, cut or broken, and by which test.

A question whose true answer is a sentence of the author generator wants such a sentence back.
Elsewhere an answer needs three words and an end, where the true answer has them, and must not cost
more nats a token, under the run's judge, than 99 % of the oracle's own answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.metrics import text
from train.data import authors
from train.reporting.metrics_table import number

ENTRY = "forget_readability"
METRIC, RULE = "forget_unreadable", "unreadable_rule"
NLLS = ("forget_oracle_nll", "forget_base_nll")
PERCENTILE = 99
NO_TEMPLATE = "no sentence of the generator"
TOO_COSTLY = f"NLL above the {PERCENTILE}th percentile of the oracle's answers"


class Judged(NamedTuple):
    """Forget answers of one model: by index why not ("": readable), and the tests applied."""

    reasons: dict[str, str]
    rule: str

    @property
    def rate(self) -> float:
        """Share that is not readable."""
        return sum(map(bool, self.reasons.values())) / len(self.reasons)


def why_not(answer: str, truth: str, cut: bool = False, may_be_cut: bool = False) -> str:
    """Why an answer is not readable by its text alone, "" where it is.

    Args:
        answer: what the model said.
        truth: the right answer.
        cut: generation stopped at its limit.
        may_be_cut: the right answer does not fit into that limit either.

    Example:
        >>> why_not("A contract with a a a a a driver.", "The author was born in Lima on May 7.")
        'no sentence of the generator'
    """
    if authors.values_in(truth) is None:
        return text.unfinished(answer, truth, cut, may_be_cut)
    if authors.is_sentence(answer, begun=cut and may_be_cut):
        return ""
    if not answer.strip():
        return "empty"
    return "cut" if cut and authors.is_sentence(answer, begun=True) else NO_TEMPLATE


def log_entry(
    answers: Sequence[str], truths: Sequence[str], cut: Sequence[bool], may_be_cut: Sequence[bool]
) -> dict[str, Any]:
    """The entry of an evaluation log, by the texts alone.

    The NLL part needs the oracle's log as well: `judge` adds it.
    """
    items = {}
    for i, (answer, truth, *ends) in enumerate(zip(answers, truths, cut, may_be_cut, strict=True)):
        reason = why_not(answer, truth, *ends)
        by = "text" if authors.values_in(truth) is None else "template"
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


def _items(log: Any, name: str) -> dict[str, Mapping[str, Any]]:
    entry = log.get(name) if isinstance(log, Mapping) else None
    items = entry.get("value_by_index") if isinstance(entry, Mapping) else None
    if not isinstance(items, Mapping):
        return {}
    return {str(key): item for key, item in items.items() if isinstance(item, Mapping)}


def _nll(log: Any, name: str) -> dict[str, float]:
    values = {key: number(item.get("avg_loss")) for key, item in _items(log, name).items()}
    return {key: value for key, value in values.items() if value is not None}


def judge(log: Mapping[str, Any], reference: Any = None) -> Judged | None:
    """All tests on the forget answers of a log.

    Args:
        log: of the evaluated model.
        reference: log of the oracle, under the same judge; without its NLL by item (a log of
            another program, or no oracle) that test is left out, and the rule says so.

    Returns:
        None for a log without the measure (of an earlier version, or another program).
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
    """`forget_unreadable`, and in words which tests it counts; empty where it was not measured."""
    judged = judge(log, reference)
    return {} if judged is None else {METRIC: judged.rate, RULE: judged.rule}
