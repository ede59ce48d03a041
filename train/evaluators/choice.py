"""Choosing among given answers: accuracy, also with the prior of the labels taken out, and NLL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.evaluators.base import (
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Metric,
    Results,
    Rows,
    Verdict,
    items_of,
)
from train.evaluators.curves import learning_curve, learning_curves
from train.evaluators.numbers import format_number
from train.evaluators.paired import paired

METRICS = (
    Metric("accuracy", "Accuracy",
           "share of the test rows whose right option scores highest", "up", main=True),
    Metric("accuracy_without_prior", "Accuracy, prior out",
           "the same after every option's mean score over the dev rows is subtracted, so that a "
           "label that the model prefers whatever it reads gains nothing by it", "up", main=True),
    Metric("nll", "NLL of the choice",
           "negative log-probability of the right option among the row's, test rows, in nats",
           "down", main=True),
    Metric("dev_accuracy", "Dev accuracy", "the accuracy on the dev rows", "up"),
    Metric("dev_nll", "Dev NLL", "NLL of the choice on the dev rows", "down"),
    Metric("forwards", "Forward passes", "of a batch, that the training took"),
    Metric("steps", "Steps", "of the optimizer"),
    Metric("seconds", "Seconds", "that these steps took"),
    Metric("step_mib", "Step memory", "of the compiled step, in MiB"),
)  # fmt: skip


def log_softmax(scores: Any) -> Any:
    """Log-probabilities of the options of a row, float64."""
    import numpy as np

    scores = np.asarray(scores, np.float64)
    top = scores - scores.max()
    return top - np.log(np.exp(top).sum())


def prior_of(rows: Sequence[Any], scores: Sequence[Any]) -> Any:
    """The mean log-probability of every option; None where rows have different options.

    No label of these rows is read.
    """
    import numpy as np

    if not rows or any(row.get("options") != rows[0].get("options") for row in rows):
        return None
    return np.mean([log_softmax(one) for one in scores], 0)


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The chosen option of every row of every split."""
    import numpy as np

    log: dict[str, Any] = {}

    def enter(name: str, items: dict[str, dict[str, Any]], key: str) -> None:
        mean = float(np.mean([item[key] for item in items.values()]))
        log[name] = {"agg_value": mean, "value_by_index": items}

    scores = {split: context.scores(split)["options"] for split in rows}
    for split, mine in rows.items():
        before = "" if split == "test" else f"{split}_"
        chosen, losses = {}, {}
        for i, (row, values) in enumerate(zip(mine, scores[split], strict=True)):
            logs, best = log_softmax(values), int(np.argmax(values))
            told = {"gold": row["gold"], "chosen": best, "scores": [float(x) for x in values]}
            chosen[str(i)] = {"right": float(best == row["gold"]), **told}
            losses[str(i)] = {"nll": float(-logs[row["gold"]])}
        enter(f"{before}accuracy", chosen, "right")
        enter(f"{before}nll", losses, "nll")
    prior = prior_of(rows.get("dev", ()), scores.get("dev", ()))
    same = prior is not None and prior_of(rows.get("test", ()), scores.get("test", ())) is not None
    if same and rows["test"][0].get("options") == rows["dev"][0].get("options"):
        items = {}
        for i, (row, values) in enumerate(zip(rows["test"], scores["test"], strict=True)):
            best = int(np.argmax(log_softmax(values) - prior))
            items[str(i)] = {"right": float(best == row["gold"]), "chosen": best}
        enter("accuracy_without_prior", items, "right")
    return log


DEFINITIONS = (
    Definition(
        "choice",
        "Accuracy: an option scores the mean log-probability of its tokens behind the prompt; the "
        "highest is chosen. Prior out: log-probabilities among the options, less their mean over "
        "the dev rows, whose labels are not read. Of an image a class scores its logit.",
    ),
)


def learnt(results: Results) -> Finding | None:
    """Whether the model chooses better than before, beyond chance, and than the commonest answer.

    Chance: the rows that one of the two models has right and the other has not, by a sign test.
    Where the prior of the labels can be taken out, which needs no training, the model must be
    better than before without it, too.
    """
    found = paired(results, "accuracy", "right")
    if found is None:
        return None
    after = items_of(results.logs.get(results.roles.judged), "accuracy")
    gold = [item["gold"] for item in after.values()]
    most = max(map(gold.count, set(gold))) / len(gold)
    share = sum(item["right"] for item in after.values()) / len(after)
    better = ("good", f"accuracy {format_number(share)}")
    if share <= most:
        better = ("mixed", "no better than the commonest answer")
    without = paired(results, "accuracy_without_prior", "right")
    told = "not measured"
    if without is not None:
        told = f"{results.across('accuracy_without_prior')}; {without.text('rows')}"
        if better[0] == "good" and without.judged(better) != better:
            better = ("mixed", "no better with the prior of the labels taken out")
    state, answer = found.judged(better)
    return Finding(
        "Did it learn the task?",
        state,
        answer,
        f"Accuracy on {len(after)} test rows: {results.across('accuracy')}; "
        f"{found.text('rows')}. The commonest answer is right on {format_number(most)}. With the "
        f"prior of the labels taken out: {told}.",
    )


ROW = Evaluator(
    "choice",
    run,
    METRICS,
    verdicts=(Verdict("choice", learnt),),
    pictures=(learning_curve("accuracy"),),
    overlays=(learning_curves("accuracy"),),
    definitions=DEFINITIONS,
    lead="A model was fine-tuned to choose among options. Below: how often it is right, before and "
    "after, and how that was measured.",
)
