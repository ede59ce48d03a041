"""Digests of arrays, computed where the arrays are stored and the same on every mesh.

Each element's bits are mixed with its position in the whole array and summed in 32-bit integers.
The sum does not depend on the order of addition, so every device sums its own part. A change of one
element always changes the digest (the mixing is a bijection); a change of several goes unnoticed
with probability 2^-128, unless it is made on purpose: this detects damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.runtime.sharding import path_str

SKETCH = 4  # projections in a sketch
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
    """A bijection on 32 bits; flipping an input bit flips about half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The number of each element."""
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        # Wraps modulo 2^32 in larger arrays, which still gives each element a fixed position.
        step = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place * jnp.uint32(size & 0xFFFFFFFF) + step
    return place


@jax.jit
def position_sums(x: jax.Array) -> jax.Array:
    """Four sums over the elements, each mixed with its position, modulo 2^32."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = _mix(_places(bits.shape) + jnp.uint32(0x9E3779B9))
    a, b = _mix(bits ^ place), _mix(bits + place * jnp.uint32(0x85EBCA6B))
    terms = (a, b, a * b, (a >> 16) * (b | 1))
    # One reduction over four values: four separate ones would repeat the mixing four times.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(
        terms,
        (zero,) * 4,
        lambda x, y: tuple(p + q for p, q in zip(x, y, strict=True)),
        tuple(range(bits.ndim)),
    )
    return jnp.stack(sums)


def tree_digests(tree: Any) -> dict[str, str]:
    """The digest (of dtype, shape and elements) of every leaf by path, on every process.

    Example:
        >>> digests = tree_digests({"a": np.arange(3), "b": np.zeros(0)})
        >>> sorted(digests), len(digests["a"])
        (['a', 'b'], 64)
    """
    leaves = {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    sums = jax.device_get({name: position_sums(x) for name, x in leaves.items()})
    return {name: _named(x, sums[name]) for name, x in leaves.items()}


@jax.jit
def _signed_sums(x: jax.Array, salt: jax.Array) -> jax.Array:
    """Four sums over the elements, each with a sign that is random in its position and the salt."""
    bits = _mix(_places(x.shape) ^ _mix(salt + jnp.uint32(0x9E3779B9)))
    wide = x.astype(jnp.float32)
    sums = tuple(jnp.where((bits >> i) & 1 == 1, wide, -wide) for i in range(SKETCH))
    zero = jnp.float32(0)
    for _ in range(x.ndim):
        size = sums[0].shape[-1]
        # Sixteen at a time: a running sum of millions would lose the digits that are compared.
        while size > 1:
            width = min(16, size)
            pad = [(0, 0)] * (sums[0].ndim - 1) + [(0, -size % width)]
            sums = tuple(
                jnp.pad(y, pad).reshape(*y.shape[:-1], -(-size // width), width) for y in sums
            )
            sums = jax.lax.reduce(
                sums,
                (zero,) * SKETCH,
                lambda x, y: tuple(p + q for p, q in zip(x, y, strict=True)),
                (sums[0].ndim - 1,),
            )
            size = sums[0].shape[-1]
        sums = tuple(jnp.sum(y, axis=-1) for y in sums)  # of one element, or of none
    return jnp.stack(sums)


def sketch(tree: Any) -> np.ndarray:
    """Four random projections of all floating leaves, `(4,)` float32, on every process.

    Half the norm of the difference of two sketches estimates the norm of the difference of the
    trees, which no sha256 shows for parameters that differ in their last bits.

    Example:
        >>> tree = {"w": np.ones((40, 50), np.float32)}
        >>> other = {"w": tree["w"] + np.float32(1e-3)}
        >>> 1e-4 < apart(sketch(other), sketch(tree)) < 1e-2
        True
    """
    leaves = {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    floats = {n: x for n, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    sums = jax.device_get(
        {n: _signed_sums(x, np.uint32(zlib.crc32(n.encode()))) for n, x in floats.items()}
    )
    total = np.zeros(SKETCH)
    for name in sorted(sums):
        total += sums[name]
    return total.astype(np.float32)


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The distance of two trees, in units of the norm of the second one's parameters."""
    one, other = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-300))


def _named(leaf: Any, sums: np.ndarray) -> str:
    kind = f"{np.dtype(leaf.dtype).name}{tuple(leaf.shape)}"
    return hashlib.sha256(kind.encode() + sums.astype("<u4").tobytes()).hexdigest()


def tree_shapes(tree: Any) -> dict[str, list[Any]]:
    """The dtype and shape of every leaf by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_str(p): [np.dtype(x.dtype).name, *x.shape] for p, x in leaves}


def combined(digests: dict[str, str]) -> str:
    """One sha256 for a tree: the digest of its sorted (path, leaf digest) pairs."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def params_sha256(params: Any) -> str:
    """The sha256 that identifies a parameter tree, computed from the digests of its leaves."""
    return combined(tree_digests(params))
