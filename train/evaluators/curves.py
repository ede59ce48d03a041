"""Pictures of training: the loss of a stage, and what a fine-tune gains over forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.evaluators.base import Overlay, Picture, Results
from train.evaluators.numbers import number


def loss_curve(words: str) -> Picture:
    """The picture of the loss of every step, and of held-out documents where they are looked at.

    Args:
        words: its caption.
    """

    def draw(results: Results) -> Any:
        from train.evaluators import plots

        return plots.losses(results.steps)

    def alt(results: Results) -> str:
        looks = [row["validation_loss"] for row in results.steps if "validation_loss" in row]
        ends = f" The validation loss ends at {looks[-1]:.3f} nats." if looks else ""
        return f"Loss over {len(results.steps)} logged steps.{ends}"

    missing = "No curves: metrics.jsonl has no steps."
    return Picture("curves.png", "While it trains", draw, alt, words, missing)


def _tokens(config: Mapping[str, Any], judged: Mapping[str, Any]) -> float | None:
    """Tokens of a step."""
    budget = config.get("train")
    return number(budget.get("batch_tokens")) if isinstance(budget, Mapping) else None


VALIDATION_LOSSES = Overlay(
    "validation_loss",
    "Validation loss over tokens",
    "Cross-entropy of held-out documents.",
    "tokens",
    "validation loss, nats a token",
    _tokens,
)


def _forwards(config: Mapping[str, Any], judged: Mapping[str, Any]) -> float | None:
    """Forward passes of a step, on average."""
    steps, forwards = number(judged.get("steps")), number(judged.get("forwards"))
    return forwards / steps if steps and forwards else None


def learning_curves(name: str) -> Overlay:
    """A metric of the dev rows over forward passes, of several runs.

    Args:
        name: the name of the metric on the test rows; on the dev rows it is `dev_NAME`.
    """
    return Overlay(
        f"dev_{name}",
        f"Dev {name} over forward passes",
        f"The {name} on the dev rows.",
        "forward passes",
        f"{name}, dev rows",
        _forwards,
        rises=True,
    )


def learning_curve(name: str) -> Picture:
    """The picture of a metric of the dev rows over forward passes.

    Args:
        name: the name of the metric on the test rows; on the dev rows it is `dev_NAME`.
    """

    def draw(results: Results) -> Any:
        from train.evaluators import plots

        levels: dict[str, float] = {}
        for model in results.roles.order(results.summary):
            value = number(results.summary[model].get(name))
            levels |= {} if value is None else {model: value}
        each = _forwards({}, results.judged) or 1.0
        return plots.over_forwards(results.steps, name, each, levels)

    def alt(results: Results) -> str:
        found = [number(row.get(f"dev_{name}")) for row in results.steps]
        looks = [value for value in found if value is not None]
        ends = f" It goes from {looks[0]:.3f} to {looks[-1]:.3f}." if looks else ""
        return f"The {name} on the dev rows at {len(looks)} steps of training.{ends}"

    return Picture(
        "curves.png",
        "While it learns",
        draw,
        alt,
        f"The {name} on the dev rows over forward passes; the levels are that on the test rows.",
        "No curve: nothing was looked at during training (--train.curve-points).",
    )
