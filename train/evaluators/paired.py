"""The judged model against the model before, item by item."""

from __future__ import annotations

from typing import NamedTuple

from train.evaluators.base import Results, items_of
from train.evaluators.numbers import format_number

SMALLEST = 1e-300  # a smaller probability is reported as smaller than this: it may be 0


class Paired(NamedTuple):
    """The items by which both models were judged.

    Args:
        gained: the number of items for which the judged model scores higher; of a share, of those
            that it alone has right.
        lost: the number of items for which the model before scores higher.
        chance: the probability of a difference as large, if both were equally good (a sign test).
    """

    gained: int
    lost: int
    chance: float

    def judged(self, better: tuple[str, str]) -> tuple[str, str]:
        """The state and answer of a verdict; `better` are those of a gain beyond chance."""
        if self.chance >= 0.05:
            return "mixed", "not told apart from before"
        return ("bad", "worse than before") if self.lost > self.gained else better

    @property
    def p(self) -> str:
        """The result of the sign test, in words."""
        p = f"= {format_number(self.chance)}" if self.chance > SMALLEST else f"< {SMALLEST:g}"
        return f"sign test, p {p}"

    def text(self, what: str) -> str:
        """As words of a verdict.

        Example:
            >>> Paired(6047, 96, 0.0).text("rows")
            '6047 rows gained and 96 lost (sign test, p < 1e-300)'
        """
        return f"{self.gained} {what} gained and {self.lost} lost ({self.p})"


def paired(results: Results, name: str, key: str) -> Paired | None:
    """Count what was gained and lost.

    Args:
        results: the results of a run.
        name: the name of the metric.
        key: the key of an item's score, higher where it is better; 1 or 0 for a share.

    Returns:
        None where no item was judged with both models.
    """
    start, judged = results.roles.start, results.roles.judged
    after, before = (items_of(results.logs.get(model), name) for model in (judged, start))
    shared = [(after[i][key], before[i][key]) for i in after if i in before]
    if not shared:
        return None
    from scipy.stats import binomtest

    gained, lost = sum(a > b for a, b in shared), sum(a < b for a, b in shared)
    chance = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(gained, lost, chance)
