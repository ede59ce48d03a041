"""Masks over matrices and gates over steps that allow two gradients to be fused.

A mask is read from paths and shapes when a program is traced; a leaf that it leaves out compiles to
plain Muon with one momentum. Changes between steps enter through one number, the cosine below which
a matrix is fused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.optim.matrices import MatrixAxes, paths_of, sharding_role
from jaxlib_unlearn.optim.memo import once, outline


class Candidates(NamedTuple):
    """The matrices of one leaf, and those among them that may be fused.

    Args:
        path: The path of the leaf, as text.
        role: The sharding role of the leaf on a mesh, from ``matrices.sharding_role``.
        axes: The axes of the leaf as a stack of matrices; None if it holds none.
        stack: The sizes of the axes that count matrices.
        sides: The numbers of inputs and outputs of one matrix; (0, 0) without matrices.
        allowed: The bool ``(n,)`` that says of every matrix whether it may be fused; None if none
            may.
    """

    path: str
    role: str
    axes: MatrixAxes | None
    stack: tuple[int, ...]
    sides: tuple[int, int]
    allowed: np.ndarray | None


def find_candidates(
    tree: Any, axes: Sequence[MatrixAxes | None], spatial_mask: Any = None
) -> tuple[Candidates, ...]:
    """The matrices of every leaf of a tree, and those that a mask allows to be fused.

    Args:
        tree: A tree of arrays or shapes.
        axes: The axes of every leaf, as from ``matrices.resolve``.
        spatial_mask: The mask: None for all; a function of the path's text; or a tree (prefixes
            allowed). For each leaf it gives a bool, or an array of bools shaped like the leaf's
            stack axes.

    Returns:
        One entry per leaf.

    Raises:
        ValueError: the mask gives anything else.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.matrices import resolve
        >>> tree = {"layers": {"down": {"kernel": jnp.ones((3, 4, 2))}}}
        >>> mask = {"layers": np.array([False, True, True])}
        >>> find_candidates(tree, resolve(tree), mask)[0].allowed.tolist()
        [False, True, True]
    """
    structure, shapes = outline(tree)
    if spatial_mask is None:
        said = (True,) * len(shapes)
    elif callable(spatial_mask):
        said = tuple(spatial_mask(path) for path in paths_of(structure))
    else:
        spread = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), spatial_mask, tree)
        said = tuple(jax.tree.leaves(spread))
    return _candidates(structure, shapes, tuple(axes), said)


@once
def _candidates(structure: Any, shapes: Any, axes: Any, said: Any) -> tuple[Candidates, ...]:
    found = []
    for path, shape, at, word in zip(paths_of(structure), shapes, axes, said, strict=True):
        stack = () if at is None else tuple(shape[a] for a in at.stack)
        mask = np.asarray(word)
        if mask.dtype != bool or mask.shape not in ((), stack):
            raise ValueError(
                f"spatial_mask says {word!r} for {path!r} {shape}: it takes a bool, or an "
                f"array of bools shaped like the stack axes, {stack}"
            )
        mask = np.broadcast_to(mask, stack).reshape(-1)
        allowed = mask if at is not None and mask.any() else None
        sides = (0, 0) if at is None else at.sizes(shape)[1:]
        found.append(Candidates(path, sharding_role(path), at, stack, sides, allowed))
    return tuple(found)


def limit_at(
    count: jax.Array,
    threshold: jax.typing.ArrayLike | Callable[[jax.Array], Any],
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None = None,
) -> jax.Array:
    """The cosine below which matrices are fused at a step.

    Args:
        count: The number of steps before this one, () int32.
        threshold: A number or a schedule of the count.
        step_gate: The gate: None, a function of the count, or the counts at which to fuse.

    Returns:
        A scalar; ``-inf`` where the gate is closed.

    Example:
        >>> import jax.numpy as jnp
        >>> [float(limit_at(jnp.int32(i), 0.5, (0, 2))) for i in range(3)]
        [0.5, -inf, 0.5]
    """
    limit = jnp.asarray(threshold(count) if callable(threshold) else threshold)
    if step_gate is None:
        return limit
    if callable(step_gate):
        return jnp.where(step_gate(count), limit, -jnp.inf)
    return jnp.where(jnp.any(count == jnp.asarray(step_gate, jnp.int32)), limit, -jnp.inf)
