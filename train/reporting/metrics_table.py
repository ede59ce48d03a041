"""The metrics of `summary.json`: their meaning, their better direction, their reading order.

All of it derives from the rows in `train/evaluators/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from train.evaluators import EVALUATORS
from train.evaluators.base import ARROWS as ARROWS
from train.evaluators.base import DIRECTIONS as DIRECTIONS
from train.evaluators.base import Metric, arranged
from train.evaluators.numbers import MISSING as MISSING
from train.evaluators.numbers import format_number as format_number
from train.evaluators.numbers import number as number

LEGEND = "↑ higher, ↓ lower, ≈ close to the oracle, →0 close to zero is better"
# Properties of a model that are not metrics.
FACTS = {"num_parameters"}


def metrics() -> list[Metric]:
    """The metrics of all evaluators, in reading order."""
    # Evaluators that mean the same share a metric.
    return arranged(dict.fromkeys(m for row in EVALUATORS.values() for m in row.metrics))


def _find(name: str, known: list[Metric]) -> tuple[int, int]:
    """Position of a metric among the known ones, and its n; unknown metrics come last."""
    for i, metric in enumerate(known):
        if metric.name == name:
            return i, 0
    for i, metric in enumerate(known):
        if (n := metric.count_in(name)) is not None:
            return i, n
    return len(known), 0


def describe(name: str) -> Metric:
    """The description of a metric, `leak_at_K` and the like included; a bare one if unknown.

    Example:
        >>> describe("leak_at_8").label, describe("model_utility_of_3").label
        ('Leak@8', 'Model utility, 3 parts')
    """
    known = metrics()
    i, n = _find(name, known)
    if i == len(known):
        label = name.replace("_", " ").capitalize()
        return Metric(name, label, "not described by this program")
    return known[i] if known[i].name == name else known[i].of(n)


def variants(name: str, names: Iterable[str]) -> list[str]:
    """The members of `names` that are this metric or replace it, sorted.

    Example:
        >>> variants("model_utility", ["privleak", "model_utility_of_3"])
        ['model_utility_of_3']
    """
    return sorted(n for n in set(names) if n == name or describe(n).stands_for == name)


def metrics_of(scores: dict[str, Any]) -> dict[str, float]:
    """The metrics of one model, with the logarithms that are shown beside them."""
    found = {k: number(v) for k, v in scores.items() if k not in FACTS}
    values = {k: v for k, v in found.items() if v is not None}
    for metric in metrics():
        if metric.log10_of in values:
            # p underflows to 0 for large n: the smallest float keeps the logarithm finite.
            values[metric.name] = math.log10(max(values[metric.log10_of], 5e-324))
    return values


def ordered(names: Iterable[str]) -> list[str]:
    """Metric names in reading order: known ones, families by n, then unknown ones by name."""
    known = metrics()
    return sorted(set(names), key=lambda name: (*_find(name, known), name))
