r"""RMU: hidden states of forget texts are moved to a random direction, those of others are kept.

With :math:`h_l` the residual stream after block l, u a random unit vector with no negative entry,
which is drawn once, and :math:`h^0` the frozen model's:

.. math::
    L = f \, E \, \lVert h_l(x_f) - c u \rVert^2 / d
      + r \, E \, \lVert h_l(x_r) - h^0_l(x_r) \rVert^2 / d

Published runs train ``mlp/down`` of the blocks l - 2, l - 1 and l alone. Nothing above block l is
computed, and the frozen model shares all blocks below the first trained one. Where all parameters
are trained, it is a second copy of the whole model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlib_unlearn import losses
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.base import (
    SHARED_COMPAT,
    Compat,
    Objective,
    Options,
    Terms,
    at_every_slot,
    forms,
    named,
    retain_terms,
    weight,
)
from jaxlib_unlearn.objectives.context import HIDDEN, Batch, Context, frozen
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.options import option

_COMPAT = {
    "every_slot": Compat(
        "means over all positions, prompt and padding too (WMDP's code)",
        additive=False,
        drops=("positions",),
    ),
    "batch_lengths": Compat(
        "mean of the rows' sums times the mean of 1 / lengths (OpenUnlearning)", additive=False
    ),
    **SHARED_COMPAT,
}


@dataclasses.dataclass(frozen=True)
class RMU(Options):
    """Options of ``rmu``: layer, steering and retain weight as in the paper for Zephyr-7B."""

    name: str = named("rmu")
    compat: str | None = forms(_COMPAT)
    layer: int = option(7, "the block whose output is moved.", low=0)
    steering: float = option(6.5, "c, the length of the vector that it is moved to.", above=0)
    positions: Literal["answer", "all"] = option(
        "answer", "tokens that count: those of the answer, or all.", choices=("answer", "all")
    )
    retain: Literal["hidden", "nll", "kl", "none"] = option(
        "hidden",
        "loss on the retain stream; hidden: the distance to the frozen model's hidden states.",
        choices=("hidden", "nll", "kl", "none"),
    )
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1200.0)


def direction(key: jax.Array, options: RMU, sizes: Mapping[str, int]) -> dict[str, jax.Array]:
    """The row's state: ``{"direction": (d,)}``, uniform draws from [0, 1) of norm 1.

    Example:
        >>> u = direction(jax.random.key(0), RMU(), {"hidden": 8})["direction"]
        >>> bool(u.min() >= 0), round(float(jnp.linalg.norm(u)), 4)
        (True, 1.0)
    """
    del options
    draw = jax.random.uniform(key, (sizes["hidden"],))
    return {"direction": draw / jnp.linalg.norm(draw)}


def _distance(hidden: jax.Array, mask: jax.Array, target: Any, batch: Batch, options: RMU) -> Term:
    values = losses.squared_error(hidden, target)
    if options.compat == "every_slot":
        return losses.masked_sum(values)
    if options.positions == "answer":
        mask = answer_mask(batch, mask)
    else:  # rows without a label are padding
        mask = mask * losses.labelled_rows(batch["target_mask"])[:, None]
    if options.compat == "batch_lengths":
        sums, lengths = losses.row_sums(values, mask), losses.row_lengths(mask, values.dtype)
        rows = losses.labelled_rows(mask)
        inverse = jnp.where(rows, 1 / jnp.maximum(lengths, 1), 0)
        count = jnp.sum(rows.astype(values.dtype))
        return jnp.sum(sums) * jnp.sum(inverse) / jnp.maximum(count, 1), count
    return losses.sequence_mean(values, mask)


def answer_mask(batch: Batch, mask: jax.Array) -> jax.Array:
    """Where the tokens of the answer are, ``(B, T)``: one behind the slots that predict them.

    Example:
        >>> batch = {"label_index": jnp.array([[1, 2, 0]]), "target_mask": jnp.array([[1, 1, 0]])}
        >>> answer_mask(batch, jnp.ones((1, 5))).tolist()
        [[0.0, 0.0, 1.0, 1.0, 0.0]]
    """
    labels = jnp.asarray(batch["target_mask"], jnp.float32)
    rows = jnp.arange(labels.shape[0])[:, None]
    found = jnp.zeros(mask.shape, jnp.float32)
    return found.at[rows, jnp.asarray(batch["label_index"]) + 1].max(labels, mode="drop")


def rmu(context: Context, batches: Mapping[str, Batch], options: RMU) -> Terms:
    """``L = f |h_l(forget) - c u|^2 + r |h_l(retain) - h0_l(retain)|^2``, means over channels."""
    target = options.steering * context.state["direction"]
    terms = {"forget": _moved(context, batches["forget"], target, options)}
    if options.retain != "hidden":
        return terms | retain_terms(context, batches, options)
    return terms | {"retain": _moved(context, batches["retain"], None, options)}


def _moved(context: Context, batch: Batch, target: Any, options: RMU) -> Term:
    """The distance of a stream's hidden states to a vector, or (None) to the frozen model's."""
    if options.compat == "every_slot":
        batch = at_every_slot(batch)
    hidden, mask = context.model.hidden(batch, options.layer)
    if target is None:
        target, _ = frozen(context).hidden(batch, options.layer)
    return _distance(hidden, mask, target, batch, options)


def _references(options: RMU) -> dict[str, str | None]:
    return {} if options.retain == "hidden" else {"retain": None}


ROWS = (
    Objective(
        name="rmu",
        loss=rmu,
        streams=("forget", "retain"),
        columns={"forget": QA, "retain": QA},
        reference={"retain": "fork"},
        forward={},
        additive=True,
        paper="Li et al. 2024, arXiv 2403.03218",
        options=RMU,
        summary="move hidden states of the forget texts to a random direction",
        compat=_COMPAT,
        also_cached=_references,
        asks={"forget": (HIDDEN,), "retain": (HIDDEN,)},
        blocks=lambda options: (options.layer,),
        init_state=direction,
    ),
)
