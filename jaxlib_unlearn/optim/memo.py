"""Results that depend on names and shapes alone, computed once for every tree."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def once(fn: Callable[P, R]) -> Callable[P, R]:
    """Remember the results of a function of static data, the 256 that were used last.

    Arguments are tree structures, shapes and options, never arrays, so nothing large is kept alive
    and a result is the same inside and outside of ``jit``. For arguments that cannot be hashed (a
    module with a list among its static fields) the function is called again.

    Args:
        fn: A function of positional arguments. Its results must not be changed by callers.

    Returns:
        A function with the same arguments and results.

    Example:
        >>> double = once(lambda x: [*x, *x])
        >>> double((1,)) is double((1,)), double([1]) is double([1])
        (True, False)
    """
    remembered = functools.lru_cache(maxsize=256)(fn)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return fn(*args)  # type: ignore[call-arg]
        return remembered(*args)

    return call  # type: ignore[return-value]


def outline(tree: Any) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """The structure of a tree and the shapes of its leaves, as arguments for :func:`once`.

    Args:
        tree: A tree of arrays or shapes.

    Returns:
        The structure and one shape a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> outline({"w": jnp.ones((2, 3))})
        (PyTreeDef({'w': *}), ((2, 3),))
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(tuple(x.shape) for x in leaves)
