"""The common options of the zeroth-order methods, and their documentation.

A method is a function that calls ``engine.zeroth_order`` with a family of directions and its own
settings of the step. :func:`zeroth_order_method` adds the rest:

    @zeroth_order_method
    def mezo(learning_rate, **options: Unpack[ZOOptions]):
        return zeroth_order(learning_rate, perturbations.dense(), **options)
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import ParamSpec, TypedDict, TypeVar

import jax

from jaxlib_unlearn.optim.signatures import spelled_out
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.leaves import Trainable

P = ParamSpec("P")
R = TypeVar("R")

# The defaults are those of ``engine.zeroth_order``.


class DrawOptions(TypedDict, total=False):
    """Options for drawing and evaluating directions of any family."""

    seed: int
    query_batch: int | None
    query_axis: str | None
    trainable: Trainable | None
    rng_impl: str


class CentralOptions(DrawOptions, total=False):
    """Options of a method that has one estimator, central differences."""

    num_queries: int
    eps: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike


class ZOOptions(CentralOptions, total=False):
    """Options of every other method."""

    estimator: str


_PLACE = "options: The options that all methods share."

_ARGS = {
    "num_queries": "The number q of directions that are averaged per step.",
    "eps": "The step epsilon along a direction.",
    "estimator": 'The estimator of the coefficients, "central", "forward" or "jvp".',
    "weight_decay": "The decoupled weight decay lambda of matrices.",
    "seed": "The seed of all draws.",
    "query_batch": "The number of evaluations at a time; None for one.",
    "query_axis": "The mesh axis over which evaluations are split.",
    "trainable": "A function of a path that says whether the leaf is trained; None for all leaves.",
    "rng_impl": "The random bit generator.",
}

_SECTIONS = """\
Returns:
    A transformation; ``update`` takes ``value_fn=`` (see ``zeroth_order``).

Raises:
    ValueError: a bad argument, or a masked tree.

Example:
    >>> import jax, jax.numpy as jnp
    >>> params, tx = {"w": jnp.ones((2, 3))}, NAME(1e-3)
    >>> def step(params, state):
    ...     return tx.update(None, state, params, value_fn=lambda p: jnp.sum(p["w"]))
    >>> updates, state = jax.jit(step)(params, tx.init(params))
    >>> updates["w"].shape, round(float(state.value), 3)
    ((2, 3), 6.0)
"""


def zeroth_order_method(factory: Callable[P, R]) -> Callable[P, R]:
    """A zeroth-order method with the common options in its signature and its documentation.

    Args:
        factory: A function ``(learning_rate, *, ..., **options) ->
            transformation``. Its docstring has the entry ``options: The options that all methods
            share.`` in "Args:", which is replaced by the entries of the common options (except for
            options with an entry of their own), and a section "References:", before which the other
            sections are inserted.

    Returns:
        The method.

    Example:
        >>> from typing import Unpack
        >>> from jaxlib_unlearn.optim.zeroth_order import perturbations
        >>> @zeroth_order_method
        ... def ours(learning_rate, *, keep: float = 0.5, **options: Unpack[ZOOptions]):
        ...     return zeroth_order(learning_rate, perturbations.sparse(keep), **options)
        >>> list(inspect.signature(ours).parameters)[:4]
        ['learning_rate', 'keep', 'num_queries', 'eps']
    """
    method = spelled_out(zeroth_order)(factory)
    doc = inspect.getdoc(factory)
    if doc:  # there is none under -OO
        shown = inspect.signature(method).parameters
        # An entry of the method's own docstring stays.
        args = "\n".join(
            f"{name}: {text}"
            for name, text in _ARGS.items()
            if name in shown and f"\n    {name}: " not in doc
        )
        doc = doc.replace(_PLACE, textwrap.indent(args, "    ").lstrip())
        sections = _SECTIONS.replace("NAME", factory.__name__)
        method.__doc__ = doc.replace("\nReferences:", f"\n{sections}\nReferences:")
    return method
