r"""Denoisers that learn images with their captions, or forget a concept.

A batch holds noisy latents ``x``, their times, the noise ``e`` that was added and the token ids of
a prompt ``c``; all of it is drawn by the stream. A model answers ``noise(batch, *prompts)``: the
noise that it sees in the latents, ``(B, ..)``, given each of the prompts, which are columns of the
batch; several in one pass. Errors are means over the entries of a row, and sums over rows.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.losses.representation import squared_error
from jaxlib_unlearn.objectives.base import Objective, Options, Terms, named, weight
from jaxlib_unlearn.objectives.context import Batch, Context, frozen
from jaxlib_unlearn.options import option

NOISE = "noise"  # the question
PROMPT, OTHER = "tokens", "other_tokens"  # columns: the prompt, and the one it is compared with
_COLUMNS = ("latents", "time", "noise", PROMPT)


@dataclasses.dataclass(frozen=True)
class Denoise(Options):
    """Options of ``denoise``."""

    name: str = named("denoise")


@dataclasses.dataclass(frozen=True)
class Erasing(Options):
    """The options that all rows share that erase a concept."""

    keep: Literal["denoise", "frozen", "none"] = option(
        "denoise",
        "The loss on the retain stream: the error against the noise that was added (`denoise`), "
        "the error against the frozen model's prediction (`frozen`), or none.",
        choices=("denoise", "frozen", "none"),
    )
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1.0)


@dataclasses.dataclass(frozen=True)
class ESD(Erasing):
    """Options of ``esd``."""

    name: str = named("esd")
    guidance: float = option(
        1.0, "eta: the noise is moved so far away from the concept; 1 and 2 are published.",
        low=0, wanted="0 or more",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Redirect(Erasing):
    """Options of ``redirect``."""

    name: str = named("redirect")


def denoise(context: Context, batches: Mapping[str, Batch], options: Denoise) -> Terms:
    r"""Learn to see the noise: :math:`L = E \lVert e - e_\theta(x, t, c) \rVert^2 / n`."""
    del options
    batch = batches["train"]
    return {"train": _error(_noise(context.model, batch)[0], batch["noise"])}


def esd(context: Context, batches: Mapping[str, Batch], options: ESD) -> Terms:
    r"""Erased stable diffusion: the concept's prompt is led away from itself.

    .. math::
        L_f = E \lVert e_\theta(x, t, c) - [e_0(x, t, c) - \eta\, (e_0(x, t, c)
        - e_0(x, t, c'))] \rVert^2 / n

    with :math:`e_0` the frozen model and :math:`c'` the empty prompt, in ``other_tokens``.
    """
    batch = batches["forget"]
    asked, plain = _noise(frozen(context), batch, PROMPT, OTHER)
    target = asked - options.guidance * (asked - plain)
    forget = _error(_noise(context.model, batch)[0], target)
    return {"forget": forget} | _kept(context, batches, options)


def redirect(context: Context, batches: Mapping[str, Batch], options: Redirect) -> Terms:
    r"""The concept's prompt is denoised as another one is.

    .. math::
        L_f = E \lVert e_\theta(x, t, c) - e_0(x, t, c') \rVert^2 / n

    with :math:`c'` the prompt of another concept, in ``other_tokens``.
    """
    batch = batches["forget"]
    (target,) = _noise(frozen(context), batch, OTHER)
    forget = _error(_noise(context.model, batch)[0], target)
    return {"forget": forget} | _kept(context, batches, options)


def _kept(context: Context, batches: Mapping[str, Batch], options: Erasing) -> Terms:
    """The term of the retain side; none where the options leave it out."""
    if options.keep == "none":
        return {}
    batch = batches["retain"]
    target = batch["noise"] if options.keep == "denoise" else _noise(frozen(context), batch)[0]
    return {"retain": _error(_noise(context.model, batch)[0], target)}


def _noise(model: Any, batch: Batch, *prompts: str) -> tuple[Any, ...]:
    """The answers to each of the prompts; without one, to the batch's own."""
    return model.noise(batch, *(prompts or (PROMPT,)))


def _error(found: Any, target: Any) -> Term:
    """The sum over rows of the mean squared error, and how many rows there are."""
    rows = len(found)
    entries = (rows, 1, math.prod(found.shape[1:]))
    errors = squared_error(found.reshape(entries), jnp.reshape(target, entries))
    return jnp.sum(errors), jnp.asarray(rows, jnp.float32)


def _adapt(row: Objective, options: Erasing) -> Objective:
    """The row without its retain stream, or with the frozen model asked of it."""
    if options.keep == "none":
        return dataclasses.replace(row, streams=("forget",))
    if options.keep == "frozen":
        return dataclasses.replace(row, reference={**row.reference, "retain": "fork"})
    return row


def _erasing(name: str, loss: Any, options: type[Erasing], paper: str, summary: str) -> Objective:
    """A row that erases, with the frozen model asked of the forget stream in the step."""
    return Objective(
        name=name,
        loss=loss,
        streams=("forget", "retain"),
        columns={"forget": (*_COLUMNS, OTHER), "retain": _COLUMNS},
        reference={"forget": "fork"},
        forward={},
        additive=True,
        paper=paper,
        options=options,
        summary=summary,
        asks={"forget": (NOISE,), "retain": (NOISE,)},
        adapt=_adapt,
    )


ROWS = (
    Objective(
        name="denoise",
        loss=denoise,
        streams=("train",),
        columns={"train": _COLUMNS},
        reference={},
        forward={},
        additive=True,
        paper="Ho et al. 2020, arXiv 2006.11239",
        options=Denoise,
        summary="mean squared error of the noise that a denoiser sees",
        asks={"train": (NOISE,)},
    ),
    _erasing(
        "esd",
        esd,
        ESD,
        "Gandikota et al. 2023, arXiv 2303.07345",
        "noise of a concept's prompt led away from it",
    ),
    _erasing(
        "redirect",
        redirect,
        Redirect,
        "Kumari et al. 2023, arXiv 2303.13516",
        "noise of a concept's prompt as that of another prompt",
    ),
)
