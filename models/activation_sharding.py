"""Sharding of activations in the forward pass: batch axes, padding over tp, embedding lookup.

The parameters' partition specs alone do not fix the layout of activations, and the partitioner's
own choice may be an expensive one. The mesh is read from the type of an array, so the same code
runs with and without a mesh, and inside a `shard_map` over other axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored


def _batch_axes(like: jax.Array) -> tuple[Any, tuple[str, ...]]:
    """The mesh of `like`, and its Auto axes over which the batch is split.

    An axis may be Manual as well: a zeroth-order step evaluates the loss inside a `shard_map`.
    """
    mesh: Any = jax.typeof(like).sharding.mesh
    return mesh, tuple(a for a in ("data", "fsdp") if _auto_size(mesh, a) > 1)


def _auto_size(mesh: Any, axis: str) -> int:
    """The size of an Auto axis of the mesh; 1 if the axis is of another type or missing."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if types.get(axis) == AxisType.Auto else 1


def batch_sharded(x: jax.Array, like: jax.Array, axis: int = 0, whole: bool = True) -> jax.Array:
    """`x` with one axis sharded over the batch axes (`data`, `fsdp`) of a mesh.

    Without the constraint the partitioner may carry the embedding table's sharding into the
    activations and rematerialise them.

    Args:
        x: an activation, of any shape.
        like: an array on the mesh; without a mesh `x` is returned unchanged.
        axis: the axis of `x` that is the batch.
        whole: whether the other axes stay whole; if False, the partitioner decides.

    Returns:
        `x` under the constraint.
    """
    mesh, axes = _batch_axes(like)
    if not axes:
        return x
    rest = None if whole else P.UNCONSTRAINED
    spec = P(*[rest] * axis, axes, *[rest] * (x.ndim - 1 - axis))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_ways(like: jax.Array) -> int:
    """The number of shards of a batch on the mesh of `like`; 1 without a mesh."""
    mesh, axes = _batch_axes(like)
    return math.prod(mesh.shape[a] for a in axes)


def tensor_ways(like: jax.Array) -> int:
    """The number of tensor-parallel shards on the mesh of `like`; 1 without a mesh."""
    return _auto_size(jax.typeof(like).sharding.mesh, "tp")


def padded_over_tp(x: jax.Array, axis: int) -> jax.Array:
    """`x` with an axis that `tp` does not divide zero-padded to the next multiple and sharded.

    An axis that divides evenly is returned unchanged. The padding exists inside the program only:
    parameters are not padded, so optimizers, files and random perturbations do not see it.

    Args:
        x: an array of any shape.
        axis: the axis to pad.

    Returns:
        `x`, the axis possibly longer; the caller slices the result of its product.
    """
    missing = -x.shape[axis] % tensor_ways(x)
    if not missing:
        return x
    mesh: Any = jax.typeof(x).sharding.mesh
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    spec = P(*["tp" if i == axis else P.UNCONSTRAINED for i in range(x.ndim)])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def lookup(table: jax.Array | Factored, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Embedding lookup, `table[tokens]`.

    With fsdp each device looks up all tokens in its columns of the table, and one all-to-all turns
    shards of columns into shards of the batch. The partitioner by itself would gather the table
    (and all-reduce a gradient of that size) or copy the whole batch to every device.

    Args:
        table: embeddings `(V, d)`, or a `Factored` table.
        tokens: int32 `(B, T)`.
        dtype: the dtype of the result; the gradient is summed in the table's dtype.

    Returns:
        `(B, T, d)`, sharded over the batch axes.

    Example:
        >>> lookup(jnp.eye(3), jnp.array([[2, 0]]), jnp.float32).tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    if isinstance(table, Factored):
        term = table.left[tokens].astype(dtype) @ table.right.astype(dtype).T
        return lookup(table.kernel, tokens, dtype) + term
    mesh, axes = _batch_axes(table)
    columns = [a for a in axes if a == "fsdp" and table.shape[1] % mesh.shape[a] == 0]
    if not columns:
        return batch_sharded(table[tokens].astype(dtype), table)
    rows = tuple(a for a in axes if a not in columns)
    open_ = P.UNCONSTRAINED

    def at(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    table = at(table, open_, tuple(columns))
    x = at(table[at(tokens, rows, None)].astype(dtype), rows, None, tuple(columns))
    return batch_sharded(x, table)
