"""Whether a model kept what it should: the worst of several metrics decides."""

from __future__ import annotations

from collections.abc import Iterable

from train.evaluators.base import Finding, Results
from train.evaluators.numbers import format_number as show

KEPT, MOSTLY_KEPT = 0.95, 0.85


def kept(results: Results, metrics: Iterable[tuple[str, str]], rest: str) -> Finding:
    """The answer to "Did it keep the rest?": the lowest share of what is left decides.

    A metric's share is its value over the reference model's; where there is no such value, over
    the value before unlearning.

    Args:
        results: the results of a run.
        metrics: the names of metrics of which higher is better, and their names in a sentence.
        rest: the facts to keep, in words.
    """
    question, shares, told = "Did it keep the rest?", [], []
    for name, words in metrics:
        s, of = results.scores(name), "oracle's"
        base = s.reference
        if base is None:
            base, of = s.start, "original's"
        if s.judged is not None and base:
            shares.append(s.judged / base)
            told.append(
                f"{words} {show(s.judged)} ({100 * shares[-1]:.1f} % of the {of} {show(base)})"
            )
    if not shares:
        text = f"No metric of {rest} was measured on this model and on another."
        return Finding(question, "unknown", "not measured", text)
    text = (
        f"On {rest}: {', '.join(told)}. The lowest share decides: kept from {100 * KEPT:.0f} %, "
        f"mostly kept from {100 * MOSTLY_KEPT:.0f} %."
    )
    lowest = min(shares)
    if lowest >= KEPT:
        return Finding(question, "good", "kept", text)
    level = ("mixed", "mostly kept") if lowest >= MOSTLY_KEPT else ("bad", "damaged")
    return Finding(question, *level, text)
