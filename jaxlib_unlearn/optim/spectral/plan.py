"""The plan of an update: the cuts and names of a tree's matrices, made once for one shape of tree.

A plan holds the cuts of every leaf and, for every piece, its projection and block, its axes as a
stack of matrices and its sharding role on a mesh. It follows from names and shapes, so an update
reads no name (``optim.memo``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlib_unlearn.optim.blocks import counts_blocks
from jaxlib_unlearn.optim.matrices import MatrixAxes, paths_of, sharding_role
from jaxlib_unlearn.optim.memo import once, outline
from jaxlib_unlearn.optim.spectral.splitting import Split, Splits, find_split, pieces


class Part(NamedTuple):
    """Matrices that are orthogonalised as they are.

    Args:
        path: The path of the leaf, as text.
        piece: The number of the part within its leaf (0, 1, 2 for fused q, k, v).
        stacked: True if the first axis of the leaf counts blocks.
        shape: The shape of the array that holds the matrices.
        axes: The axes of that array as a stack of matrices.
        role: The sharding role of the leaf, from ``matrices.sharding_role``.
    """

    path: str
    piece: int
    stacked: bool
    shape: tuple[int, ...]
    axes: MatrixAxes
    role: str = "column"

    @property
    def side(self) -> tuple[int, int]:
        """The numbers of inputs and outputs of one matrix."""
        return self.axes.sizes(self.shape)[1:]


class Plan(NamedTuple):
    """The matrices of a tree.

    Args:
        splits: The split of every leaf; None for a leaf that stays whole.
        counts: The number of parts of every leaf; 0 for a leaf without matrices.
        parts: All parts, in the order of the leaves.
        sides: The numbers of inputs and outputs of a matrix of every part.
    """

    splits: tuple[Split | None, ...]
    counts: tuple[int, ...]
    parts: tuple[Part, ...]
    sides: tuple[tuple[int, int], ...]


def plan_of(tree: Any, axes: Sequence[MatrixAxes | None], split: Splits | None = None) -> Plan:
    """The plan of a tree.

    Args:
        tree: A tree of arrays or shapes.
        axes: The axes of every leaf; None for a leaf without matrices.
        split: The leaves to cut, by path.

    Returns:
        The plan, the same object for trees of one structure and the same shapes.

    Raises:
        ValueError: a split does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> plan = plan_of({"q": jnp.ones((2, 6))}, [MatrixAxes((), (0,), (1,))], {"q": 3})
        >>> plan.parts[0].path, plan.parts[0].shape, plan.sides
        ('q', (2, 3, 2), ((2, 2),))
    """
    return _plan(*outline(tree), tuple(axes), tuple((split or {}).items()))


@once
def _plan(structure: Any, shapes: Any, axes: Any, split: tuple) -> Plan:
    splits, counts, parts = [], [], []
    for path, shape, leaf_axes in zip(paths_of(structure), shapes, axes, strict=True):
        how, cuts = None, []
        if leaf_axes is not None:
            how = find_split(path, dict(split))
            cuts = pieces(shape, leaf_axes, how, path)
            stacked = counts_blocks(path, leaf_axes, len(shape))
            role = sharding_role(path)
            parts += [Part(path, k, stacked, *piece, role) for k, piece in enumerate(cuts)]
        splits.append(how)
        counts.append(len(cuts))
    return Plan(tuple(splits), tuple(counts), tuple(parts), tuple(part.side for part in parts))
