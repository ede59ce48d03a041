"""Losses on hidden states: distances to a target direction or to the frozen model's own states."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import upcast


def squared_error(hidden: ArrayLike, target: ArrayLike) -> jax.Array:
    r"""Mean squared error over channels, per position.

    .. math::
        e_{b,t} = \frac1d \sum_i (h_{b,t,i} - y_{b,t,i})^2

    Args:
        hidden: ``(B, T, d)``, in any float dtype.
        target: targets of the same shape, ``(d,)`` for all positions or ``(B, 1, d)`` for the
            positions of a row; no gradient reaches them.

    Returns:
        ``(B, T)``, float32 at least.

    Example:
        >>> squared_error(jnp.ones((1, 2, 4)), jnp.zeros(4)).tolist()
        [[1.0, 1.0]]

    Paper:
        Li et al. 2024, arXiv:2403.03218, section 4 (RMU).
    """
    wide = upcast(hidden)
    return jnp.mean(jnp.square(wide - jax.lax.stop_gradient(upcast(target))), -1)
