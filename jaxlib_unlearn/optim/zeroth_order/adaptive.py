"""Zeroth-order methods that keep arrays as large as the parameters: HiZOO and R-AdaZO."""

from typing import Annotated, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.signatures import Allowed
from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.options import (
    CentralOptions,
    ZOOptions,
    zeroth_order_method,
)
from jaxlib_unlearn.optim.zeroth_order.steps import Rule


@zeroth_order_method
def hizoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    smoothing: Annotated[jax.typing.ArrayLike, Allowed(low=0, high=1)] = 1e-8,
    **options: Unpack[CentralOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""HiZOO: directions scaled by a diagonal curvature estimated from the same values.

    .. math::
        Z_i = z_i / \sqrt{H}, \quad h_i = |f_+ + f_- - 2 f_0| / (2 \epsilon^2), \\
        H \leftarrow (1 - \alpha) H + \alpha \tfrac1q \textstyle\sum_i h_i H z_i^2, \\
        W \leftarrow W - \eta \, ( \tfrac1q \textstyle\sum_i c_i z_i / \sqrt{H} + \lambda W )

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        smoothing: The share alpha of a step in the curvature H. H starts at one, in float32: in
            half precision it could not change.
        options: The options that all methods share.

    References:
        Zhao et al., arXiv:2402.15173.
    """

    def apply(g, h, moments, count):
        del count
        # g and h were summed over z / sqrt(H) and its square, with H from before the step.
        old = moments["hessian"]
        alpha = jnp.asarray(smoothing, old.dtype)
        new = (1 - alpha) * old + alpha * jnp.square(old) * h
        return g * jnp.sqrt(old / new), {"hessian": new}

    return zeroth_order(
        learning_rate,
        perturbations.curvature(),
        rule=Rule({"hessian": 1.0}, apply, curvature=True),
        **options,
    )


@zeroth_order_method
def rada_zo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    zeta: jax.typing.ArrayLike = 1e-8,
    bias_correction: bool = True,
    directions: str = "sphere",
    **options: Unpack[ZOOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""R-AdaZO: Adam's moments of a zeroth-order estimate, the second one of the *momentum*.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \hat g_t, \quad
        \hat m_t = m_t / (1 - \beta_1^t), \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \hat m_t^2, \\
        \theta \leftarrow \theta - \eta\, \hat m_t / \sqrt{v_t / (1 - \beta_2^t) + \zeta}

    The published form (``bias_correction=False``) has no divisions: :math:`v_t` averages
    :math:`m_t^2` and the step is :math:`\eta\, m_t / \sqrt{v_t + \zeta}`: the first one is
    :math:`1 / \sqrt{1 - \beta_2}` (10) learning rates long in every coordinate, and steps on pure
    noise are still 3.8 long after 10 and 2.2 after 30 steps.

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        b1: The decay of m.
        b2: The decay of v.
        zeta: The number zeta that is added inside the root.
        bias_correction: True for the divisions above. The momentum is corrected *before* it is
            squared: corrected afterwards, both factors would leave the first step as long as
            without them.
        directions: The distribution of directions: "sphere", over all parameters at once, with the
            factor d and the radius eps sqrt(d); or "gaussian".
        options: The options that all methods share.

    References:
        Shu et al., "Refining adaptive zeroth-order optimization at ease" (ICML 2025).
    """
    families = {"sphere": perturbations.sphere, "gaussian": perturbations.dense}
    if directions not in families:
        raise ValueError(f"directions is one of {list(families)}, got {directions!r}")
    return zeroth_order(
        learning_rate,
        families[directions](),
        rule=adaptive_rule(b1, b2, zeta, bias_correction),
        **options,
    )


def adaptive_rule(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    zeta: jax.typing.ArrayLike,
    bias_correction: bool = True,
) -> Rule:
    """The rule of :func:`rada_zo`, for any family of directions.

    Args:
        b1: The decay of the momentum.
        b2: The decay of the momentum's square.
        zeta: The number zeta that is added inside the root.
        bias_correction: True to correct both averages for their start at zero; False: as published.

    Returns:
        A rule with the moments "mu" and "nu".

    Example:
        >>> import jax.numpy as jnp
        >>> rule = adaptive_rule(0.9, 0.99, 0.0)
        >>> zero = {"mu": jnp.zeros(()), "nu": jnp.zeros(())}
        >>> direction, _ = rule.apply(jnp.float32(5.0), None, zero, 1)
        >>> round(float(direction), 3)
        1.0
        >>> rule = adaptive_rule(0.9, 0.99, 0.0, bias_correction=False)
        >>> round(float(rule.apply(jnp.float32(5.0), None, zero, 1)[0]), 3)
        10.0
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"{name} lies in [0, 1), got {decay}")

    def apply(g, h, moments, count):
        del h
        first, second = (jnp.asarray(decay, g.dtype) for decay in (b1, b2))
        mu = first * moments["mu"] + (1 - first) * g
        m = mu / (1 - first**count) if bias_correction else mu
        nu = second * moments["nu"] + (1 - second) * jnp.square(m)
        v = nu / (1 - second**count) if bias_correction else nu
        return m * jax.lax.rsqrt(v + zeta), {"mu": mu, "nu": nu}

    return Rule({"mu": 0.0, "nu": 0.0}, apply)
