"""Integers, keys and empty arrays bypass every transformation: no optimizer updates them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_FUNCTIONS_OF_PARAMS = ("value_fn", "grad_fn", "layered_value_fn")


class Passed(NamedTuple):
    """The placeholder of a leaf that bypasses a transformation: a node without leaves."""


def passing_by(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that never sees leaves that are not floating or have no elements.

    ``tx`` sees :class:`Passed` in their places, in parameters, gradients and extra arguments that
    are trees like them; functions of the parameters (``value_fn``, ``grad_fn``) see all leaves.
    Updates of the hidden leaves are returned as they came. Zeros replace missing updates and
    ``float0``, the dtype that ``jax.grad(..., allow_int=True)`` gives for integers.

    Args:
        tx: Any transformation.

    Returns:
        A transformation with the state of ``tx``; it is ``tx`` itself on trees without such leaves.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = passing_by(optax.adam(0.1))
        >>> params = {"w": jnp.ones(2), "count": jnp.int32(3), "none": jnp.ones((0, 4))}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["w"].round(4).tolist(), int(updates["count"]), updates["none"].shape
        ([-0.1, -0.1], 3, (0, 4))
    """
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return inner.init(_hidden(params, _passing(params)))

    def update(updates, state, params=None, **extra_args):
        like = updates if params is None else params
        passing = _passing(like)
        if params is not None and jax.tree.structure(updates) == jax.tree.structure(params):
            passing = [a or b for a, b in zip(passing, _passing(updates), strict=True)]
        if not any(passing):
            return inner.update(updates, state, params, **extra_args)

        def hide(tree):
            return _hidden(tree, passing) if _alike(tree, like) else tree

        def extra(name: str, value: Any) -> Any:
            if name in _FUNCTIONS_OF_PARAMS and value is not None:
                # A gradient is a tree like the parameters and is hidden too; a value is not.
                return lambda part, *more: hide(value(_shown(part, params, passing), *more))
            if isinstance(value, tuple) and not hasattr(value, "_fields"):
                return hide(value) if _alike(value, like) else tuple(map(hide, value))
            return hide(value)

        more = {name: extra(name, value) for name, value in extra_args.items()}
        new, state = inner.update(hide(updates), state, hide(params), **more)
        stay = params if updates is None else updates
        kept = [_as_it_came(x, updates is None) for x in jax.tree.leaves(stay)]
        return _shown(new, jax.tree.unflatten(jax.tree.structure(stay), kept), passing), state

    return optax.GradientTransformationExtraArgs(init, update)


def moves(x: Any) -> bool:
    """True if an optimizer updates an array of this dtype and shape.

    Example:
        >>> import jax.numpy as jnp
        >>> moves(jnp.ones(2)), moves(jnp.arange(2)), moves(jnp.ones((0, 2)))
        (True, False, False)
    """
    dtype = getattr(x, "dtype", None)
    dtype = jnp.result_type(x) if dtype is None else dtype
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and 0 not in jnp.shape(x)


def _passing(tree: Any) -> list[bool]:
    return [not moves(x) for x in jax.tree.leaves(tree)]


def _alike(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b)


def _hidden(tree: Any, passing: list[bool]) -> Any:
    """The tree with :class:`Passed` in place of the leaves to hide."""
    leaves, structure = jax.tree.flatten(tree)
    if not any(passing):
        return tree
    masked = [Passed() if by else x for x, by in zip(leaves, passing, strict=True)]
    return jax.tree.unflatten(structure, masked)


def _shown(part: Any, whole: Any, passing: list[bool]) -> Any:
    """The inverse: hidden leaves come from ``whole``, the others from ``part``."""
    rest = iter(jax.tree.leaves(part))
    leaves, structure = jax.tree.flatten(whole)
    return jax.tree.unflatten(
        structure, [x if by else next(rest) for x, by in zip(leaves, passing, strict=True)]
    )


def _as_it_came(x: Any, absent: bool) -> Any:
    if getattr(x, "dtype", None) == jax.dtypes.float0:
        return jnp.zeros(x.shape, jnp.int32)
    return jnp.zeros_like(x) if absent else x
