"""From the coefficients of a zeroth-order step to the update of every leaf."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.zeroth_order.directions import (
    draw_keys,
    gain,
    product_sum,
    walk,
    weighted_sums,
)
from jaxlib_unlearn.optim.zeroth_order.perturbations import fold, is_low_rank, lift
from jaxlib_unlearn.optim.zeroth_order.whole import whole


class Rule(NamedTuple):
    """An elementwise rule that turns the estimate of a leaf into a direction.

    Args:
        moments: The moments: name -> initial value.
        apply: A function ``(g, h, moments, count) -> (direction, moments)`` of the estimate g, the
            mean h of ``curvature_i Z_i^2`` (or None) and the number of this step, from 1.
        curvature: True if h is needed (one more evaluation of the loss per step).
    """

    moments: Mapping[str, float]
    apply: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    curvature: bool = False


def steps(
    family, plan, rule, reshape_core, draws, arrays, coeffs, curvatures, rates, weight_decay, count
) -> dict[int, Any]:
    """The update and the moments of every trainable leaf, by position, from the coefficients.

    The bits are the same on any mesh: low-rank directions are computed as a whole on every device
    (``zeroth_order.whole``), everything else is elementwise.
    """
    weights = coeffs / coeffs.shape[0]
    squares = None if curvatures is None else curvatures / coeffs.shape[0]
    if draws.scales is not None:
        weights = weights * draws.scales

    def on_all(leaf, fn):
        return whole(fn, arrays) if is_low_rank(family, leaf) else fn

    queries = jnp.arange(coeffs.shape[0], dtype=jnp.int32)
    keys = draw_keys(family, draws, fold(draws.key, queries))

    def sums(leaf, own, moments, square_weights):
        def regenerate(own, weights, square_weights):
            key, mask_key = own
            return weighted_sums(family, leaf, key, mask_key, moments, weights, square_weights)

        return on_all(leaf, regenerate)(own, weights, square_weights)

    def products(leaf):
        def regenerate(own, basis, weights):
            return product_sum(family, leaf, own[0], basis, weights)

        return regenerate

    cores: list[Any] = [()] * len(arrays)
    if reshape_core is not None:

        def mean_core(leaf, own, moments):
            if not is_low_rank(family, leaf):
                return ()
            return sums(leaf, own, moments, None)[0]

        means = walk(mean_core, plan, keys, (draws.moments,))
        picked = [i for i, mean in means.items() if not isinstance(mean, tuple)]
        reshape = whole(lambda found: _reshape_cores(reshape_core, found), arrays)
        shaped = reshape([means[i] for i in picked])
        for i, core in zip(picked, shaped, strict=True):
            cores[i] = (core,)

    def step(leaf, own, x, basis, moments, core):
        square = None
        if is_low_rank(family, leaf) and not family.linear:
            direction = on_all(leaf, products(leaf))(own, basis, weights)
        else:
            if core:
                first = core[0]
            else:
                first, square = sums(leaf, own, moments, squares)
            raised = on_all(leaf, lambda core, basis: lift(family, leaf, core, basis))
            direction = raised(first, basis)
        direction = direction * gain(family, leaf)
        if rule is not None:
            direction, new = rule.apply(direction, square, moments, count)
            moments = {name: new[name].astype(old.dtype) for name, old in moments.items()}
        rate = rates[1] if leaf.axes is None else rates[0]
        if rate is not None:
            if leaf.decayed:
                direction = direction + weight_decay * x.astype(direction.dtype)
            direction = -rate * direction
        return _like(direction.astype(x.dtype), x), moments

    return walk(step, plan, keys, (arrays, draws.bases, draws.moments, cores))


def _reshape_cores(fn: Orthogonalizer, cores: list[jax.Array]) -> list[jax.Array]:
    """``fn`` on all cores of one shape at once, rows <= columns.

    This does not use ``spectral.buckets``: every device holds all cores already, and they are
    small, so sharing the work on a mesh would cost more than it saves.
    """
    buckets: dict[Any, list[int]] = {}
    for i, core in enumerate(cores):
        buckets.setdefault((core.shape[-2:], core.dtype), []).append(i)
    out = list(cores)
    for ((rows, columns), _), members in buckets.items():
        batch = jnp.concatenate([cores[i].reshape(-1, rows, columns) for i in members])
        tall = rows > columns
        batch = fn(jnp.swapaxes(batch, 1, 2) if tall else batch)
        batch = jnp.swapaxes(batch, 1, 2) if tall else batch
        start = 0
        for i in members:
            end = start + cores[i].size // (rows * columns)
            out[i] = batch[start:end].reshape(cores[i].shape)
            start = end
    return out


def _like(update: jax.Array, x: jax.Array) -> jax.Array:
    """Ties an update to its parameter's sharding, which draws from a key do not have."""
    return update if jax.typeof(x).sharding.mesh.empty else jnp.where(x == x, update, x)
