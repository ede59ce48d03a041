"""Where and when two gradients may be fused: masks over matrices, gates over steps.

A mask is read from paths and shapes when a program is traced; a leaf that it leaves out compiles to
plain Muon with one momentum. What may change between steps enters through one number, the cosine
below which a matrix is fused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.optim.matrices import MatrixAxes, path_str


class Candidates(NamedTuple):
    """The matrices of one leaf, and which of them may be fused.

    Args:
        path: of the leaf, as text.
        shape: of the leaf.
        axes: how it is a stack of matrices; None if it is not.
        allowed: ``(n,)`` bool, one entry per matrix; None if none may be fused.
    """

    path: str
    shape: tuple[int, ...]
    axes: MatrixAxes | None
    allowed: np.ndarray | None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes that count matrices."""
        return () if self.axes is None else tuple(self.shape[a] for a in self.axes.stack)

    @property
    def side(self) -> int:
        """The shorter side of a matrix; 0 without matrices."""
        return 0 if self.axes is None else min(self.axes.sizes(self.shape)[1:])


def find_candidates(
    tree: Any, axes: Sequence[MatrixAxes | None], spatial_mask: Any = None
) -> list[Candidates]:
    """What a mask says about every leaf of a tree.

    Args:
        tree: arrays or shapes.
        axes: one entry per leaf, as from ``matrices.resolve``.
        spatial_mask: None for all; a function of the path's text; or a tree (prefixes allowed).
            Per leaf it gives a bool, or an array of bools shaped like the leaf's stack axes.

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
    flat = jax.tree_util.tree_leaves_with_path(tree)
    if spatial_mask is None:
        said = [True] * len(flat)
    elif callable(spatial_mask):
        said = [spatial_mask(path_str(path)) for path, _ in flat]
    else:
        spread = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), spatial_mask, tree)
        said = jax.tree.leaves(spread)
    found = []
    for (path, x), leaf_axes, word in zip(flat, axes, said, strict=True):
        leaf = Candidates(path_str(path), tuple(x.shape), leaf_axes, None)
        found.append(leaf._replace(allowed=_allowed(leaf, word)))
    return found


def _allowed(leaf: Candidates, said: Any) -> np.ndarray | None:
    mask = np.asarray(said)
    if mask.dtype != bool or mask.shape not in ((), leaf.stack):
        raise ValueError(
            f"spatial_mask says {said!r} for {leaf.path!r} {leaf.shape}: it takes a bool, or an "
            f"array of bools shaped like the stack axes, {leaf.stack}"
        )
    mask = np.broadcast_to(mask, leaf.stack).reshape(-1)
    return mask if leaf.axes is not None and mask.any() else None


def limit_at(
    count: jax.Array,
    threshold: jax.typing.ArrayLike | Callable[[jax.Array], Any],
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None = None,
) -> jax.Array:
    """The cosine below which matrices are fused at a step.

    Args:
        count: () int32, steps before this one.
        threshold: a number or a schedule of the count.
        step_gate: None, a function of the count, or the counts at which to fuse.

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
