"""From a tree of momenta to a tree of directions: cut, orthogonalise, post-process, scale, join.

Shared by the optimizers for matrices. A leaf is cut into parts (heads, fused q/k/v), all parts go
through the buckets at once, and each comes back scaled by the shape of its matrices. The ``meet``
argument says how parts are combined for the orthogonaliser: each alone for Muon, in groups for
TEON.

On a mesh all matrices are sent twice, to the devices that orthogonalise them and back. With a
``comm_dtype`` they are sent in that dtype. They are rounded on a single device, too, so that a step
does not depend on how many there are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.blocks import counts_blocks
from jaxlib_unlearn.optim.matrices import MatrixAxes, path_str, sharding_role
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.spectral.buckets import map_matrices
from jaxlib_unlearn.optim.spectral.post import Post
from jaxlib_unlearn.optim.spectral.splitting import Split, Splits, cut, find_split, join

Factor = Callable[[int, int], float]

SHAPE_SCALES: dict[str, Factor] = {
    "unit": lambda fan_in, fan_out: 1.0,
    "width": lambda fan_in, fan_out: max(1.0, fan_out / fan_in) ** 0.5,
    "spectral": lambda fan_in, fan_out: (fan_out / fan_in) ** 0.5,
    "match_rms": lambda fan_in, fan_out: 0.2 * max(fan_in, fan_out) ** 0.5,
}
"""What a direction is multiplied by, from the inputs and outputs of one matrix."""


class Part(NamedTuple):
    """Matrices that are orthogonalised as they are.

    Args:
        path: of the leaf, as text.
        piece: which of the leaf's parts it is (fused q, k, v: 0, 1, 2).
        stacked: whether the leaf is a stack of blocks by itself (its first axis counts them).
        array: the matrices.
        axes: how ``array`` is a stack of them.
    """

    path: str
    piece: int
    stacked: bool
    array: jax.Array
    axes: MatrixAxes


Meet = Callable[[Orthogonalizer, Sequence[Part]], list[jax.Array]]


def alone(orthogonalize: Orthogonalizer, parts: Sequence[Part]) -> list[jax.Array]:
    """Every matrix on its own: Muon.

    Args:
        orthogonalize: ``(n, r, c) -> (n, r, c)``.
        parts: what to orthogonalise.

    Returns:
        Arrays like those of the parts.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> part = Part("w", 0, False, 3 * jnp.eye(2), MatrixAxes((), (0,), (1,)))
        >>> alone(svd(), [part])[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return map_matrices(
        orthogonalize,
        [part.array for part in parts],
        [part.axes for part in parts],
        [sharding_role(part.path) for part in parts],
    )


def orthogonalize_tree(
    orthogonalize: Orthogonalizer,
    tree: Any,
    axes: list[MatrixAxes | None],
    factor: Factor = SHAPE_SCALES["unit"],
    *,
    split: Splits | None = None,
    post: Post | None = None,
    post_state: Any = (),
    meet: Meet = alone,
    comm_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Any, Any]:
    """Orthogonalises the matrices of a tree in buckets and scales them by their shape.

    Args:
        orthogonalize: ``(n, r, c) -> (n, r, c)``.
        tree: arrays.
        axes: one entry per leaf; leaves with None pass unchanged.
        factor: ``(in, out) ->`` the number to multiply by.
        split: leaves to cut first, by path.
        post: what follows the orthogonalisation, per part.
        post_state: from :func:`init_post`.
        meet: how parts are combined for the orthogonaliser.
        comm_dtype: what real matrices and their directions are rounded to on the way to the
            orthogonaliser, which then works in float32, and back; None: nothing is rounded.

    Returns:
        A tree like ``tree`` and the new ``post_state``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> orthogonalize_tree(svd(), [3 * jnp.eye(2)], [MatrixAxes((), (0,), (1,))])[0][0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    parts, owners = [], []
    for (path, leaf), leaf_axes in zip(flat, axes, strict=True):
        pieces, how = [], None
        if leaf_axes is not None:
            text = path_str(path)
            how = find_split(text, split)
            stacked = counts_blocks(text, leaf_axes, leaf.ndim)
            pieces = [
                Part(text, k, stacked, *piece)
                for k, piece in enumerate(cut(leaf, leaf_axes, how, text))
            ]
        owners.append((how, len(pieces)))
        parts += pieces

    if comm_dtype is None:
        directions = meet(orthogonalize, parts)
    else:
        sent = [part._replace(array=_round(part.array, comm_dtype)) for part in parts]
        found = meet(_in_float32(orthogonalize), sent)
        directions = [x.astype(part.array.dtype) for x, part in zip(found, parts, strict=True)]
    states = list(post_state) if post is not None else []
    for i, part in enumerate(parts):
        if post is not None:
            directions[i], states[i] = post.update(directions[i], part.axes, states[i])
        _, fan_in, fan_out = part.axes.sizes(part.array.shape)
        directions[i] = directions[i] * factor(fan_in, fan_out)

    out, start = [], 0
    for (_, leaf), leaf_axes, (how, count) in zip(flat, axes, owners, strict=True):
        if leaf_axes is None:
            out.append(leaf)
            continue
        out.append(join(directions[start : start + count], leaf, leaf_axes, how))
        start += count
    return jax.tree.unflatten(structure, out), tuple(states)


def _round(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounded and cast to a dtype; complex numbers stay as they are."""
    if jnp.iscomplexobj(x):
        return x
    kind = jnp.finfo(dtype)
    # XLA removes a pair of casts with nothing between them, as there is on one device.
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


@functools.cache  # one object per orthogonaliser, or eager calls recompile
def _in_float32(orthogonalize: Orthogonalizer) -> Orthogonalizer:
    def call(z: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(z):
            return orthogonalize(z)
        return _round(orthogonalize(z.astype(jnp.float32)), z.dtype)

    return call


def init_post(tree: Any, axes: list[MatrixAxes | None], split: Splits | None, post: Post | None):
    """The state of ``post``: a tuple with one entry per part, in tree order; () without it.

    Also raises for a split that does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> init_post({"w": jnp.ones((2, 3))}, [MatrixAxes((), (0,), (1,))], None, None)
        ()
    """
    states = []
    for (path, leaf), leaf_axes in zip(
        jax.tree_util.tree_leaves_with_path(tree), axes, strict=True
    ):
        if leaf_axes is None:
            continue
        text = path_str(path)
        for shape, part_axes in _shapes(leaf, leaf_axes, find_split(text, split), text):
            if post is not None:
                states.append(post.init(shape, part_axes))
    return tuple(states)


def shape_parts(tree: Any, axes: list[MatrixAxes | None], split: Splits | None) -> list[Part]:
    """The parts of a tree as :func:`orthogonalize_tree` makes them, of shapes instead of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> parts = shape_parts({"q": jnp.ones((2, 6))}, [MatrixAxes((), (0,), (1,))], {"q": 3})
        >>> parts[0].path, parts[0].array.shape
        ('q', (2, 3, 2))
    """
    parts = []
    flat = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), leaf_axes in zip(flat, axes, strict=True):
        if leaf_axes is not None:
            text = path_str(path)
            stacked = counts_blocks(text, leaf_axes, len(leaf.shape))
            cuts = _shapes(leaf, leaf_axes, find_split(text, split), text)
            parts += [Part(text, k, stacked, *piece) for k, piece in enumerate(cuts)]
    return parts


def _shapes(leaf: Any, axes: MatrixAxes, split: Split | None, path: str):
    """The parts of a leaf as shapes."""
    found: list[MatrixAxes] = []

    def parts(x):
        pieces = cut(x, axes, split, path)
        found.extend(part_axes for _, part_axes in pieces)
        return [part for part, _ in pieces]

    bare = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    return list(zip(jax.eval_shape(parts, bare), found, strict=True))
