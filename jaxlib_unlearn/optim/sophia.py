r"""Sophia-G for unlearning: the second-order end of the grade scale, in the two published forms.

======================  =================================  =====================================
form                    momentum                           direction
======================  =================================  =====================================
"soul", as SOUL ran it  m <- b1^2 m + (1 - b1^2) g         sign(m) min(1, |m| / (rho bs h + eps))
"paper"                 m <- b1 m + (1 - b1) g             clip(m / max(rho bs h, eps), -1, 1)
======================  =================================  =====================================

Both forms update h <- b2 h + (1 - b2) g * g at every step, with the gradient of that step, and have
no bias correction. SOUL's code averages the same gradient into the momentum twice per step, which
is one average with b1^2. The default is "soul", which gave the published numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.first_moments import widen
from jaxlib_unlearn.optim.passing import passing_by
from jaxlib_unlearn.optim.signatures import Decay, Dtype


class SophiaState(NamedTuple):
    """State of Sophia: the number of steps, and momentum and curvature like the parameters."""

    count: jax.Array  # () int32
    mu: optax.Updates
    h: optax.Updates  # float32, or float64 for float64 parameters


def scale_by_sophia(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    rho: jax.typing.ArrayLike = 0.04,
    *,
    form: str = "soul",
    batch_scale: jax.typing.ArrayLike = 5120.0,
    eps: jax.typing.ArrayLike = 1e-15,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The clipped Newton-like direction of Sophia-G: no learning rate, no decay.

    .. math::
        h_t = \beta_2 h_{t-1} + (1 - \beta_2) g_t^2, \qquad
        u_t = \mathrm{clip}\left( \frac{m_t}{\max(\gamma h_t, \epsilon)}, 1 \right), \qquad
        \gamma = \rho \cdot bs

    Every coordinate lies in [-1, 1]; if h is far below \|m\|, it is the sign.

    Args:
        b1: The decay of the momentum (SOUL: 0.9).
        b2: The decay of the curvature (SOUL: 0.95).
        rho: The factor of the curvature: the larger it is, the more coordinates are not clipped
            (SOUL: 0.04).
        form: The form of momentum and direction, "soul" or "paper": see the module's table.
        batch_scale: The factor bs, a constant of SOUL's code; with 1, ``rho`` is the paper's gamma.
        eps: The floor of the denominator. SOUL's value is small, as h holds *squared* gradients.
        mu_dtype: The dtype of the momentum; None for the parameters'. The curvature is float32 or
            wider: squares of small gradients vanish in 16 bits.

    Returns:
        A transformation whose state is a :class:`SophiaState`. Real parameters only.

    Raises:
        ValueError: an unknown form or a number out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, g = scale_by_sophia(), jnp.array([1e-3, -0.1])
        >>> [round(float(x), 4) for x in tx.update(g, tx.init(g))[0]]
        [1.0, -0.1855]

    References:
        Jia et al., "SOUL", arXiv:2404.18239, section 5; Liu et al., "Sophia", arXiv:2305.14342.
    """
    if form not in ("soul", "paper"):
        raise ValueError(f"form is 'soul' or 'paper', got {form!r}")
    for name, value in (("b1", b1), ("b2", b2)):
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name} lies in [0, 1), got {value}")
    for name, value in (("rho", rho), ("batch_scale", batch_scale), ("eps", eps)):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is positive, got {value}")
    beta = b1 * b1 if form == "soul" else b1  # type: ignore[operator]

    def init(params):
        return SophiaState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params),
        )

    def direction(m, h, g):
        m = m.astype(h.dtype)
        scaled = rho * batch_scale * h
        floored = scaled + eps if form == "soul" else jnp.maximum(scaled, eps)
        return jnp.clip(m / floored, -1, 1).astype(g.dtype)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        wide = jax.tree.map(lambda g, h: g.astype(h.dtype), updates, state.h)
        h = optax.tree.update_moment(wide, state.h, b2, 2)
        mu = optax.tree.update_moment(updates, widen(state.mu, updates), beta, 1)
        out = jax.tree.map(direction, mu, h, updates)
        mu, h = optax.tree.cast_like((mu, h), (state.mu, state.h))
        return out, SophiaState(jnp.asarray(optax.safe_increment(state.count)), mu, h)

    return passing_by(optax.GradientTransformationExtraArgs(init, update))


def sophia(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.95,
    rho: jax.typing.ArrayLike = 0.04,
    form: str = "soul",
    batch_scale: jax.typing.ArrayLike = 5120.0,
    eps: jax.typing.ArrayLike = 1e-15,
    weight_decay: float | jax.Array = 0.0,
    mask: Any = None,
    mu_dtype: Dtype = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-G with decoupled weight decay, as SOUL uses it for unlearning.

    .. math::
        \theta \leftarrow \theta - \eta \left( u_t + \lambda \theta \right)

    with the direction :math:`u_t` of :func:`scale_by_sophia`. No coordinate moves further than eta
    (decay aside).

    Args:
        learning_rate: The learning rate eta, a number or a schedule (SOUL on TOFU: 5e-6 or 1e-5).
        b1: The decay of the momentum.
        b2: The decay of the curvature.
        rho: see :func:`scale_by_sophia`.
        form: The form of momentum and direction, "soul" or "paper".
        batch_scale: see :func:`scale_by_sophia`.
        eps: The floor of the denominator.
        weight_decay: The decoupled weight decay lambda (SOUL on TOFU: 0.1, but not on biases and
            norms).
        mask: The leaves that decay, as in ``optax.add_decayed_weights``; None for all leaves.
        mu_dtype: The dtype of the momentum; None for the parameters'.

    Returns:
        A transformation.

    Raises:
        ValueError: an unknown form or a number out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = sophia(0.1, weight_decay=0.5), jnp.ones(2)
        >>> tx.update(jnp.array([1e-3, -1e-3]), tx.init(params), params)[0]
        Array([-0.15,  0.05], dtype=float32)

    References:
        Jia et al., "SOUL", arXiv:2404.18239.
    """
    return passing_by(
        optax.chain(
            scale_by_sophia(
                b1, b2, rho, form=form, batch_scale=batch_scale, eps=eps, mu_dtype=mu_dtype
            ),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
