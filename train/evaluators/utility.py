"""Model utility: one number for what a model can still do, from the other evaluators' entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from train.evaluators.base import Definition, EvaluationContext, Evaluator, Log, Metric, Rows

WORDS = "harmonic mean of probability, ROUGE-L and truth ratio outside the forget set"
OFFICIAL = Metric("model_utility", "Model utility", WORDS, "up", main=True,
                  after="world_facts_truth_ratio", compare=5)  # fmt: skip
# A mean of fewer parts than TOFU's nine is another quantity and has another name.
OF_PARTS = Metric("model_utility_of_{n}", "Model utility, {n} parts",
                  f"{WORDS}: the {{n}} of TOFU's 9 parts that were measured", "up", main=True,
                  after="model_utility", stands_for="model_utility")  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The harmonic mean of the parts that the log has so far."""
    from jaxlib_unlearn.metrics import eval_log, tofu

    return tofu.utility_log(context.log) if eval_log.has_metrics(context.log) else {}


def summarize(log: Log, reference: Any) -> dict[str, Any]:
    """Nothing: `tofu.summarize` computes it from the items."""
    return {}


def name_in(scores: Iterable[str]) -> str:
    """The name of model utility in these scores: `model_utility` or `model_utility_of_N`.

    Example:
        >>> name_in({"model_utility_of_3": 0.5})
        'model_utility_of_3'
    """
    names = (name for name in scores if OF_PARTS.count_in(name) is not None)
    return next(names, OFFICIAL.name)


DEFINITIONS = (
    Definition(
        "utility",
        "Model utility: harmonic mean of probability, ROUGE-L and truth ratio on the retain, "
        "real-author and world-fact questions; one zero makes it zero. Where not all nine parts "
        "were measured it is called model utility of N parts, and published values are no "
        "comparison.",
        after="forget quality",
    ),
)
ROW = Evaluator("utility", run, (OFFICIAL, OF_PARTS), summarize, definitions=DEFINITIONS)
