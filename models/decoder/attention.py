"""Grouped-query attention over packed rows, with prompts that several rows share.

`visible` makes the mask and `attend` computes attention under it. Each thing that `attend` has to
take care of is one private function or a pair: queries of one key-value head as a single axis
(`_fold`, `_unfold`), prompt sharing (`_shared_einsum`), tensor parallelism (`_pad_groups`), the
mask (`_scores`) and the softmax over several sets of keys (`_softmax_average`).

Shapes: batch B, queries T, keys S, query heads H, key-value heads K, head dimension D.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.activation_sharding import padded_over_tp, tensor_ways

LEAF_STRIDE = 65536  # segment id = group + LEAF_STRIDE * leaf


class KeyValues(NamedTuple):
    """Keys and values to attend to, with their mask.

    Args:
        k: keys `(R, S, K, D)`. R divides the number of rows B of the queries: with R = B each row
            has its own keys, otherwise each B / R consecutive rows share one row of keys. K divides
            the number of query heads H.
        v: values, as `k`.
        mask: bool `(B, 1, T, S)`, True where a query sees a key.
        causal: S = T and no query sees a later key, so that such products may be skipped.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    causal: bool = False


def visible(
    query: tuple[jax.Array, jax.Array, jax.Array],
    key: tuple[jax.Array, jax.Array, jax.Array],
    window: int | None,
) -> jax.Array:
    """The attention mask of packed rows: which keys each query sees.

    A query sees a key that is in its own slot or an earlier one, belongs to the same group, is not
    padding (segment 0), and is in the group's shared prefix (leaf 0) or in the query's own leaf.
    A token with a negative segment id sees the same keys as with the positive one, and no query
    sees it.

    Args:
        query: `(slots (T,), segment_ids (B, T), positions (B, T))`, all int32; a segment id is
            `group + LEAF_STRIDE * leaf`.
        key: the same of the keys, S instead of T.
        window: the sliding window: a query sees keys fewer than `window` positions back.

    Returns:
        Bool `(B, 1, T, S)`.

    Example:
        >>> spots = (jnp.arange(3), jnp.array([[1, 1, 2]]), jnp.array([[0, 1, 0]]))
        >>> visible(spots, spots, None)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
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


def attend(q: jax.Array, parts: Sequence[KeyValues], scale: float) -> jax.Array:
    """Grouped-query attention, `softmax(scale q k^T) v` over the visible keys of all parts.

    Two matrix products for each key-value head, with the queries of its group as one long axis; the
    sum of the exponentials divides the result, not the weights. On a CPU this takes half the time
    of `jax.nn.dot_product_attention`, where the work between the products is memory-bound. Causal
    queries are computed in blocks (`causal_blocks`), each against the keys up to its end: four
    blocks skip three eighths of the products.

    Args:
        q: queries `(B, T, H, D)`.
        parts: keys and values in one or several parts (a prompt and an answer), normalised
            together.
        scale: the factor of the scores; they and the softmax are float32, or float64 of float64.

    Returns:
        `(B, T, H, D)` in the dtype of `q`. A query that sees no key gets the mean of all values in
        its products.

    Example:
        >>> ones = jnp.ones((1, 2, 1, 4))
        >>> attend(ones, [KeyValues(ones, ones, jnp.ones((1, 1, 2, 2), bool))], 0.5).shape
        (1, 2, 1, 4)
    """
    if len(parts) > 1 or not parts[0].causal:
        return _attend_at_once(q, parts, scale)
    k, v, mask, _ = parts[0]
    blocks = [
        _attend_at_once(
            q[:, first:end], [KeyValues(k[:, :end], v[:, :end], mask[:, :, first:end, :end])], scale
        )
        for first, end in causal_blocks(q.shape[1])
    ]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)


def causal_blocks(length: int) -> list[tuple[int, int]]:
    """`(first, end)` of up to four blocks of queries: of about equal size, about 64 or more each.

    Example:
        >>> causal_blocks(150)
        [(0, 80), (80, 150)]
    """
    count = min(max(length // 64, 1), 4)
    size = -(-length // (8 * count)) * 8
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _attend_at_once(q: jax.Array, parts: Sequence[KeyValues], scale: float) -> jax.Array:
    """`attend` with all queries against all keys."""
    length, heads, groups = q.shape[1], q.shape[2], parts[0].k.shape[2]
    folded = _fold(q, groups) * jnp.asarray(scale, q.dtype)
    if heads % tensor_ways(q):
        folded, parts = _pad_groups(folded, parts)
    scores = [_scores(folded, part, length) for part in parts]
    y = _softmax_average(scores, [part.v for part in parts])
    return _unfold(y[:, :groups].astype(q.dtype), length)


def _fold(q: jax.Array, groups: int) -> jax.Array:
    """The queries of each key-value head as one axis: `(B, T, H, D)` to `(B, K, H / K T, D)`."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, groups, -1, size)


def _unfold(y: jax.Array, length: int) -> jax.Array:
    """The inverse of `_fold`."""
    batch, groups, _, size = y.shape
    y = y.reshape(batch, groups, -1, length, size).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, length, -1, size)


def _pad_groups(folded: jax.Array, parts: Sequence[KeyValues]) -> tuple[jax.Array, list[KeyValues]]:
    """Folded queries and their keys with key-value heads added that tp divides evenly."""
    folded = padded_over_tp(folded, 1)
    return folded, [p._replace(k=padded_over_tp(p.k, 2), v=padded_over_tp(p.v, 2)) for p in parts]


def _scores(folded: jax.Array, part: KeyValues, length: int) -> jax.Array:
    """Masked scores, float32 `(B, K, H / K T, S)`, of folded queries."""
    found = _shared_einsum("bkmd,bskd->bkms", folded, part.k)
    batch, groups, _, keys = found.shape
    # Added, not selected: there is nothing to mask in the backward pass.
    hidden = jnp.where(part.mask, 0.0, -1e30)[:, :, None]
    return (found.reshape(batch, groups, -1, length, keys) + hidden).reshape(found.shape)


def _softmax_average(scores: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """Values averaged with one softmax over the scores of all parts, float32 `(B, K, M, D)`.

    Each part's scores are `(B, K, M, S)` and its values `(R, S, K, D)`.
    """
    tops = [jnp.max(some, -1, keepdims=True) for some in scores]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    found, total = [], []
    for some, v in zip(scores, values, strict=True):
        weights = jnp.exp(some - top)
        found.append(_shared_einsum("bkms,bskd->bkmd", weights.astype(v.dtype), v))
        total.append(jnp.sum(weights, -1, keepdims=True))
    return functools.reduce(jnp.add, found) / functools.reduce(jnp.add, total)


def _shared_einsum(product: str, x: jax.Array, shared: jax.Array) -> jax.Array:
    """`einsum` of B rows `x`, `(B, K, n, D or S)`, with R rows of keys or values; float32 or wider.

    Rows that share keys (samples of one prompt) are joined, so that the keys are read once.
    """
    batch, rows = len(x), len(shared)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    found = jnp.einsum(product, _joined(x, rows), shared, preferred_element_type=wide)
    return _parted(found, batch)


def _joined(x: jax.Array, rows: int) -> jax.Array:
    """Each B / R consecutive rows as one: `(B, K, n, D)` to `(R, K, B / R n, D)`."""
    batch, groups, _, size = x.shape
    if rows == batch:
        return x
    x = x.reshape(rows, batch // rows, groups, -1, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows, groups, -1, size)


def _parted(x: jax.Array, batch: int) -> jax.Array:
    """The inverse of `_joined`."""
    rows, groups, _, size = x.shape
    if rows == batch:
        return x
    x = x.reshape(rows, groups, batch // rows, -1, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, groups, -1, size)
