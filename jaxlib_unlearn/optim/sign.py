"""Low-grade updates: the sign of the momentum, and directions rounded to a few bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.first_moments import widen
from jaxlib_unlearn.optim.matrices import path_str
from jaxlib_unlearn.optim.passing import passing_by
from jaxlib_unlearn.optim.rules import stack_depth
from jaxlib_unlearn.optim.signatures import Decay, Dtype


class SignMomentumState(NamedTuple):
    """State of sign momentum: the number of steps and the momentum, a tree like the parameters."""

    count: jax.Array  # () int32
    mu: optax.Updates


def scale_by_sign_momentum(
    beta: jax.typing.ArrayLike = 0.9, *, mu_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The sign of an averaged gradient: no learning rate, no decay.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad u_t = \mathrm{sign}(m_t), \quad
        \mathrm{sign}(0) = 0

    This is exactly the sign of Adam's direction with the same first decay and any second decay
    (Adam divides the same average by a positive number), without the second moment.

    Args:
        beta: The decay of the average, in [0, 1); 0 is signSGD.
        mu_dtype: The dtype of the momentum; None for the parameters'.

    Returns:
        A transformation whose state is a :class:`SignMomentumState`.

    Raises:
        ValueError: ``beta`` outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> tx, g = scale_by_sign_momentum(), jnp.array([3.0, -1e-6, 0.0])
        >>> tx.update(g, tx.init(g))[0]
        Array([ 1., -1.,  0.], dtype=float32)

    References:
        Bernstein et al., arXiv:1802.04434, algorithm 2 (Signum).
        Lang et al., arXiv:2510.00761 (signAdam as a low-grade optimizer for unlearning).
    """
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta lies in [0, 1), got {beta}")

    def init(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params)
        return SignMomentumState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        mu = optax.tree.update_moment(updates, widen(state.mu, updates), beta, 1)
        direction = jax.tree.map(lambda m, g: jnp.sign(m).astype(g.dtype), mu, updates)
        mu = optax.tree.cast_like(mu, state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return direction, SignMomentumState(count, mu)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def sign_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: Decay = 0.9,
    weight_decay: float | jax.Array = 0.0,
    mask: Any = None,
    mu_dtype: Dtype = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum, which is signAdam: every coordinate moves by the learning rate.

    .. math::
        \theta \leftarrow \theta - \eta \left( \mathrm{sign}(m_t) + \lambda \theta \right)

    Adam's learning rate is a good first guess, SGD's is far too large.

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        beta: The decay of the momentum; 0 is signSGD.
        weight_decay: The decoupled weight decay lambda.
        mask: The leaves that decay, as in ``optax.add_decayed_weights``; None for all leaves.
        mu_dtype: The dtype of the momentum; None for the parameters'.

    Returns:
        A transformation.

    Raises:
        ValueError: ``beta`` outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = sign_momentum(0.01), jnp.ones(2)
        >>> tx.update(jnp.array([5.0, -0.2]), tx.init(params), params)[0]
        Array([-0.01,  0.01], dtype=float32)

    References:
        Lang et al., arXiv:2510.00761.
    """
    return passing_by(
        optax.chain(
            scale_by_sign_momentum(beta, mu_dtype=mu_dtype),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def quantize_updates(bits: int) -> optax.GradientTransformationExtraArgs:
    r"""Round every tensor of the updates to symmetric levels; one bit keeps the sign alone.

    .. math::
        Q(m; N) = s \, \mathrm{round}(m / s), \quad s = \frac{\max |m|}{2^{N-1} - 1}
        \quad (N > 1), \qquad Q(m; 1) = \mathrm{sign}(m)

    It rounds the direction: chain it after ``optax.scale_by_adam`` and before the learning rate.
    The paper does not give the form for N > 1; this one is ours. A tensor belongs to one layer:
    every index of a layer axis (below ``layers``, ``blocks``, .., as in ``optim.matrices``) has its
    own scale, so a stacked model rounds like an unstacked one. Complex tensors are rounded by their
    real and imaginary parts.

    Args:
        bits: The number N of bits, static, 1 to 53.

    Returns:
        A transformation without state. With more than one bit a tensor that is not finite becomes
        NaN.

    Raises:
        ValueError: ``bits`` is not a whole number from 1 to 53.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, m = quantize_updates(3), jnp.array([3.0, -1.2, 0.4])
        >>> tx.update(m, tx.init(m))[0]
        Array([ 3., -1.,  0.], dtype=float32)

    References:
        Lang et al., arXiv:2510.00761 (compressed first-order optimizers).
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 53:
        raise ValueError(f"bits is a whole number from 1 to 53, got {bits!r}")

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree_util.tree_map_with_path(lambda p, m: _round(p, m, bits), updates), state

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def _round(path: Any, m: jax.Array, bits: int) -> jax.Array:
    if bits == 1:
        return jnp.sign(m)
    if jnp.iscomplexobj(m):
        return jax.lax.complex(*(_round(path, part, bits) for part in (jnp.real(m), jnp.imag(m))))
    lead = min(stack_depth(path_str(path).split("/"), m.ndim), m.ndim)
    x = m.astype(jnp.promote_types(m.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x), axis=tuple(range(lead, m.ndim)), keepdims=True)
    step = largest / (2.0 ** (bits - 1) - 1)
    return jnp.where(largest == 0, x, step * jnp.round(x / step)).astype(m.dtype)
