"""From a tree of momenta to a tree of directions: cut, orthogonalise, post-process, scale, join.

The optimizers for matrices share this. A leaf is cut into parts (heads, fused q/k/v), all parts go
through the buckets at once, and each comes back scaled by the shape of its matrices. The ``meet``
argument combines parts for the orthogonaliser: each alone for Muon, in groups for TEON.

On a mesh all matrices are sent twice, to the devices that orthogonalise them and back. With a
``comm_dtype`` they are sent in that dtype. They are rounded on a single device, too, so that a step
does not depend on the number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.matrices import MatrixAxes
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.spectral.buckets import map_matrices
from jaxlib_unlearn.optim.spectral.plan import Part, plan_of
from jaxlib_unlearn.optim.spectral.post import Post
from jaxlib_unlearn.optim.spectral.splitting import Splits, cut, join

Factor = Callable[[int, int], float]

SHAPE_SCALES: dict[str, Factor] = {
    "unit": lambda fan_in, fan_out: 1.0,
    "width": lambda fan_in, fan_out: max(1.0, fan_out / fan_in) ** 0.5,
    "spectral": lambda fan_in, fan_out: (fan_out / fan_in) ** 0.5,
    "match_rms": lambda fan_in, fan_out: 0.2 * max(fan_in, fan_out) ** 0.5,
}
"""The factors of a direction, from the numbers of inputs and outputs of one matrix."""


Meet = Callable[[Orthogonalizer, Sequence[Part], Sequence[jax.Array]], list[jax.Array]]
"""A function that orthogonalises the arrays of parts, :func:`alone` or in groups."""


def alone(
    orthogonalize: Orthogonalizer, parts: Sequence[Part], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """Orthogonalise every matrix on its own, as Muon does.

    Args:
        orthogonalize: The orthogonaliser, ``(n, r, c) -> (n, r, c)``.
        parts: The description of every array.
        arrays: The matrices to orthogonalise, one array a part.

    Returns:
        Arrays like ``arrays``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> part = Part("w", 0, False, (2, 2), MatrixAxes((), (0,), (1,)))
        >>> alone(svd(), [part], [3 * jnp.eye(2)])[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    axes, roles = [part.axes for part in parts], [part.role for part in parts]
    return map_matrices(orthogonalize, arrays, axes, roles)


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
    """Orthogonalise the matrices of a tree in buckets and scale them by their shape.

    Args:
        orthogonalize: The orthogonaliser, ``(n, r, c) -> (n, r, c)``.
        tree: A tree of arrays.
        axes: The axes of every leaf; leaves with None are passed on as they are.
        factor: The factor of a direction, a function ``(in, out) -> number``.
        split: The leaves to cut first, by path.
        post: The step that follows the orthogonalisation, applied to every part.
        post_state: The state of that step, from :func:`init_post`.
        meet: The function that hands parts to the orthogonaliser.
        comm_dtype: The dtype to which real matrices and their directions are rounded on the way to
            the orthogonaliser, which then works in float32, and back; None: nothing is rounded.

    Returns:
        A tree like ``tree`` and the new ``post_state``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> orthogonalize_tree(svd(), [3 * jnp.eye(2)], [MatrixAxes((), (0,), (1,))])[0][0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    leaves, structure = jax.tree.flatten(tree)
    plan = plan_of(tree, axes, split)
    arrays = []
    for leaf, leaf_axes, how in zip(leaves, axes, plan.splits, strict=True):
        if leaf_axes is not None:
            arrays += [leaf] if how is None else cut(leaf, leaf_axes, how)

    if comm_dtype is None:
        directions = meet(orthogonalize, plan.parts, arrays)
    else:
        sent = [_round(x, comm_dtype) for x in arrays]
        found = meet(_in_float32(orthogonalize), plan.parts, sent)
        directions = [x.astype(array.dtype) for x, array in zip(found, arrays, strict=True)]
    states = list(post_state) if post is not None else []
    for i, (part, (fan_in, fan_out)) in enumerate(zip(plan.parts, plan.sides, strict=True)):
        if post is not None:
            directions[i], states[i] = post.update(directions[i], part.axes, states[i])
        directions[i] = directions[i] * factor(fan_in, fan_out)

    rest, out = iter(directions), []
    for leaf, leaf_axes, how, count in zip(leaves, axes, plan.splits, plan.counts, strict=True):
        here = [next(rest) for _ in range(count)]
        if how is not None and leaf_axes is not None:
            here = [join(here, leaf, leaf_axes, how)]
        out += here or [leaf]
    return jax.tree.unflatten(structure, out), tuple(states)


def _round(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounded and cast to a dtype; complex numbers stay as they are."""
    if jnp.iscomplexobj(x):
        return x
    kind = jnp.finfo(dtype)
    # On one device nothing stands between the two casts, and XLA would remove them.
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)


@functools.cache  # one object per orthogonaliser, or eager calls recompile
def _in_float32(orthogonalize: Orthogonalizer) -> Orthogonalizer:
    def call(z: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(z):
            return orthogonalize(z)
        return _round(orthogonalize(z.astype(jnp.float32)), z.dtype)

    return call


def init_post(
    tree: Any, axes: list[MatrixAxes | None], split: Splits | None, post: Post | None
) -> tuple[Any, ...]:
    """The state of ``post``: a tuple with one entry per part, in tree order; () without it.

    This raises for a split that does not fit its leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> init_post({"w": jnp.ones((2, 3))}, [MatrixAxes((), (0,), (1,))], None, None)
        ()
    """
    plan = plan_of(tree, axes, split)
    if post is None:
        return ()
    dtypes = [
        leaf.dtype
        for leaf, count in zip(jax.tree.leaves(tree), plan.counts, strict=True)
        for _ in range(count)
    ]
    return tuple(
        post.init(jax.ShapeDtypeStruct(part.shape, dtype), part.axes)
        for part, dtype in zip(plan.parts, dtypes, strict=True)
    )
