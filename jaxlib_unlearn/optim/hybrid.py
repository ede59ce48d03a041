"""Alternating first-order and zeroth-order steps (hybrid FO-ZO)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.arrays import concrete, explicit_sharding
from jaxlib_unlearn.optim.passing import passing_by


class AlternateState(NamedTuple):
    """The states of both optimizers; each state advances in its optimizer's blocks only."""

    count: jax.Array  # () int32
    first_order: Any
    zeroth_order: Any


def alternate(
    first_order: optax.GradientTransformation,
    zeroth_order: optax.GradientTransformation,
    period: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Alternate blocks of first-order and of zeroth-order steps, first order first.

    .. math::
        \text{step } t \text{ is first-order iff } \lfloor t / N \rfloor \text{ is even}

    ``update(updates, state, params, *, value_fn, grad_fn=None)``. With ``grad_fn(params) ->
    gradients`` the gradient is computed inside the first-order branch of a ``lax.cond``, and
    ``updates`` is ignored (pass None): a zeroth-order step runs no backward pass. Without
    ``grad_fn``, ``updates`` is the gradient, which the caller computes at every step. (Under
    ``jax.vmap`` over ``count`` both branches run.)

    ``value_fn`` (or ``layered_value_fn``) goes to the zeroth-order part, ``grad_fn`` to the
    first-order one (which may contain ``sam``), every other extra argument to both. Learning rates
    belong to the parts; their schedules count their own steps. Both states persist: memory is the
    sum of the two.

    Args:
        first_order: A whole optimizer (with its learning rate), e.g. ``optax.adamw(1e-5)``.
        zeroth_order: Another optimizer, which takes ``value_fn``.
        period: The length N of a block in steps, static. The paper found the result insensitive to
            it and used 20 for both kinds. Round the number of steps with
            :func:`round_to_zeroth_order`: the robustness comes from ending on zeroth order.

    Returns:
        A transformation whose state is an :class:`AlternateState`; updates have the parameters'
        dtypes.

    Raises:
        ValueError: ``period`` is not a positive whole number; at ``update``, params, ``value_fn``
            or every gradient is missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def descend(updates, state, params, *, value_fn):  # a toy zeroth-order part
        ...     return -0.1 * jnp.sign(value_fn(params + 0.01) - value_fn(params)), state
        >>> toy = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), descend)
        >>> tx, w, loss = alternate(optax.sgd(0.25), toy, period=1), jnp.float32(3.0), jnp.square
        >>> state = tx.init(w)
        >>> functions = {"value_fn": loss, "grad_fn": jax.grad(loss)}
        >>> for _ in range(2):
        ...     updates, state = tx.update(None, state, w, **functions)
        ...     w = w + updates
        ...     print(round(float(w), 3))
        1.5
        1.4

    References:
        Lang et al., arXiv:2510.00761 (hybrid FO-ZO).
    """
    _check_period(period)
    first = optax.with_extra_args_support(first_order)
    zeroth = optax.with_extra_args_support(zeroth_order)

    def init(params):
        return AlternateState(jnp.zeros([], jnp.int32), first.init(params), zeroth.init(params))

    def update(updates, state, params=None, *, value_fn=None, grad_fn=None, **extra_args):
        if params is None:
            raise ValueError("alternate needs update(updates, state, params, ...): params is None")
        if value_fn is None and extra_args.get("layered_value_fn") is None:
            raise ValueError("alternate needs update(..., value_fn=f) with f(params) -> loss")
        if updates is None and grad_fn is None:
            raise ValueError("alternate needs grad_fn=f with f(params) -> gradients, or updates")

        def like(new, old):  # both branches of `lax.cond` return the same types
            new, sharding = jnp.asarray(new, old.dtype), explicit_sharding(old)
            return new if sharding is None else jax.sharding.reshard(new, sharding)

        def cast(new, old):
            return jax.tree.map(like, new, old)

        def first_step(first_state, zeroth_state):
            gradient: Any = updates
            extra = extra_args
            if grad_fn is not None:
                gradient, extra = grad_fn(params), {**extra_args, "grad_fn": grad_fn}
            new, new_state = first.update(gradient, first_state, params, **extra)
            return cast(new, params), cast(new_state, first_state), zeroth_state

        def zeroth_step(first_state, zeroth_state):
            extra = extra_args if value_fn is None else {**extra_args, "value_fn": value_fn}
            nothing: Any = None
            new, new_state = zeroth.update(nothing, zeroth_state, params, **extra)
            return cast(new, params), first_state, cast(new_state, zeroth_state)

        is_first, states = (state.count // period) % 2 == 0, (state.first_order, state.zeroth_order)
        if concrete(is_first):
            new, first_state, zeroth_state = (first_step if is_first else zeroth_step)(*states)
        else:
            new, first_state, zeroth_state = jax.lax.cond(
                is_first, first_step, zeroth_step, *states
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return new, AlternateState(count, first_state, zeroth_state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def ends_on_zeroth_order(steps: int, period: int = 20) -> bool:
    """True if a run of that many steps of :func:`alternate` ends with a whole zeroth-order block.

    Args:
        steps: The number of steps of the run.
        period: The length of a block in steps.

    Returns:
        True for positive multiples of ``2 * period``.

    Raises:
        ValueError: ``period`` is not a positive whole number.

    Example:
        >>> [ends_on_zeroth_order(steps) for steps in (20, 40, 50)]
        [False, True, False]
    """
    _check_period(period)
    return steps > 0 and steps % (2 * period) == 0


def round_to_zeroth_order(steps: int, period: int = 20) -> int:
    """The smallest number of steps, at least those asked for, that ends on zeroth order.

    Args:
        steps: The number of steps asked for.
        period: The length of a block in steps.

    Returns:
        A positive multiple of ``2 * period``.

    Raises:
        ValueError: ``period`` is not a positive whole number.

    Example:
        >>> [round_to_zeroth_order(steps) for steps in (1, 40, 41)]
        [40, 40, 80]
    """
    _check_period(period)
    return max(1, -(-steps // (2 * period))) * 2 * period


def _check_period(period: int) -> None:
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"period is a positive whole number, got {period!r}")
