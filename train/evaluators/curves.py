"""Pictures of training: the loss of a stage, and what a fine-tune gains over forward passes."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import Picture, Results
from train.reporting.numbers import number


def loss_curve(words: str) -> Picture:
    """The picture of the loss of every step, and of held-out documents where they are looked at.

    Args:
        words: its caption.
    """

    def draw(results: Results) -> Any:
        from train.reporting import plots

        return plots.losses(results.steps)

    def alt(results: Results) -> str:
        looks = [row["validation_loss"] for row in results.steps if "validation_loss" in row]
        ends = f" The validation loss ends at {looks[-1]:.3f} nats." if looks else ""
        return f"Loss over {len(results.steps)} logged steps.{ends}"

    missing = "No curves: metrics.jsonl has no steps."
    return Picture("curves.png", "While it trains", draw, alt, words, missing)


def learning_curve(name: str) -> Picture:
    """The picture of a metric of the dev rows over forward passes.

    Args:
        name: of the metric on the test rows; that on the dev rows is `dev_NAME`.
    """

    def draw(results: Results) -> Any:
        from train.reporting import plots

        judged, levels = results.judged, {}
        steps, forwards = number(judged.get("steps")), number(judged.get("forwards"))
        for model in results.roles.order(results.summary):
            value = number(results.summary[model].get(name))
            levels |= {} if value is None else {model: value}
        each = forwards / steps if steps and forwards else 1.0
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
