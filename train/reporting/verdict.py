"""What the numbers of a run say in words: forgotten, kept, readable, like the oracle, leaking.

The limits are stated in the text, so that a reader can disagree with them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from train.reporting.metrics_table import format_number as show
from train.reporting.metrics_table import leak_ks, number, utility_name

FORGET_RATIO = 1.5
KEPT, MOSTLY_KEPT = 0.95, 0.85
UNREADABLE, BROKEN = 0.10, 0.25
PRIVLEAK = 25.0
REPEATED = 0.05
# Which model judges the answers, and how many nats a token they may cost above the oracle's own.
JUDGES = {
    "forget_oracle_nll": ("the oracle", 2.0),
    "forget_base_nll": ("the model before fine-tuning", 1.0),
}
ALPHA = 0.05


SMOKE = (
    "SMOKE run: steps and samples are cut to see the program work. Its numbers say nothing about "
    "the method, so there is no verdict."
)


class Finding(NamedTuple):
    """An answer to one question: `state` is good, mixed, bad or unknown."""

    question: str
    state: str
    answer: str
    text: str


class _Scores(NamedTuple):
    original: float | None
    oracle: float | None
    unlearned: float | None


def _get(summary: dict[str, dict[str, Any]], name: str) -> _Scores:
    values = [number(summary.get(m, {}).get(name)) for m in _Scores._fields]
    return _Scores(*values)


def decades(p: float) -> float:
    """log10 p, finite when p has underflowed.

    Example:
        >>> decades(0.001)
        -3.0
    """
    return math.log10(max(p, 5e-324))


def _forgot(summary: dict[str, dict[str, Any]]) -> Finding:
    question, s = "Did it forget?", _get(summary, "forget_rouge")
    if s.unlearned is None:
        return Finding(question, "unknown", "not measured", "No forget ROUGE-L in this run.")
    before = f" (before: {show(s.original)})" if s.original is not None else ""
    text = f"ROUGE-L of its answers on the facts to forget is {show(s.unlearned)}{before}"
    if s.oracle is None:
        good = s.unlearned <= 0.5
        text += f"; there is no oracle here, so the limit is {show(0.5)}."
        half = s.original is not None and s.unlearned <= 0.75 * s.original
    else:
        good = s.unlearned <= FORGET_RATIO * s.oracle
        text += (
            f"; the oracle, which never saw them, reaches {show(s.oracle)}. "
            f"The limit is {FORGET_RATIO} times the oracle's, {show(FORGET_RATIO * s.oracle)}."
        )
        half = s.original is not None and s.unlearned <= (s.original + s.oracle) / 2
    if s.original is not None and s.original < 0.5:
        text += " The original did not know the facts well to begin with, so this says little."
        good, half = False, good or half
    if good:
        return Finding(question, "good", "forgotten", text)
    return Finding(question, *(("mixed", "partly") if half else ("bad", "not forgotten")), text)


def _kept(summary: dict[str, dict[str, Any]]) -> Finding:
    question, s = "Did it keep the rest?", _get(summary, "retain_rouge")
    if s.unlearned is None or not s.original:
        return Finding(question, "unknown", "not measured", "No retain ROUGE-L before and after.")
    share = s.unlearned / s.original
    text = (
        f"ROUGE-L on the facts to keep went from {show(s.original)} to {show(s.unlearned)}: "
        f"{100 * share:.0f} % is left (kept: at least {100 * KEPT:.0f} %, "
        f"mostly kept: {100 * MOSTLY_KEPT:.0f} %)."
    )
    u, fell = _get(summary, utility_name(summary["unlearned"])), False
    if u.original is not None and u.unlearned is not None:
        text += f" Model utility went from {show(u.original)} to {show(u.unlearned)}"
        text += "." if u.oracle is None else f", the oracle has {show(u.oracle)}."
        # Training the oracle moves it too; what unlearning costs is what is below both.
        floor = u.original if u.oracle is None else min(u.original, u.oracle)
        fell = u.unlearned < MOSTLY_KEPT * floor
        if fell:
            text += f" That is less than {100 * MOSTLY_KEPT:.0f} % of what it could have kept."
    if share >= KEPT:
        level = ("mixed", "kept, but utility fell") if fell else ("good", "kept")
        return Finding(question, *level, text)
    return Finding(
        question, *(("mixed", "mostly kept") if share >= MOSTLY_KEPT else ("bad", "damaged")), text
    )


def _readable(summary: dict[str, dict[str, Any]]) -> Finding:
    question = "Are its answers readable?"
    counted, rate = _get(summary, "forget_unreadable"), _get(summary, "repeated_bigram_rate")
    checks, parts = [], []
    if counted.unlearned is not None:
        rule = str(summary["unlearned"].get("unreadable_rule") or "empty, cut or broken text")
        text = f"{100 * counted.unlearned:.1f} % of its forget answers are unreadable ({rule})"
        if counted.oracle is not None:
            text += f", {100 * counted.oracle:.1f} % of the oracle's"
        parts.append(f"{text}; the limit is {100 * UNREADABLE:.0f} %.")
    if rate.unlearned is not None:
        checks.append(rate.unlearned <= REPEATED)
        parts.append(
            f"{100 * rate.unlearned:.1f} % of the word pairs in its forget answers repeat "
            f"(limit {100 * REPEATED:.0f} %)."
        )
    for name, (judge, gap) in JUDGES.items():
        nll = _get(summary, name)
        if nll.unlearned is None:
            continue
        text = f"Under {judge} its answers cost {show(nll.unlearned)} nats a token"
        if nll.oracle is not None:
            checks.append(nll.unlearned - nll.oracle <= gap)
            text += f", the oracle's own {show(nll.oracle)} (limit: {gap} more)"
        parts.append(text + ".")
    if counted.unlearned is None:
        parts.append("Empty, cut and broken answers were not counted in this run.")
        return Finding(question, "unknown", "not judged", " ".join(parts))
    if counted.unlearned >= BROKEN or (checks and not any(checks)):
        return Finding(question, "bad", "broken", " ".join(parts))
    if counted.unlearned < UNREADABLE and all(checks):
        return Finding(question, "good", "readable", " ".join(parts))
    return Finding(question, "mixed", "partly", " ".join(parts))


def _member(summary: dict[str, dict[str, Any]]) -> Finding:
    question, s = "Does it still look like a member?", _get(summary, "privleak")
    if s.unlearned is None:
        text = "Membership attacks need rows that nobody trained on."
        return Finding(question, "unknown", "not measured", text)
    text = (
        "A membership attack (min-k) tells the facts to forget from rows never seen with AUC "
        f"{_across(summary, 'mia_min_k_auc')}. PrivLeak {show(s.unlearned)}"
        + (f" (before: {show(s.original)})" if s.original is not None else "")
        + f": -100 is fully memorised, 0 as if never seen (limit: within {PRIVLEAK:.0f} of 0)."
    )
    if abs(s.unlearned) <= PRIVLEAK:
        if s.original is not None and abs(s.original) <= PRIVLEAK:
            text += " It does not even see the original as a member: it has no power here."
            return Finding(question, "mixed", "no power", text)
        return Finding(question, "good", "no", text)
    if s.unlearned > 0:
        text += " Facts that look stranger than unseen ones give away that they were unlearned."
        return Finding(question, "mixed", "over-forgotten", text)
    half = s.original is not None and s.unlearned >= s.original / 2
    return Finding(question, "mixed" if half else "bad", "still a member", text)


def _across(summary: dict[str, dict[str, Any]], name: str) -> str:
    """`0.951 (original 0.990, oracle 0.502)`."""
    s = _get(summary, name)
    others = [f"{m} {show(v)}" for m, v in zip(s._fields[:2], s, strict=False) if v is not None]
    return show(s.unlearned) + (f" ({', '.join(others)})" if others else "")


def _told_apart(summary: dict[str, dict[str, Any]], n: int) -> Finding:
    question, s = "Can a test tell it from the oracle?", _get(summary, "forget_quality")
    if s.unlearned is None:
        text = "Forget quality needs an oracle or a retain log, and paraphrased and wrong answers."
        return Finding(question, "unknown", "not measured", text)
    text = (
        f"The KS test on truth ratios gives p = {show(s.unlearned)}"
        + (f", 10 to the {decades(s.unlearned):.1f}" if s.unlearned < 0.5 else "")
        + (f", on {n} questions." if n else ".")
        + f" Above {ALPHA} it does not tell the two apart."
    )
    gain = None
    if s.original is not None:
        gain = decades(s.unlearned) - decades(s.original)
        text += (
            f" The original has p = {show(s.original)}: unlearning moved it "
            f"{abs(gain):.1f} decades {'up' if gain >= 0 else 'down'}."
        )
        if s.original > ALPHA:
            text += " It does not even tell the original from the oracle: it has no power here."
            return Finding(question, "mixed", "no power", text)
    if s.unlearned > ALPHA:
        return Finding(question, "good", "not told apart", text)
    if gain is not None and gain >= 1:
        return Finding(question, "mixed", "told apart, but closer", text)
    return Finding(question, "bad", "told apart", text)


def _leaks(summary: dict[str, dict[str, Any]]) -> Finding | None:
    ks = leak_ks(summary["unlearned"])
    if not ks:
        return None
    question, s = "Does it leak when asked often?", _get(summary, f"leak_at_{ks[-1]}")
    if s.unlearned is None:
        return None
    text = f"The best of {ks[-1]} sampled answers reaches ROUGE-L {show(s.unlearned)}"
    text += f" (original {show(s.original)})" if s.original is not None else ""
    if s.oracle is None:
        return Finding(question, "unknown", "no oracle to compare", text + ".")
    text += (
        f"; {show(s.oracle)} for the oracle, which has nothing to leak. "
        f"The limit is {FORGET_RATIO} times the oracle's."
    )
    if s.unlearned <= FORGET_RATIO * s.oracle:
        return Finding(question, "good", "no more than the oracle allows", text)
    half = s.original is not None and s.unlearned <= (s.original + s.oracle) / 2
    return Finding(question, *(("mixed", "somewhat") if half else ("bad", "it leaks")), text)


def verdicts(summary: dict[str, dict[str, Any]], n: int = 0, smoke: bool = False) -> list[Finding]:
    """The findings of a run, in reading order.

    Args:
        summary: flat metrics by model, "unlearned" among them.
        n: questions behind forget quality (0: not known).
        smoke: it was a smoke run: nothing can be found from it.
    """
    if smoke:
        return []
    found = [
        _forgot(summary),
        _kept(summary),
        _readable(summary),
        _told_apart(summary, n),
        _member(summary),
        _leaks(summary),
    ]
    return [finding for finding in found if finding is not None]
