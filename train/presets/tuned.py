"""Optimizers of the presets that compare zeroth order with AdamW."""

from __future__ import annotations

from typing import Any

from train.options import optimizers


def at_rate(name: str, rate: float, schedule: str = "constant", **own: Any) -> optimizers.Options:
    """The options of an optimizer at a learning rate, without warm-up.

    Args:
        name: The row of the optimizer.
        rate: The peak of its learning rate.
        schedule: The form of the learning rate.
        own: Other options of the row.

    Example:
        >>> at_rate("mezo", 1e-5).warmup
        0.0
    """
    return optimizers.options_of(name, learning_rate=rate, schedule=schedule, warmup=0.0, **own)
