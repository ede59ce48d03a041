"""Matrices that share a leaf but act separately: attention heads, fused q, k and v.

A fused ``(in, 3 in)`` projection is three matrices, and a query projection is one matrix per head;
orthogonalising them as one mixes parts that the model keeps apart. A :class:`Split` is the place of
a cut.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.matrices import MatrixAxes


class Split(NamedTuple):
    """The places at which a matrix is cut.

    Args:
        sizes: The number of equal blocks (heads), or the sizes of the blocks (unequal q, k, v).
        axis: The side that is cut, "out" or "in". Output projections have their heads on "in".
    """

    sizes: int | tuple[int, ...]
    axis: str = "out"


Splits = Mapping[str, Split | int | tuple[int, ...]]
"""Patterns (``re.search`` on the path, the first match wins), each with the split of a leaf."""


def find_split(path: str, splits: Splits | None) -> Split | None:
    """The split of a leaf, or None.

    Raises:
        ValueError: an axis that is neither "in" nor "out", or sizes that are not positive.

    Example:
        >>> find_split("layers/attn/q/kernel", {"attn/(q|k)/": 9})
        Split(sizes=9, axis='out')
    """
    for pattern, given in (splits or {}).items():
        if re.search(pattern, path):
            sizes, axis = given if isinstance(given, Split) else Split(given)
            sizes = sizes if isinstance(sizes, int) else tuple(sizes)
            least = sizes if isinstance(sizes, int) else min(sizes, default=0)
            if axis not in ("in", "out") or least < 1:
                raise ValueError(f"{pattern!r}: no way to split by {Split(sizes, axis)}")
            return Split(sizes, axis)
    return None


def pieces(
    shape: tuple[int, ...], axes: MatrixAxes, split: Split | None, path: str = ""
) -> list[tuple[tuple[int, ...], MatrixAxes]]:
    """The shapes into which a leaf is cut, each with its axes.

    Args:
        shape: The shape of the leaf.
        axes: The axes of the leaf as a stack of matrices.
        split: The split; None leaves the leaf whole.
        path: The path of the leaf, for the message of an error.

    Returns:
        The pieces: equal blocks are one piece with one more stack axis; sizes give a piece each.

    Raises:
        ValueError: the sizes do not fit.

    Example:
        >>> axes = MatrixAxes((), (0,), (1,))
        >>> pieces((4, 6), axes, Split(3))
        [((4, 3, 2), MatrixAxes(stack=(1,), fan_in=(0,), fan_out=(2,)))]
        >>> [shape for shape, _ in pieces((4, 6), axes, Split((4, 2)))]
        [(4, 4), (4, 2)]
    """
    if split is None:
        return [(shape, axes)]
    at, *inner = axes.fan_out if split.axis == "out" else axes.fan_in
    total = math.prod(shape[a] for a in (at, *inner))
    if isinstance(split.sizes, int):
        if inner and shape[at] == split.sizes:  # DenseGeneral's own head axis
            return [(shape, _with_side(axes, split.axis, tuple(inner), (at,)))]
        if inner or total % split.sizes:
            raise ValueError(
                f"{path!r} {shape} does not split into {split.sizes} equal blocks "
                f"along {split.axis}"
            )
        moved = MatrixAxes(*(tuple(a + (a > at) for a in group) for group in axes))
        moved = _with_side(moved, split.axis, (at + 1,), (at,))
        return [((*shape[:at], split.sizes, total // split.sizes, *shape[at + 1 :]), moved)]
    if inner or sum(split.sizes) != total:
        raise ValueError(f"{path!r} {shape} does not split into {split.sizes} along {split.axis}")
    return [((*shape[:at], size, *shape[at + 1 :]), axes) for size in split.sizes]


def cut(leaf: jax.Array, axes: MatrixAxes, split: Split | None) -> list[jax.Array]:
    """The pieces of a leaf, whose shapes are those of :func:`pieces`.

    Args:
        leaf: An array.
        axes: The axes of the leaf as a stack of matrices.
        split: The split; None gives the leaf itself.

    Returns:
        One array a piece.

    Example:
        >>> import jax.numpy as jnp
        >>> parts = cut(jnp.zeros((4, 6)), MatrixAxes((), (0,), (1,)), Split((4, 2)))
        >>> [part.shape for part in parts]
        [(4, 4), (4, 2)]
    """
    if split is None:
        return [leaf]
    at = (axes.fan_out if split.axis == "out" else axes.fan_in)[0]
    shapes = [shape for shape, _ in pieces(leaf.shape, axes, split)]
    if isinstance(split.sizes, int):
        whole = shapes[0] == leaf.shape
        return [leaf if whole else _reshape(leaf, shapes[0], at, split.sizes)]
    whole, ends = _unsharded(leaf, at), list(itertools.accumulate(split.sizes))
    return [
        jax.lax.slice_in_dim(whole, end - size, end, axis=at)
        for end, size in zip(ends, split.sizes, strict=True)
    ]


def join(
    parts: list[jax.Array], leaf: jax.Array, axes: MatrixAxes, split: Split | None
) -> jax.Array:
    """Undo :func:`cut`.

    Example:
        >>> import jax.numpy as jnp
        >>> x, axes = jnp.arange(24.0).reshape(4, 6), MatrixAxes((), (0,), (1,))
        >>> bool((join(cut(x, axes, Split(3)), x, axes, Split(3)) == x).all())
        True
    """
    if split is None or parts[0].shape == leaf.shape:
        return parts[0]
    at = (axes.fan_out if split.axis == "out" else axes.fan_in)[0]
    if isinstance(split.sizes, int):
        x = _reshape(_unsharded(parts[0], at + 1), leaf.shape, at, None)
    else:
        x = jnp.concatenate(parts, axis=at)
    sharding = _explicit(leaf)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _with_side(axes: MatrixAxes, side: str, inner: tuple[int, ...], lead: tuple[int, ...]):
    stack = axes.stack + lead
    if side == "out":
        return MatrixAxes(stack, axes.fan_in, inner)
    return MatrixAxes(stack, inner, axes.fan_out)


# Explicit axes: a reshape must say where the sharding goes.


def _explicit(x: Any) -> NamedSharding | None:
    sharding: Any = jax.typeof(x).sharding
    mesh = sharding.mesh
    return None if mesh.empty or not mesh.are_all_axes_explicit else sharding


def _unsharded(x: jax.Array, axis: int) -> jax.Array:
    sharding = _explicit(x)
    if sharding is None:
        return x
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if spec[axis] is None:
        return x
    spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*spec)))


def _reshape(x: jax.Array, shape: tuple[int, ...], at: int, blocks: int | None) -> jax.Array:
    """Axis ``at`` into (blocks, size), or ``at`` and the next one into one (blocks = None)."""
    sharding = _explicit(x)
    if sharding is None:
        return x.reshape(shape)
    spec = [*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))]
    if blocks is not None:
        names = spec[at] if isinstance(spec[at], tuple) else (spec[at],) if spec[at] else ()
        if blocks % math.prod(sharding.mesh.shape[name] for name in names):
            x = _unsharded(x, at)
            spec[at] = None
        spec.insert(at + 1, None)
    else:
        del spec[at + 1]
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, P(*spec)))
