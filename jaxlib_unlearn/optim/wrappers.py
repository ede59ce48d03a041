"""Accumulate, skip and clip, for transformations that take two gradients.

Optax's wrappers see ``updates`` alone. Around ``update(primary, state, params, *,
constraint_grads)`` they are silently wrong: ``optax.MultiSteps`` passes on the last constraint
gradient instead of the mean, ``optax.apply_if_finite`` lets a NaN in it pass, and
``optax.clip_by_global_norm`` clips the primary gradient and not the other. The wrappers here handle
both gradients, and transformations with one as well.

Nest them as ``finite(accumulate(clip_streams(1.0, sift(1e-3)), k=4))``: ``finite`` is outermost, so
that one bad micro-batch is left out of the mean, and clipping innermost, so that the mean is
clipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.arrays import concrete
from jaxlib_unlearn.optim.combine import check_streams, remember
from jaxlib_unlearn.optim.passing import passing_by


class AccumulateState(NamedTuple):
    """The sums over the calls since the last step.

    ``constraint_sum`` has one tree like the parameters for every constraint gradient.
    """

    count: jax.Array  # () int32, calls since the last step, below k
    primary_sum: Any
    constraint_sum: tuple[Any, ...]
    inner_state: Any


class FiniteState(NamedTuple):
    """The counts of skipped steps; the names are those of ``optax.ApplyIfFiniteState``."""

    count: jax.Array  # () int32, calls
    notfinite_count: jax.Array  # () int32, consecutive ones up to now
    total_notfinite: jax.Array  # () int32
    last_finite: jax.Array  # () bool
    inner_state: Any


class ClipStreamsState(NamedTuple):
    """The last norm before clipping, and the inner state."""

    count: jax.Array  # () int32
    norm: jax.Array  # () float32
    inner_state: Any


def accumulate(
    tx: optax.GradientTransformation,
    k: int,
    *,
    num_constraints: int = 1,
    dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Take one step of ``tx`` for k calls, on the means of both gradients.

    .. math::
        \bar g_p = \frac{1}{k} \sum_{i=1}^k g_p^{(i)}, \qquad
        \bar g_c = \frac{1}{k} \sum_{i=1}^k g_c^{(i)}

    The other k - 1 calls return zeros and leave the inner state as it is. Every call has the same
    weight: sum micro-batches of unequal weight before the optimizer. Other extra arguments reach
    ``tx`` at the k-th call, with that call's value.

    Args:
        tx: The transformation that takes the step, with one gradient or several.
        k: The number of calls per step, static.
        num_constraints: The number of trees in ``constraint_grads``: with 1 it is a tree like the
            parameters, with more a tuple of them; 0 saves the memory if ``tx`` takes one gradient.
            (With 1 and no ``constraint_grads`` at ``update``, ``tx`` gets none.)
        dtype: The dtype of the sums; None for float32, or wider if the parameters are.

    Returns:
        A transformation whose state is an :class:`AccumulateState`.

    Raises:
        ValueError: a bad argument; at ``update``, no gradient, gradients of different structure, or
            a function (``value_fn``, ``grad_fn``), which would see the last micro-batch only. (The
            mean of k zeroth-order estimates is one estimate with k times the queries.)

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxlib_unlearn.optim.combine import weighted_sum
        >>> tx = accumulate(optax.chain(weighted_sum(), optax.sgd(1.0)), k=2)
        >>> state = tx.init(jnp.zeros(()))
        >>> for g, h in ((1.0, 10.0), (5.0, 1000.0)):
        ...     u, state = tx.update(jnp.float32(g), state, constraint_grads=jnp.float32(h))
        ...     print(float(u))
        0.0
        -508.0
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is a positive whole number, got {k!r}")
    if num_constraints < 0:
        raise ValueError(f"num_constraints must not be negative, got {num_constraints}")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        def zeros():
            return jax.tree.map(
                lambda p: jnp.zeros_like(p, dtype=_wide(p) if dtype is None else dtype), params
            )

        sums = tuple(zeros() for _ in range(num_constraints))
        return AccumulateState(jnp.zeros([], jnp.int32), zeros(), sums, inner.init(params))

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        for name in ("value_fn", "layered_value_fn", "grad_fn"):
            if extra_args.get(name) is not None:
                raise ValueError(f"accumulate cannot take the mean of a function, got {name}")
        if updates is None:
            raise ValueError("accumulate needs gradients: updates is None")
        streams = _streams(updates, constraint_grads)
        if constraint_grads is not None and len(streams) != num_constraints:
            raise ValueError(
                f"num_constraints={num_constraints}, but constraint_grads has {len(streams)}"
            )

        def add(total, gradient):
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), total, gradient)

        primary_sum = add(state.primary_sum, updates)
        sums = state.constraint_sum
        if streams:
            sums = tuple(add(s, stream) for s, stream in zip(sums, streams, strict=True))

        def step(primary_sum, sums, inner_state):
            def mean(total, like):
                return jax.tree.map(lambda s, g: (s / k).astype(g.dtype), total, like)

            extra = dict(extra_args)
            if constraint_grads is not None:
                means = tuple(map(mean, sums, streams))
                extra["constraint_grads"] = _packed(means, constraint_grads, updates)
            new, new_state = inner.update(mean(primary_sum, updates), inner_state, params, **extra)
            cleared = jax.tree.map(jnp.zeros_like, (primary_sum, sums))
            return _cast_like(new, updates), *cleared, _cast_like(new_state, inner_state)

        def wait(primary_sum, sums, inner_state):
            return jax.tree.map(jnp.zeros_like, updates), primary_sum, sums, inner_state

        done = state.count == k - 1
        args = primary_sum, sums, state.inner_state
        if concrete(done):
            new, primary_sum, sums, inner_state = (step if done else wait)(*args)
        else:
            new, primary_sum, sums, inner_state = jax.lax.cond(done, step, wait, *args)
        count = jnp.where(done, 0, state.count + 1)
        return new, AccumulateState(count, primary_sum, sums, inner_state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def finite(
    tx: optax.GradientTransformation, max_consecutive_errors: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip a step if anything is not finite: updates are zero, and the inner state stays.

    The check covers the primary gradient, ``constraint_grads``, the resulting updates, and entries
    of the inner state that became non-finite (a moment that overflowed, the value that a
    zeroth-order optimizer keeps). Entries that were infinite before the step, such as a best value
    not yet found, are no error.

    Args:
        tx: The transformation that takes the step, with one gradient or several, or ``value_fn``.
        max_consecutive_errors: The number of steps in a row that may be skipped; the next one is
            let through, so that the run fails visibly (as in ``optax.apply_if_finite``); None: no
            limit.

    Returns:
        A transformation whose state is a :class:`FiniteState`: log ``total_notfinite``.

    Raises:
        ValueError: a negative ``max_consecutive_errors``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxlib_unlearn.optim.combine import weighted_sum
        >>> tx = finite(optax.chain(weighted_sum(), optax.sgd(1.0)))
        >>> g = jnp.ones(2)
        >>> updates, state = tx.update(g, tx.init(g), constraint_grads=g.at[0].set(jnp.nan))
        >>> updates.tolist(), int(state.total_notfinite)
        ([0.0, 0.0], 1)
    """
    if isinstance(max_consecutive_errors, int) and max_consecutive_errors < 0:
        raise ValueError(
            f"max_consecutive_errors must not be negative, got {max_consecutive_errors}"
        )
    inner = optax.with_extra_args_support(tx)

    def init(params):
        # Separate buffers: one array used three times cannot be donated.
        count, in_a_row, total = (jnp.zeros([], jnp.int32) for _ in range(3))
        return FiniteState(count, in_a_row, total, jnp.asarray(True), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        old = state.inner_state
        new, new_state = inner.update(updates, old, params, **extra_args)
        new_state, like = _cast_like(new_state, old), params if updates is None else updates
        new = new if like is None else _cast_like(new, like)
        seen = (updates, extra_args.get("constraint_grads"), new)
        checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(seen) if _inexact(x)]
        checks += [
            jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))
            for after, before in zip(jax.tree.leaves(new_state), jax.tree.leaves(old), strict=True)
            if _inexact(after)
        ]
        good = jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)
        increment = optax.safe_increment
        in_a_row = jnp.where(good, 0, increment(state.notfinite_count))
        taken = good
        if max_consecutive_errors is not None:
            taken = good | (in_a_row > max_consecutive_errors)
        # Both results exist already: a select costs less than a branch that hides the step from
        # XLA.
        new = jax.tree.map(lambda u: jnp.where(taken, u, jnp.zeros_like(u)), new)
        inner_state = jax.tree.map(lambda n, o: jnp.where(taken, n, o), new_state, old)
        total = jnp.where(good, state.total_notfinite, increment(state.total_notfinite))
        count = jnp.asarray(increment(state.count))
        return new, FiniteState(count, in_a_row, total, good, inner_state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def clip_streams(
    max_norm: jax.typing.ArrayLike,
    inner: optax.GradientTransformation | None = None,
    *,
    norm: str = "sum",
) -> optax.GradientTransformationExtraArgs:
    r"""Scale both gradients by one factor, so that their angle and ratio are kept.

    .. math::
        g_p \leftarrow c\, g_p, \quad g_c \leftarrow c\, g_c, \qquad
        c = \min\left(1, \frac{\tau}{n}\right), \qquad
        n = \begin{cases} \|g_p + g_c\| & \text{"sum"} \\
        \sqrt{\|g_p\|^2 + \|g_c\|^2} & \text{"joint"} \end{cases}

    "sum" is ``optax.clip_by_global_norm`` on the gradient of the sum of the losses: if the inner
    transformation only adds the two gradients, the result is the same. It does not clip two large
    gradients that cancel; "joint" bounds each of them by tau.

    ``optax.chain`` passes the *same* extra arguments to all its members, so a link of a chain
    cannot clip ``constraint_grads`` for the next one: give the next one as ``inner``,
    ``clip_streams(1.0, sift(1e-3))``. Without ``inner`` this clips the primary gradient by the
    common factor and leaves ``constraint_grads`` unclipped. This is enough if the next link takes
    one gradient; a link of this package that takes two raises.

    Args:
        max_norm: The bound tau of the norm.
        inner: The transformation that receives the clipped gradients, or None.
        norm: The norm n that is bounded, "sum" or "joint".

    Returns:
        A transformation whose state is a :class:`ClipStreamsState`. Without ``constraint_grads``
        (with "joint" too) it is ``optax.clip_by_global_norm``.

    Raises:
        ValueError: a bad argument; at ``update``, no gradient or gradients of different structure.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxlib_unlearn.optim.combine import weighted_sum
        >>> tx = clip_streams(1.0, weighted_sum())
        >>> forget, retain = jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])
        >>> tx.update(forget, tx.init(forget), constraint_grads=retain)[0].tolist()
        [0.6, 0.8]
    """
    if norm not in ("sum", "joint"):
        raise ValueError(f"norm is 'sum' or 'joint', got {norm!r}")
    if isinstance(max_norm, int | float) and not max_norm > 0:
        raise ValueError(f"max_norm is positive, got {max_norm}")
    if inner is not None and not isinstance(inner, optax.GradientTransformation):
        raise ValueError(f"inner is an optax transformation or None, got {inner!r}")
    wrapped = optax.with_extra_args_support(optax.identity() if inner is None else inner)

    def init(params):
        zero = jnp.zeros([], jnp.float32)
        return ClipStreamsState(jnp.zeros([], jnp.int32), zero, wrapped.init(params))

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        if updates is None:
            raise ValueError("clip_streams needs gradients: updates is None")
        streams = (updates, *_streams(updates, constraint_grads))
        wide = [jax.tree.map(lambda x: x.astype(_wide(x)), stream) for stream in streams]
        if norm == "sum":
            length = optax.tree.norm(jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *wide))
        else:
            length = optax.tree.norm(wide)
        small = length <= max_norm
        factor = jnp.where(small, 1, max_norm / jnp.where(small, 1, length))
        clipped = [
            _cast_like(optax.tree.scale(factor, x), old)
            for x, old in zip(wide, streams, strict=True)
        ]
        if constraint_grads is not None:
            extra_args["constraint_grads"] = _packed(clipped[1:], constraint_grads, updates)
        new, inner_state = wrapped.update(clipped[0], state.inner_state, params, **extra_args)
        count = jnp.asarray(optax.safe_increment(state.count))
        new = _cast_like(new, updates)
        if inner is None and constraint_grads is not None:
            remember(
                new,
                constraint_grads,
                "clip_streams without inner clips the primary gradient alone; give it the next "
                "link as its own: clip_streams(max_norm, inner)",
            )
        return new, ClipStreamsState(count, length.astype(jnp.float32), inner_state)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def _streams(primary: Any, constraint: Any) -> tuple[Any, ...]:
    """The constraint gradients as a tuple of trees like the primary one."""
    if constraint is None:
        return ()
    if isinstance(constraint, tuple) and not _alike(primary, constraint):
        for stream in constraint:
            check_streams(primary, stream)
        return constraint
    check_streams(primary, constraint)
    return (constraint,)


def _packed(streams: Any, constraint: Any, primary: Any) -> Any:
    """The streams in the form in which they came: one tree, or a tuple of trees."""
    return streams[0] if _alike(primary, constraint) else tuple(streams)


def _alike(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _cast_like(new: Any, old: Any) -> Any:
    # Not optax.tree.cast_like: an inner state may hold typed keys, which no astype takes.
    def cast(n, o):
        return n if n.dtype == o.dtype else n.astype(o.dtype)

    return jax.tree.map(cast, new, old)
