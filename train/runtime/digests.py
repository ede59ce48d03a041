"""Digests of arrays where they lie: the same on every mesh, and nothing is moved to find them.

The elements' bits are mixed with their place in the whole array and summed in 32-bit integers. Such
a sum does not depend on who adds what first, so every device adds up its own part. One element that
changes always changes the digest (the mixing is a bijection); several leave all 128 bits as they
are once in 2^128 cases, unless somebody means it to happen: it finds damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.runtime.sharding import path_str

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the input moves about half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.jit
def position_sums(x: jax.Array) -> jax.Array:
    """Four sums over the elements, each mixed with its place, modulo 2^32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        # Modulo 2^32 in arrays with more elements: still a fixed place for each of them.
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size & 0xFFFFFFFF) + step
    place = _mix(place + jnp.uint32(0x9E3779B9))
    a, b = _mix(bits ^ place), _mix(bits + place * jnp.uint32(0x85EBCA6B))
    terms = (a, b, a * b, (a >> 16) * (b | 1))
    # One reduction of four numbers: four of one number would mix everything four times.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(
        terms,
        (zero,) * 4,
        lambda x, y: tuple(p + q for p, q in zip(x, y, strict=True)),
        tuple(range(bits.ndim)),
    )
    return jnp.stack(sums)


def tree_digests(tree: Any) -> dict[str, str]:
    """Path to digest (of dtype, shape and elements) for every leaf; every process gets all.

    Example:
        >>> digests = tree_digests({"a": np.arange(3), "b": np.zeros(0)})
        >>> sorted(digests), len(digests["a"])
        (['a', 'b'], 64)
    """
    leaves = {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    sums = jax.device_get({name: position_sums(x) for name, x in leaves.items()})
    return {name: _named(x, sums[name]) for name, x in leaves.items()}


def _named(leaf: Any, sums: np.ndarray) -> str:
    kind = f"{np.dtype(leaf.dtype).name}{tuple(leaf.shape)}"
    return hashlib.sha256(kind.encode() + sums.astype("<u4").tobytes()).hexdigest()


def tree_shapes(tree: Any) -> dict[str, list[Any]]:
    """Path to dtype and shape for every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_str(p): [np.dtype(x.dtype).name, *x.shape] for p, x in leaves}


def combined(digests: dict[str, str]) -> str:
    """One sha256 for a tree: the digest of its sorted (path, leaf digest) pairs."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def params_sha256(params: Any) -> str:
    """What names a parameter tree: one sha256 over the digests of its leaves."""
    return combined(tree_digests(params))
