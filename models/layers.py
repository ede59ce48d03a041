"""The parts of a decoder block: RMSNorm, rotary positions, attention, gated MLP (Flax NNX).

The modules never leave this package: `models.decoder` splits one abstract block into a graph
definition and merges it with one layer's slice of the stacked parameters inside the scan body.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.zeroth_order.perturbations import matmul

LEAF_STRIDE = 65536  # segment id = group + LEAF_STRIDE * leaf
LINEAR = "linear"  # what a `Linear` returns, to policies of `jax.checkpoint`


class KeyValues(NamedTuple):
    """Keys and values `(R, S, K, D)`; R divides the rows B of queries and K their heads. With R = B
    each row has its own, otherwise B / R consecutive rows share one. `mask`: bool `(B, 1, T, S)`;
    `causal`: S = T, and no query sees a later key."""

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    causal: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary positions: `linear` (all by 1/factor) or `llama3` (low ones)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequency of each rotated pair, `theta^(-2i/head_dim)`, then scaled.

    Float32 `(head_dim // 2,)`.
    """
    freq = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind != "llama3":
        raise ValueError(f"rope scaling kind {scaling.kind!r} is not 'linear' or 'llama3'")
    wavelength = 2 * math.pi / freq
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * freq / scaling.factor + blend * freq
    return jnp.where(
        wavelength > low, freq / scaling.factor, jnp.where(wavelength < high, freq, between)
    )


def rotary(positions: jax.Array, freq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables `(B, T, 1, head_dim // 2)` of integer positions `(B, T)`."""
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `(B, T, H, D)`; the pairs are `(i, i + D/2)`, "rotate half" as in HF checkpoints."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x.dtype
    )


def visible(
    query: tuple[jax.Array, jax.Array, jax.Array],
    key: tuple[jax.Array, jax.Array, jax.Array],
    window: int | None,
) -> jax.Array:
    """Which key each query sees, bool `(B, 1, T, S)`.

    `query` and `key` are `(slots (T,), segment_ids (B, T), positions (B, T))`. A key is visible
    when it is at the query's slot or before, belongs to the same group, is not padding (segment 0),
    and is either in the group's shared prefix (leaf 0) or in the query's own leaf; with a sliding
    window also fewer than `window` positions back. A token in a negative segment sees what it would
    in the positive one, and no query sees it.
    """
    q_slot, q_segment, q_position = query
    k_slot, k_segment, k_position = key
    q_segment = jnp.abs(q_segment)
    q_group, q_leaf = q_segment % LEAF_STRIDE, q_segment // LEAF_STRIDE
    k_group, k_leaf = k_segment % LEAF_STRIDE, k_segment // LEAF_STRIDE
    mask = (k_slot[None, :] <= q_slot[:, None])[None]
    mask &= (q_group[:, :, None] == k_group[:, None, :]) & (k_segment[:, None, :] > 0)
    mask &= (k_leaf[:, None, :] == 0) | (k_leaf[:, None, :] == q_leaf[:, :, None])
    if window is not None:
        mask &= q_position[:, :, None] - k_position[:, None, :] < window
    return mask[:, None]


def _gathered(x: jax.Array, rows: int) -> jax.Array:
    """Rows that share keys joined into one: `(B, K, n, D)` to `(rows, K, B / rows n, D)`."""
    batch, groups, _, size = x.shape
    if rows == batch:
        return x
    x = x.reshape(rows, batch // rows, groups, -1, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows, groups, -1, size)


def _apart(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of `_gathered`."""
    rows, groups, _, size = x.shape
    if rows == batch:
        return x
    x = x.reshape(rows, groups, batch // rows, -1, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, groups, -1, size)


def attend(q: jax.Array, parts: Sequence[KeyValues], scale: float) -> jax.Array:
    """Grouped-query attention, `softmax(scale q k^T) v` over the visible keys.

    Two products per kv head, with the queries of its group as one long axis, and the sum of the
    exponentials divided out of the result: half the time of the general routine on a CPU, where the
    work between the products is memory-bound. Keys that several rows share (the prompt of many
    samples) are read once for all of them. Where keys are causal, queries go in blocks, each with
    the keys up to its end: with four blocks three eighths of the products are skipped.

    Args:
        q: `(B, T, H, D)`.
        parts: the keys, in any number of parts.
        scale: of the scores; they and the softmax are float32.

    Returns:
        `(B, T, H, D)` in the dtype of `q`. A query that sees no key gets the mean of all values
        that it is multiplied with.

    Example:
        >>> ones = jnp.ones((1, 2, 1, 4))
        >>> attend(ones, [KeyValues(ones, ones, jnp.ones((1, 1, 2, 2), bool))], 0.5).shape
        (1, 2, 1, 4)
    """
    if len(parts) == 1 and parts[0].causal:
        own = parts[0]
        some = [
            _attend(
                q[:, a:b], [KeyValues(own.k[:, :b], own.v[:, :b], own.mask[:, :, a:b, :b])], scale
            )
            for a, b in causal_blocks(q.shape[1])
        ]
        return some[0] if len(some) == 1 else jnp.concatenate(some, 1)
    return _attend(q, parts, scale)


def causal_blocks(length: int) -> list[tuple[int, int]]:
    """`(first, end)` of up to four blocks of about equal size, each of about 64 queries or more.

    Example:
        >>> causal_blocks(150)
        [(0, 80), (80, 150)]
    """
    count = min(max(length // 64, 1), 4)
    size = -(-length // (8 * count)) * 8
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _attend(q: jax.Array, parts: Sequence[KeyValues], scale: float) -> jax.Array:
    """`attend` of all queries at once."""
    batch, length, heads, size = q.shape
    groups = parts[0].k.shape[2]
    wide = q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    wide = wide.reshape(batch, groups, -1, size) * jnp.asarray(scale, q.dtype)
    if heads % tensor_ways(q):
        wide = padded_over_tp(wide, 1)
        parts = [p._replace(k=padded_over_tp(p.k, 2), v=padded_over_tp(p.v, 2)) for p in parts]
    count = wide.shape[1]
    scores = []
    for part in parts:
        k = part.k
        some = jnp.einsum(
            "bkmd,bskd->bkms", _gathered(wide, len(k)), k, preferred_element_type=jnp.float32
        )
        # Added, not selected: there is nothing to mask in the backward pass.
        hidden = jnp.where(part.mask, 0.0, -1e30)[:, :, None]
        some = _apart(some, batch).reshape(batch, count, -1, length, k.shape[1]) + hidden
        scores.append(some.reshape(batch, count, -1, k.shape[1]))
    tops = [jnp.max(some, -1, keepdims=True) for some in scores]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    found, total = [], []
    for some, part in zip(scores, parts, strict=True):
        weights, v = jnp.exp(some - top), part.v
        y = jnp.einsum(
            "bkms,bskd->bkmd",
            _gathered(weights.astype(v.dtype), len(v)),
            v,
            preferred_element_type=jnp.float32,
        )
        found.append(_apart(y, batch))
        total.append(jnp.sum(weights, -1, keepdims=True))
    y = functools.reduce(jnp.add, found) / functools.reduce(jnp.add, total)
    y = y[:, :groups].astype(q.dtype)
    y = y.reshape(batch, groups, -1, length, size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, heads, size)


def _batch_axes(like: jax.Array) -> tuple[Any, tuple[str, ...]]:
    """The mesh that `like` is on, and those of its axes that split the batch if they are Auto.

    Others may be Manual: a zeroth-order step's evaluations run inside a `shard_map` over queries.
    """
    mesh: Any = jax.typeof(like).sharding.mesh
    return mesh, tuple(a for a in ("data", "fsdp") if _auto_size(mesh, a) > 1)


def _auto_size(mesh: Any, axis: str) -> int:
    """The size of a mesh axis that the partitioner splits arrays over; 1 for others."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[axis] if types.get(axis) == AxisType.Auto else 1


def batch_sharded(x: jax.Array, like: jax.Array, axis: int = 0, whole: bool = True) -> jax.Array:
    """Constrain an axis (by default the first) to the batch axes of the mesh that `like` is on.

    The others stay whole, or (`whole=False`) as the partitioner finds best. Without the constraint
    the partitioner may carry a table's sharding into the activations and rematerialise.
    """
    mesh, axes = _batch_axes(like)
    if not axes:
        return x
    rest = None if whole else P.UNCONSTRAINED
    spec = P(*[rest] * axis, axes, *[rest] * (x.ndim - 1 - axis))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_ways(like: jax.Array) -> int:
    """Over how many devices the mesh that `like` is on splits a batch."""
    mesh, axes = _batch_axes(like)
    return math.prod(mesh.shape[a] for a in axes)


def tensor_ways(like: jax.Array) -> int:
    """Over how many tensor-parallel devices the mesh that `like` is on splits a layer."""
    return _auto_size(jax.typeof(like).sharding.mesh, "tp")


def padded_over_tp(x: jax.Array, axis: int) -> jax.Array:
    """An axis that tensor-parallel devices cannot share evenly, padded with zeros so that they can.

    Only inside the program: no parameter is padded, so no optimizer, file or noise sees it.
    """
    missing = -x.shape[axis] % tensor_ways(x)
    if not missing:
        return x
    mesh: Any = jax.typeof(x).sharding.mesh
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    spec = P(*["tp" if i == axis else P.UNCONSTRAINED for i in range(x.ndim)])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def lookup(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """`table[tokens]` in `dtype`, `(B, T, d)`, of `(V, d)`; gradients sum in the table's dtype.

    On a mesh a device looks up all tokens in its part of the columns, and one all-to-all turns
    columns into rows of the batch. Left alone, the partitioner gathers the table (in the backward
    pass: sums one of that size over all devices) or copies the whole batch to every device.
    """
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


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, statistics in float32 over the last axis."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis in `x.dtype`; float32 inside."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return normal.astype(x.dtype) * scale.astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, the kernel `(in, out)` or a `Factored` one."""

    def __init__(self, size_in: int, size_out: int, use_bias: bool):
        self.kernel = nnx.Param(jnp.zeros((size_in, size_out)))
        self.bias = nnx.Param(jnp.zeros((size_out,))) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # Flat rows: contracting two axes in the kernel's gradient costs XLA:CPU a transpose each.
        # `get_value`: a layer map may have put a `Factored` in the kernel's place.
        y = matmul(x.reshape(-1, x.shape[-1]), self.kernel.get_value())
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        y = checkpoint_name(y, LINEAR)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Attention(nnx.Module):
    """Grouped-query attention; `temperature` divides the scores (after rotation and QK-norm)."""

    def __init__(self, c):
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def __call__(self, x, table, temperature, keep: Callable):
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, table), rotate(k, table)
        q = q * (1.0 / temperature).astype(q.dtype)
        parts, cache = keep(k, v)
        y = attend(q, parts, self.head_dim**-0.5)
        return self.o(y.reshape(batch, length, self.heads * self.head_dim)), cache


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, c):
        self.gate = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm residual block; `keep(k, v) -> (parts to attend to, cache)` may cache them."""

    def __init__(self, c):
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x, table, temperature, keep: Callable):
        y, cache = self.attn(self.attn_norm(x), table, temperature, keep)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache
