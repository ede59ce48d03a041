"""The picture of a fine-tune for a budget of forward passes: what it gains over them."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import Picture, Results
from train.reporting.numbers import number


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
