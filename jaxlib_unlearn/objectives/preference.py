"""Preference objectives: NPO, SimNPO, DPO against refusals."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxlib_unlearn import losses
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.base import (
    Compat,
    Objective,
    Options,
    Terms,
    forms,
    named,
    weight,
)
from jaxlib_unlearn.objectives.context import Batch, Context, frozen
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.objectives.retain import (
    SHARED_COMPAT,
    Sided,
    retain_terms,
)
from jaxlib_unlearn.options import option

_NPO_COMPAT = {
    "batch_mean": Compat("log-sigmoid of the batch mean (BLUR)", additive=False),
    "token_mean": Compat("of the token-mean log-ratio (WMDP code)", additive=False),
    "raw_logits": Compat(
        "on raw logits at the labels (MUSE)", additive=True, reference={"forget": "hidden"}
    ),
    **SHARED_COMPAT,
}
_SIMNPO_COMPAT = {
    "token_mean": Compat("log-sigmoid of the batch's token mean (WMDP)", additive=False),
    "raw_logits": Compat("on raw logits at the labels (MUSE)", additive=True),
    **SHARED_COMPAT,
}
_DPO_COMPAT = {
    "no_factor": Compat("without the factor 2/beta (TOFU)", additive=True),
    **SHARED_COMPAT,
}


def inverse_temperature(default: float) -> Any:
    """The field ``beta`` of a row's options."""
    return option(default, "The inverse temperature of the log-sigmoid.", above=0)


def margin(default: float) -> Any:
    """The field ``delta`` of a row's options."""
    return option(default, "The margin of SimNPO's loss in nats per token.")


def pushes(default: float) -> Any:
    """The field ``push`` of a row's options."""
    doc = "SimNPO's loss is added this many times on the forget side; 0: it is not."
    return option(default, doc, low=0, wanted="0 or more")


@dataclasses.dataclass(frozen=True)
class NPO(Sided):
    """Options of ``npo``."""

    name: str = named("npo")
    compat: str | None = forms(_NPO_COMPAT)
    beta: float = inverse_temperature(0.1)


@dataclasses.dataclass(frozen=True)
class SimNPO(Sided):
    """Options of ``simnpo``: the authors' TOFU forget10 setting.

    What they call gamma multiplies the forget loss.
    """

    name: str = named("simnpo")
    compat: str | None = forms(_SIMNPO_COMPAT)
    forget_weight: float = weight("forget", 0.125)
    beta: float = inverse_temperature(4.5)
    delta: float = margin(0.0)


@dataclasses.dataclass(frozen=True)
class DPO(Sided):
    """Options of ``dpo``."""

    name: str = named("dpo")
    compat: str | None = forms(_DPO_COMPAT)
    beta: float = inverse_temperature(0.1)


@dataclasses.dataclass(frozen=True)
class Pushed:
    """Options of a row that adds SimNPO's loss to its own; the class goes before :class:`Sided`."""

    push: float = pushes(0.0)
    beta: float = inverse_temperature(1.0)
    delta: float = margin(-0.25)
    spare_end: int = option(
        0,
        "This many labels at the end of an answer are not pushed down (a full stop, the end of the "
        "turn): a model that unlearns them no longer stops.",
        low=0,
    )


def _sums(context: Context, batch: Batch) -> jax.Array:
    return losses.row_sums(context.model.log_probs(batch), batch["target_mask"])


def _ref_sums(context: Context, batch: Batch) -> jax.Array:
    return losses.row_sums(frozen(context).log_probs(batch), batch["target_mask"])


def _own(options: Options) -> str | None:
    """The compat form where it is one of the forget loss."""
    return None if options.compat in SHARED_COMPAT else options.compat


def npo(context: Context, batches: Mapping[str, Batch], options: NPO) -> Terms:
    """``L = f NPO(forget) + r R(retain)``."""
    batch, beta = batches["forget"], options.beta
    mask = batch["target_mask"]
    if options.compat == "raw_logits":
        values = context.compare(batch, lambda z, ref, _: losses.npo_raw_logits(z, ref, beta=beta))
        forget = losses.masked_sum(values, mask)
    else:
        sums = _sums(context, batch)
        forget = losses.npo(
            sums,
            _ref_sums(context, batch),
            losses.labelled_rows(mask),
            beta=beta,
            compat=_own(options),
            lengths=losses.row_lengths(mask, sums.dtype),
        )
    return {"forget": forget} | retain_terms(context, batches, options)


def push_term(log_probs: jax.Array, mask: jax.Array, options: Pushed) -> Term:
    """``options.push`` times SimNPO's loss on all labels but the last ``options.spare_end``.

    Args:
        log_probs: ``(B, W)`` of the labels, in nats.
        mask: ``(B, W)``, positive at labels.
        options: the options of the row.
    """
    mask = losses.without_last(mask, options.spare_end) if options.spare_end else mask
    total, rows = _simnpo(losses.row_sums(log_probs, mask), mask, options, None)
    return options.push * total, rows


def _simnpo(sums: jax.Array, mask: jax.Array, options: SimNPO | Pushed, compat: str | None) -> Term:
    return losses.simnpo(
        sums,
        losses.row_lengths(mask, sums.dtype),
        losses.labelled_rows(mask),
        beta=options.beta,
        delta=options.delta,
        compat=compat,
    )


def simnpo(context: Context, batches: Mapping[str, Batch], options: SimNPO) -> Terms:
    """``L = f SimNPO(forget) + r R(retain)``."""
    batch = batches["forget"]
    if options.compat == "raw_logits":
        beta, delta = options.beta, options.delta
        values = context.model.reduce_logits(
            batch, lambda z, _: losses.simnpo_raw_logits(z, beta=beta, delta=delta)
        )
        forget = losses.masked_sum(values, batch["target_mask"])
    else:
        forget = _simnpo(_sums(context, batch), batch["target_mask"], options, _own(options))
    return {"forget": forget} | retain_terms(context, batches, options)


def dpo_between(context: Context, chosen: Batch, rejected: Batch, options: DPO) -> Term:
    """DPO's loss over two streams whose rows are paired by position."""
    # A pair needs both sides: a row padded in one stream does not count.
    both = losses.labelled_rows(chosen["target_mask"]) & losses.labelled_rows(
        rejected["target_mask"]
    )
    return losses.dpo(
        _sums(context, chosen),
        _sums(context, rejected),
        _ref_sums(context, chosen),
        _ref_sums(context, rejected),
        both,
        beta=options.beta,
        compat=_own(options),
    )


def dpo(context: Context, batches: Mapping[str, Batch], options: DPO) -> Terms:
    """``L = f DPO(refusal over forget answer) + r R(retain)``."""
    forget = dpo_between(context, batches["idk"], batches["forget"], options)
    return {"forget": forget} | retain_terms(context, batches, options)


ROWS = (
    Objective(
        name="npo",
        loss=npo,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={"forget": "logps"},
        forward={},
        additive=True,
        paper="Zhang et al. 2024, arXiv 2404.05868",
        options=NPO,
        summary="negative preference: gradient ascent that stops at what is forgotten",
        compat=_NPO_COMPAT,
    ),
    Objective(
        name="simnpo",
        loss=simnpo,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={},
        forward={},
        additive=True,
        paper="Fan et al. 2024, arXiv 2410.07163",
        options=SimNPO,
        summary="NPO without a reference model, normalised by length",
        compat=_SIMNPO_COMPAT,
    ),
    Objective(
        name="dpo",
        loss=dpo,
        streams=("forget", "idk", "retain"),
        columns={"forget": QA, "idk": ("question",), "retain": QA},
        reference={"forget": "logps", "idk": "logps"},
        forward={},
        additive=True,
        paper="Rafailov et al. 2023, arXiv 2305.18290; Zhang et al. 2024, arXiv 2404.05868",
        options=DPO,
        summary="prefer a refusal to the forget answer",
        compat=_DPO_COMPAT,
    ),
)
