"""Likelihood objectives: fine-tuning, gradient ascent, GradDiff (and KL-min), IDK."""

import dataclasses
from collections.abc import Mapping

from jaxlib_unlearn import losses
from jaxlib_unlearn.objectives.base import (
    Compat,
    Objective,
    Options,
    Terms,
    forms,
    named,
    weight,
)
from jaxlib_unlearn.objectives.context import Batch, Context
from jaxlib_unlearn.objectives.retain import (
    MEAN_OF_MEANS,
    SHARED_COMPAT,
    Sided,
    nll_term,
    retain_terms,
)

QA = ("question", "answer")
_IDK_COMPAT = {
    "tofu_concat": Compat(
        "one token mean over refusals and retain answers",
        additive=True,
        drops=("retain", "retain_weight"),
    ),
    **SHARED_COMPAT,
}


@dataclasses.dataclass(frozen=True)
class NLL(Options):
    """Options of ``nll``."""

    name: str = named("nll")
    compat: str | None = forms(MEAN_OF_MEANS)


@dataclasses.dataclass(frozen=True)
class GA(Options):
    """Options of ``ga``."""

    name: str = named("ga")
    compat: str | None = forms(MEAN_OF_MEANS)
    forget_weight: float = weight("forget", 1.0)


@dataclasses.dataclass(frozen=True)
class GradDiff(Sided):
    """Options of ``graddiff``."""

    name: str = named("graddiff")
    compat: str | None = forms(SHARED_COMPAT)


@dataclasses.dataclass(frozen=True)
class IDK(Sided):
    """Options of ``idk``."""

    name: str = named("idk")
    compat: str | None = forms(_IDK_COMPAT)


def fine_tune(context: Context, batches: Mapping[str, Batch], options: NLL) -> Terms:
    """``L = NLL(train)``."""
    del options
    return {"train": nll_term(context, batches["train"])}


def ascent(context: Context, batches: Mapping[str, Batch], options: Options) -> Terms:
    """``L = -NLL(forget)``."""
    del options
    return {"forget": losses.negate(nll_term(context, batches["forget"]))}


def graddiff(context: Context, batches: Mapping[str, Batch], options: GradDiff) -> Terms:
    """``L = -f NLL(forget) + r R(retain)``; R is NLL (GradDiff) or KL (KL-min)."""
    return ascent(context, batches, options) | retain_terms(context, batches, options)


def idk(context: Context, batches: Mapping[str, Batch], options: IDK) -> Terms:
    """``L = f NLL(refusal) + r R(retain)``, or one token mean over both (``tofu_concat``)."""
    refusal = nll_term(context, batches["idk"])
    retain = retain_terms(context, batches, options)
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
        options=NLL,
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
        options=GA,
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
        options=GradDiff,
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
        options=IDK,
        summary="learn to answer forget questions with a refusal",
        compat=_IDK_COMPAT,
    ),
)
