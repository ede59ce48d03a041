"""Likelihood objectives: fine-tuning, gradient ascent, GradDiff (and KL-min), IDK."""

from collections.abc import Mapping

from jaxlib_unlearn import losses
from jaxlib_unlearn.objectives.base import (
    MEAN_OF_MEANS,
    SHARED_COMPAT,
    Batch,
    Compat,
    Objective,
    ObjectiveConfig,
    Policy,
    Terms,
    nll_term,
    retain_terms,
)

QA = ("question", "answer")


def fine_tune(policy: Policy, batches: Mapping[str, Batch], options: ObjectiveConfig) -> Terms:
    """``L = NLL(train)``."""
    del options
    return {"train": nll_term(policy, batches["train"])}


def ascent(policy: Policy, batches: Mapping[str, Batch], options: ObjectiveConfig) -> Terms:
    """``L = -NLL(forget)``."""
    del options
    return {"forget": losses.negate(nll_term(policy, batches["forget"]))}


def graddiff(policy: Policy, batches: Mapping[str, Batch], options: ObjectiveConfig) -> Terms:
    """``L = -f NLL(forget) + r R(retain)``; R is NLL (GradDiff) or KL (KL-min)."""
    return ascent(policy, batches, options) | retain_terms(policy, batches, options)


def idk(policy: Policy, batches: Mapping[str, Batch], options: ObjectiveConfig) -> Terms:
    """``L = f NLL(refusal) + r R(retain)``, or one token mean over both (``tofu_concat``)."""
    refusal = nll_term(policy, batches["idk"])
    retain = retain_terms(policy, batches, options)
    if options.compat == "tofu_concat":
        return {"forget": losses.merge_terms(refusal, *retain.values())}
    return {"forget": refusal} | retain


ROWS = (
    Objective(
        name="nll",
        loss=fine_tune,
        streams=("train",),
        columns={"train": QA},
        reference={},
        forward={},
        additive=True,
        paper="-",
        defaults={},
        summary="plain fine-tuning on one stream",
        compat=MEAN_OF_MEANS,
    ),
    Objective(
        name="ga",
        loss=ascent,
        streams=("forget",),
        columns={"forget": QA},
        reference={},
        forward={},
        additive=True,
        paper="Jang et al. 2022, arXiv 2210.01504",
        defaults={"forget_weight": 1.0},
        summary="gradient ascent on forget answers; diverges if left alone",
        compat=MEAN_OF_MEANS,
    ),
    Objective(
        name="graddiff",
        loss=graddiff,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={},
        forward={},
        additive=True,
        paper="Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024, arXiv 2401.06121",
        defaults={"retain": "nll", "forget_weight": 1.0, "retain_weight": 1.0},
        summary="gradient ascent plus a retain loss (KL-min with retain=kl)",
        compat=SHARED_COMPAT,
    ),
    Objective(
        name="idk",
        loss=idk,
        streams=("idk", "retain"),
        columns={"idk": ("question",), "retain": QA},
        reference={},
        forward={},
        additive=True,
        paper="Maini et al. 2024, arXiv 2401.06121",
        defaults={"retain": "nll", "forget_weight": 1.0, "retain_weight": 1.0},
        summary="learn to answer forget questions with a refusal",
        compat={
            "tofu_concat": Compat(
                "one token mean over refusals and retain answers",
                additive=True,
                drops=("retain", "retain_weight"),
            ),
            **SHARED_COMPAT,
        },
    ),
)
