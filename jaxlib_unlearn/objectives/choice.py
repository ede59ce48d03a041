"""Learning to choose: rows with options of which one is right, or classes for all rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlib_unlearn import losses
from jaxlib_unlearn.objectives.base import Objective, Options, Terms, named
from jaxlib_unlearn.objectives.context import Batch, Context


@dataclasses.dataclass(frozen=True)
class Choice(Options):
    """Options of ``choice``."""

    name: str = named("choice")


def choose(context: Context, batches: Mapping[str, Batch], options: Choice) -> Terms:
    """``L = mean_b (log sum_k exp s_bk - s_b,gold)``, s the mean log-probability of an option.

    A batch has, beside its labels, ``answer (B, W)``, the option that a label belongs to,
    ``options (B, K)``, those that a row has, and ``gold (B,)``, the right one.
    """
    del options
    batch = batches["train"]
    log_probs = context.model.log_probs(batch)
    scores = losses.option_scores(log_probs, batch["answer"], batch["options"].shape[1])
    return {"train": losses.choice(scores, batch["options"], batch["gold"])}


@dataclasses.dataclass(frozen=True)
class Classes(Options):
    """Options of ``classes``."""

    name: str = named("classes")


def classify(context: Context, batches: Mapping[str, Batch], options: Classes) -> Terms:
    """``L = mean_b (log sum_k exp z_bk - z_b,gold)``, z the logits of the classes.

    A batch has, beside what the model reads, ``gold (B,)``, the right class. The model is one that
    answers ``classes(batch)``, float32 ``(B, K)``.
    """
    del options
    batch = batches["train"]
    model: Any = context.model
    logits = model.classes(batch)
    return {"train": losses.choice(logits, jnp.ones_like(logits), batch["gold"])}


ROWS = (
    Objective(
        name="choice",
        loss=choose,
        streams=("train",),
        columns={"train": ("prompt", "options", "gold")},
        reference={},
        forward={},
        additive=True,
        paper="Malladi et al. 2023, arXiv 2305.17333",
        options=Choice,
        summary="cross-entropy over the mean log-probabilities of a row's options",
    ),
    Objective(
        name="classes",
        loss=classify,
        streams=("train",),
        columns={"train": ("image", "gold")},
        reference={},
        forward={},
        additive=True,
        paper="-",
        options=Classes,
        summary="cross-entropy over the classes of a model that has a logit for each",
        asks={"train": ("classes",)},
    ),
)
