"""The leaves that a zeroth-order optimizer updates, their stacked layers, and their matrices.

Zeroth order perturbs *every* leaf, so embeddings and heads are matrices too (``optim.matrices``
leaves them to AdamW) and nothing is ambiguous:

=====================================================  =========================================
a leaf (of one layer) with fewer than two axes         a vector (leading axes of size 1 dropped)
``optim.matrices`` knows its axes                      those
an embedding table ``(vocab, d)``                      in d, out vocab
a convolution                                          all axes but the last are in
anything else                                          the last two axes are in, out
=====================================================  =========================================
"""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.matrices import MatrixAxes, Specs, matrix_axes, path_str, resolve
from jaxlib_unlearn.optim.zeroth_order.perturbations import Leaf

Trainable = Callable[[str], bool]

_LAYERS = re.compile(r"^(layers|blocks|stack|scan)$|^scan", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^(wte|wpe)$", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_NEVER_DECAYED = re.compile(r"bias|norm|scale|(^|/)(ln|bn)[^/]*/", re.IGNORECASE)


class Stack(NamedTuple):
    """Leaves that share a leading layer axis.

    Args:
        prefix: The component of the path under which the leaves lie, e.g. ``layers``.
        first: The absolute index of the first layer.
        count: The number of layers.
        members: The positions of the leaves in ``jax.tree.leaves``.
    """

    prefix: str
    first: int
    count: int
    members: tuple[int, ...]


class Layout(NamedTuple):
    """A parameter tree as a zeroth-order optimizer sees it.

    Args:
        leaves: The description of every leaf.
        outer: The positions of the leaves that are not stacked.
        stacks: The stacks of layers, which are numbered through consecutive stacks of one prefix.
    """

    leaves: tuple[Leaf, ...]
    outer: tuple[int, ...]
    stacks: tuple[Stack, ...]

    def size(self) -> int:
        """The number of trainable parameters."""
        total = 0
        counts = {i: stack.count for stack in self.stacks for i in stack.members}
        for i, leaf in enumerate(self.leaves):
            if leaf.trainable:
                size = counts.get(i, 1)
                for n in leaf.shape:
                    size *= n
                total += size
        return total


def layout_of(
    params: Any,
    *,
    trainable: Trainable | None = None,
    matrices: Specs = None,
    layout: str = "in_out",
) -> Layout:
    """Reads a parameter tree: stacked layers, matrices, trainable leaves.

    Leaves under ``layers`` (``blocks``, ``stack``, ``scan``) are stacked when they all have the
    same leading size and one of them is a stack of matrices by ``optim.matrices``; a tuple (or
    numbered items) of such stacks is numbered through.

    Args:
        params: A tree of arrays or shapes.
        trainable: A function of a path that says whether the leaf is perturbed and updated; None
            for every floating leaf (one with no elements never is).
        matrices: The choice of matrices, as in ``optim.matrices.resolve``, for all leaves; None for
            the table above.
        layout: The order of a kernel's axes, "in_out" or "out_in".

    Returns:
        The layout.

    Raises:
        ValueError: nothing is trainable, a leaf is masked or complex, or dimension numbers do not
            fit.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {
        ...     "embed": jnp.zeros((9, 4)),
        ...     "layers": {"up": {"kernel": jnp.zeros((3, 4, 8)), "bias": jnp.zeros((3, 8))}},
        ... }
        >>> found = layout_of(params)
        >>> found.outer, found.stacks
        ((0,), (Stack(prefix='layers', first=0, count=3, members=(1, 2)),))
        >>> [leaf.axes is not None for leaf in found.leaves]
        [True, False, True]
    """

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            "a zeroth-order optimizer evaluates the loss of all parameters, so it cannot live "
            "inside optax.partition or optax.masked; pass trainable=(path -> bool) instead"
        )
    flat = [(path_str(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    if isinstance(matrices, str):  # here two axes are a matrix anyway
        resolve((), matrices)
        matrices = None
    given = None if matrices is None else resolve(params, matrices, layout)
    stacks = _find_stacks(flat, layout)
    stacked = {i: stack for stack in stacks for i in stack.members}
    leaves = []
    for i, (path, x) in enumerate(flat):
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(f"{path!r} is complex: zeroth order moves real parameters only")
        deep = i in stacked
        shape = tuple(x.shape[1:] if deep else x.shape)
        axes = _axes(path, x, deep, layout) if given is None else given[i]
        if given is not None and axes is not None and deep:
            axes = _one_layer(path, axes)
        moves = jnp.issubdtype(x.dtype, jnp.floating) and 0 not in x.shape
        moves = moves and (trainable is None or trainable(path))
        name = _without_segment(path, stacked[i].prefix) if deep else path
        leaves.append(
            Leaf(
                path=path,
                name=name,
                code=zlib.crc32(name.encode()),
                shape=shape,
                dtype=jnp.dtype(x.dtype),
                axes=axes,
                trainable=bool(moves),
                decayed=axes is not None and _NEVER_DECAYED.search(path) is None,
            )
        )
    if not any(leaf.trainable for leaf in leaves):
        raise ValueError(f"none of the {len(leaves)} leaves is trainable")
    outer = tuple(i for i in range(len(leaves)) if i not in stacked)
    return Layout(tuple(leaves), outer, tuple(stacks))


def _find_stacks(flat: Sequence[tuple[str, Any]], layout: str) -> list[Stack]:
    groups: dict[tuple[str, int], list[int]] = {}
    for i, (path, x) in enumerate(flat):
        parts = path.split("/")
        at = next((j for j, part in enumerate(parts[:-1]) if _LAYERS.match(part)), None)
        if at is None or not x.shape:
            continue
        following = parts[at + 1]
        number = int(following) if following.isdigit() and at + 2 < len(parts) else -1
        groups.setdefault(("/".join(parts[: at + 1]), number), []).append(i)
    stacks, firsts = [], {}
    for (prefix, _), members in sorted(groups.items()):
        sizes = {flat[i][1].shape[0] for i in members}
        if len(sizes) > 1 or not any(_leads_stack(*flat[i], layout) for i in members):
            continue
        first, count = firsts.get(prefix, 0), sizes.pop()
        stacks.append(Stack(prefix, first, count, tuple(members)))
        firsts[prefix] = first + count
    return stacks


def _leads_stack(path: str, x: Any, layout: str) -> bool:
    axes = _known(path, x, layout)
    return axes is not None and 0 in axes.stack


def _known(path: str, x: Any, layout: str) -> MatrixAxes | None:
    try:
        return matrix_axes(path, x, layout=layout)
    except ValueError:
        return None


def _axes(path: str, x: Any, deep: bool, layout: str) -> MatrixAxes | None:
    shape = tuple(x.shape[1:] if deep else x.shape)
    rank = len(shape)
    ones = next((i for i, n in enumerate(shape) if n > 1), rank)
    if rank - ones < 2:
        return None
    found = _known(path, x, layout)
    if found is not None:
        return _one_layer(path, found) if deep else found
    parts = path.split("/")
    lead, first, second = tuple(range(rank - 2)), (rank - 2,), (rank - 1,)
    # A kernel is a factor of a product under any owner: `patch_embed/kernel` is no table.
    if parts[-1] != "kernel" and any(_EMBEDDING.search(part) for part in parts):
        return MatrixAxes(lead, second, first)
    if layout == "in_out" and rank > 2 and any(_CONVOLUTION.search(part) for part in parts):
        return MatrixAxes((), tuple(range(rank - 1)), second)
    return (
        MatrixAxes(lead, first, second) if layout == "in_out" else MatrixAxes(lead, second, first)
    )


def _one_layer(path: str, axes: MatrixAxes) -> MatrixAxes:
    if 0 not in axes.stack:
        raise ValueError(f"{path!r}: the leading axis counts layers, so it cannot be in {axes}")
    stack, fan_in, fan_out = (tuple(a - 1 for a in group if a != 0) for group in axes)
    return MatrixAxes(stack, fan_in, fan_out)


def _without_segment(path: str, prefix: str) -> str:
    rest = path[len(prefix) + 1 :]
    first, _, inner = rest.partition("/")
    return f"{prefix}/{inner}" if first.isdigit() and inner else path
