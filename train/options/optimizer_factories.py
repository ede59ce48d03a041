"""Factories of optimizers that are not the library's own, or not alone, and the mask of decay."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import optax
import optax.contrib

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import matrices
from jaxlib_unlearn.optim.signatures import POSITIVE, Count, Decay, Dtype, Epsilon, Step
from models import layout
from train.runtime.sharding import path_str


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norm scales and biases."""

    def decays(path, _):
        return not path_str(path).endswith(("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: Epsilon = 1e-8,
    mu_dtype: Dtype = "float32",
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW, whose decay leaves out norms and biases.

    Args:
        b1: The decay of AdamW's first moment.
        b2: The decay of AdamW's second moment.
        eps: AdamW's epsilon.
        mu_dtype: The dtype of the first moment.
    """
    tx = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    return optim.keep_first_moments(tx, mu_dtype)


def optax_muon(
    learning_rate: optax.Schedule,
    *,
    beta: Decay = 0.95,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    eps: Epsilon = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """`optax.contrib.muon`, given the matrices: on its own it takes scanned ones for vectors.

    Args:
        beta: The decay of the momentum of the matrices.
        adam_b1: The decay of AdamW's first moment.
        adam_b2: The decay of AdamW's second moment.
        eps: AdamW's epsilon.
    """

    def dimensions(params: Any) -> Any:
        leaves = [
            None if axes is None else optax.contrib.MuonDimensionNumbers(axes.fan_in, axes.fan_out)
            for axes in matrices.resolve(params, layout.matrices)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        weight_decay=weight_decay,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        eps=eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )


def hybrid(
    learning_rate: optax.Schedule,
    *,
    period: Count = 20,
    zo_learning_rate: Annotated[optax.Schedule | float | None, POSITIVE] = None,
    num_queries: Count = 1,
    zo_eps: Step = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: Epsilon = 1e-8,
    mu_dtype: Dtype = "float32",
    weight_decay: float = 0.0,
    query_axis: str | None = None,
) -> optax.GradientTransformation:
    """AdamW and R-AdaZO in turn; both follow one schedule, although each counts its own steps.

    Args:
        period: The number of AdamW steps before as many zeroth-order ones, in turn.
        zo_learning_rate: The peak of the zeroth-order steps; None: `learning_rate`.
        num_queries: The number of perturbations of a zeroth-order step.
        zo_eps: The size of a perturbation.
        b1: The decay of AdamW's first moment.
        b2: The decay of AdamW's second moment.
        eps: AdamW's epsilon.
        mu_dtype: The dtype of the first moment.
    """

    def at(phase: int, rate: Any) -> optax.Schedule:
        def follow(count: Any) -> Any:
            return rate((2 * (count // period) + phase) * period + count % period)

        return follow

    first = adamw(
        at(0, learning_rate), b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype, weight_decay=weight_decay
    )
    zeroth = optim.rada_zo(
        at(1, learning_rate if zo_learning_rate is None else zo_learning_rate),
        num_queries=num_queries,
        eps=zo_eps,
        query_axis=query_axis,
        weight_decay=weight_decay,
    )
    return optim.alternate(first, zeroth, period)
