"""Directional derivatives from values of the loss: forward and central differences, or exact ones.

Nothing here depends on parameters: a function gives the loss at a step along a direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.arrays import concrete

ESTIMATORS = ("forward", "central", "jvp")


class Estimate(NamedTuple):
    """Values of one step: the loss, the coefficients and (on request) curvatures, ``(q,)``."""

    value: jax.Array
    coeffs: jax.Array
    curvatures: jax.Array | None = None


def estimate(
    loss_at: Callable[[Any, Any, Any], jax.Array],
    num_queries: int,
    eps: jax.typing.ArrayLike,
    *,
    estimator: str = "central",
    context: Any = None,
    value: jax.Array | None = None,
    curvature: bool = False,
    query_batch: int | None = None,
    query_axis: str | None = None,
    dtype: Any = jnp.float32,
) -> Estimate:
    r"""The value of the loss and its directional derivatives along q directions.

    Args:
        loss_at: A function ``(context, query, offset) -> ()``, the loss at :math:`\theta + offset
            Z_{query}`; at :math:`\theta` itself for query and offset None.
        num_queries: The number q of directions.
        eps: The step epsilon along a direction.
        estimator: The estimator: "forward" (q + 1 evaluations), "central" (2 q), or "jvp" (q
            forward-mode derivatives: the limit eps -> 0, free of rounding).
        context: The context that ``loss_at`` receives, a tree of arrays.
        value: The loss at theta, if the caller has it.
        curvature: True to return :math:`|f_+ + f_- - 2 f_0| / (2 \epsilon^2)` as well; "central"
            only.
        query_batch: The number of evaluations at a time; None for one.
        query_axis: The mesh axis over which evaluations are split; only scalars cross it.
        dtype: The dtype of the offsets.

    Returns:
        The estimate, at least float32. Without a baseline "central" reports the mean of its values.

    Raises:
        ValueError: an unknown estimator, a loss that is not a scalar, or an axis that does not
            divide the evaluations.
        TypeError: a 16-bit loss (or ``value``) where differences are needed.

    Example:
        >>> import jax.numpy as jnp
        >>> z = jnp.array([1.0, 2.0])
        >>> def loss_at(context, query, offset):
        ...     return 3.0 * (0.0 if query is None else offset * z[query])
        >>> value, coeffs, _ = estimate(loss_at, 2, 0.5, estimator="forward")
        >>> float(value), coeffs.tolist()
        (0.0, [3.0, 6.0])
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is one of {ESTIMATORS}, got {estimator!r}")
    if curvature and estimator != "central":
        raise ValueError(f"curvatures need the estimator 'central', got {estimator!r}")
    eps = jnp.asarray(eps, dtype)

    def loss(context, query, offset):
        out = jnp.asarray(loss_at(context, query, offset))
        if out.shape != ():
            raise ValueError(f"the loss must be a scalar, got shape {out.shape}")
        _check_width("value_fn returned", out, estimator)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))

    def slope(context, job):
        zero = jnp.zeros((), dtype)
        return jax.jvp(lambda s: loss(context, job[0], s), (zero,), (jnp.ones_like(zero),))

    def run(fn, jobs):
        return _map_jobs(fn, context, jobs, query_batch, query_axis)

    if value is not None:
        _check_width("value has dtype", jnp.asarray(value), estimator)
    queries = jnp.arange(num_queries, dtype=jnp.int32)
    if value is None and (estimator == "forward" or curvature):
        value = loss(context, None, None)
    if estimator == "jvp":
        values, coeffs = run(slope, (queries,))
        return Estimate(values[0] if value is None else jnp.asarray(value), coeffs)
    offsets = jnp.stack([eps, -eps]) if estimator == "central" else eps[None]
    sides = len(offsets)
    jobs = (jnp.repeat(queries, sides), jnp.tile(offsets, num_queries))
    values = run(lambda context, job: loss(context, *job), jobs).reshape(num_queries, sides)
    if estimator == "forward":
        value = jnp.asarray(value)
        return Estimate(value, (values[:, 0] - value) / eps)
    coeffs = (values[:, 0] - values[:, 1]) / (2 * eps)
    if curvature:
        value = jnp.asarray(value)
        bend = jnp.abs(values[:, 0] + values[:, 1] - 2 * value) / (2 * jnp.square(eps))
        return Estimate(value, coeffs, bend)
    return Estimate(jnp.mean(values) if value is None else jnp.asarray(value), coeffs)


def _check_width(what: str, loss: jax.Array, estimator: str) -> None:
    if estimator != "jvp" and loss.dtype.itemsize < 4:
        raise TypeError(
            f"{what} {loss.dtype.name}: the difference of two such losses is rounded to 0 or to "
            "noise; sum the loss in float32 (logits.astype(float32) before the cross-entropy, not "
            'the scalar afterwards), or use estimator="jvp"'
        )


def _map_jobs(fn, context, jobs, batch: int | None, axis: str | None):
    """``fn(context, job)`` for every job; with an axis, every device along it takes its share."""

    def local(context, jobs):
        return jax.lax.map(lambda job: fn(context, job), jobs, batch_size=batch)

    if axis is None and concrete(context, jobs):
        count = jax.tree.leaves(jobs)[0].shape[0]
        found = [fn(context, jax.tree.map(lambda x, i=i: x[i], jobs)) for i in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *found)
    if axis is None:
        return local(context, jobs)
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(context[0])]
    mesh = next((m for m in meshes if axis in m.axis_names), None)
    count = jax.tree.leaves(jobs)[0].shape[0]
    if mesh is None or count % mesh.shape[axis]:
        where = "no mesh" if mesh is None else f"{dict(mesh.shape)}"
        raise ValueError(
            f"query_axis={axis!r}: {count} evaluations do not divide over it; the parameters are "
            f"on {where}"
        )

    def share(context, jobs):
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), local(context, jobs))

    mapped = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(P(), P(axis)),
        out_specs=P(),
        axis_names={axis},
        check_vma=False,
    )
    return jax.jit(mapped)(context, jobs)  # eager shard_map does not support a partly manual mesh
