r"""Muon: momentum, orthogonalised. Matrices only; :func:`muon` gives every other leaf to AdamW.

Conventions, because published codes differ in them:

=============  ==========================================  ====================================
momentum       buffer                                      orthogonalised with Nesterov / without
=============  ==========================================  ====================================
"ema"          m <- beta m + (1 - beta) g                  beta m / (1 - beta^(t+1))
                                                           + (1 - beta) g / (1 - beta^t)  /  m
"heavy_ball"   m <- beta m + g                             g + beta m  /  m
=============  ==========================================  ====================================

"ema" is ``optax.contrib.muon``. "heavy_ball" is Moonlight's, and has the direction of Jordan's and
``torch.optim.Muon``'s code, whose uncorrected average is 1 - beta times it. The two have the same
direction without Nesterov, at the first step, and in the limit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.buckets import map_matrices
from jaxlib_unlearn.optim.matrices import (
    MatrixAxes,
    Specs,
    labels,
    resolve,
    sharding_role,
    trailing_axes,
)
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, newton_schulz

Resolver = Callable[[Any], list[MatrixAxes | None]]

MUON_STATIC_ARGS = (
    "nesterov",
    "momentum",
    "orthogonalize",
    "shape_scale",
    "matrices",
    "layout",
    "mu_dtype",
)
"""``static_args`` for ``optax.inject_hyperparams(muon, static_args=...)``."""


class MuonState(NamedTuple):
    """State of Muon: the number of steps and the momentum, a tree like the parameters."""

    count: jax.Array  # () int32
    mu: optax.Updates


_SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "unit": lambda fan_in, fan_out: 1.0,
    "width": lambda fan_in, fan_out: max(1.0, fan_out / fan_in) ** 0.5,
    "spectral": lambda fan_in, fan_out: (fan_out / fan_in) ** 0.5,
    "match_rms": lambda fan_in, fan_out: 0.2 * max(fan_in, fan_out) ** 0.5,
}


def scale_by_muon(
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: Orthogonalizer | None = None,
    *,
    momentum: str = "ema",
    shape_scale: str = "unit",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Muon, with the gradient's sign: no learning rate, no decay.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
        u_t = \frac{\beta m_t}{1 - \beta^{t+1}} + \frac{(1 - \beta) g_t}{1 - \beta^t}, \qquad
        o_t = s \cdot \mathrm{orth}(u_t)

    Every leaf of rank >= 2 is a stack of (in, out) matrices over its last two axes. Leaves of rank
    0 and 1 get :math:`u_t` itself (:math:`m_t / (1 - \beta^t)` without Nesterov).

    Args:
        beta: decay of the momentum, in [0, 1).
        nesterov: look one step ahead (see the module's table).
        orthogonalize: ``(n, r, c) -> (n, r, c)``; default Newton-Schulz with Jordan's coefficients
            and 5 steps, in the dtype of gradient and momentum.
        momentum: "ema" or "heavy_ball" (see the module's table).
        shape_scale: the factor s of a matrix: "unit" 1, "width" sqrt(max(1, out / in)),
            "spectral" sqrt(out / in), "match_rms" 0.2 sqrt(max(in, out)).
        mu_dtype: dtype of the momentum; None for the parameters'.

    Returns:
        A transformation whose state is a :class:`MuonState`.

    Raises:
        ValueError: a bad argument; at ``init``, a leaf of rank >= 2 named norm, bias, scale, embed.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(scale_by_muon(), optax.scale_by_learning_rate(0.1))
        >>> params = {"w": jnp.eye(3)}
        >>> updates, _ = tx.update({"w": 1e-4 * jnp.eye(3)}, tx.init(params))
        >>> bool(jnp.allclose(jnp.diag(updates["w"]), -0.1, atol=0.04))
        True

    References:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
        Bernstein and Newhouse, arXiv:2409.20325, section 3.
    """
    return _scale_by_muon(
        lambda tree: [
            trailing_axes(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ],
        beta=beta,
        nesterov=nesterov,
        orthogonalize=orthogonalize,
        momentum=momentum,
        shape_scale=shape_scale,
        mu_dtype=mu_dtype,
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    momentum: str = "ema",
    orthogonalize: Orthogonalizer | None = None,
    shape_scale: str = "width",
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps: jax.typing.ArrayLike = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    matrices: Specs = None,
    layout: str = "in_out",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for the hidden matrices, AdamW for everything else.

    .. math::
        W \leftarrow W - \eta \left( s \cdot \mathrm{orth}(u_t) + \lambda W \right)

    with the momentum :math:`u_t` of :func:`scale_by_muon`. The defaults move matrices as
    ``optax.contrib.muon`` does with dimension numbers that name the same matrices; the AdamW part
    is plain AdamW (optax passes ``nesterov`` on to it).

    Args:
        learning_rate: eta of the matrices, a number or a schedule.
        beta: decay of the momentum.
        nesterov: look one step ahead.
        momentum: "ema" or "heavy_ball".
        orthogonalize: see :func:`scale_by_muon`.
        shape_scale: "width", "spectral", "match_rms" (one learning rate then fits both parts) or
            "unit"; out and in are those of the flattened matrix.
        weight_decay: lambda, multiplied by eta but not by s.
        adam_learning_rate: of the other leaves; None for ``learning_rate``, which is far too
            large unless ``shape_scale="match_rms"``.
        adam_b1: decay of AdamW's first moment.
        adam_b2: decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        adam_weight_decay: AdamW's decoupled decay.
        matrices: which leaves are matrices: None for the rules of ``optim.matrices``, or a tree
            (prefixes allowed) or function of ``optax.contrib.MuonDimensionNumbers``.
        layout: "in_out" or "out_in", for the rules.
        mu_dtype: dtype of the momenta; None for the parameters'.

    Returns:
        A transformation; ``optax.partition`` by "muon" and "adamw".

    Raises:
        ValueError: a bad argument; at ``init``, a leaf that the rules cannot place.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
        >>> tx = muon(0.02, adam_learning_rate=1e-3)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> float(updates["up"]["bias"][0])
        -0.001

    References:
        Jordan et al., "Muon" (2024); Liu et al., arXiv:2502.16982, section 2 ("match_rms").
    """
    direction = _scale_by_muon(
        lambda tree: resolve(tree, matrices, layout),
        beta=beta,
        nesterov=nesterov,
        orthogonalize=orthogonalize,
        momentum=momentum,
        shape_scale=shape_scale,
        mu_dtype=mu_dtype,
    )
    both = optax.partition(
        {
            "muon": optax.chain(
                direction,
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(learning_rate),
            ),
            "adamw": optax.adamw(
                learning_rate if adam_learning_rate is None else adam_learning_rate,
                b1=adam_b1,
                b2=adam_b2,
                eps=adam_eps,
                weight_decay=adam_weight_decay,
                mu_dtype=mu_dtype,
            ),
        },
        lambda params: labels(params, matrices=matrices, layout=layout),
    )

    def update(updates, state, params=None, **extra_args):
        # AdamW with a wider momentum would widen the updates.
        new, state = both.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda n, old: n.astype(old.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(both.init, update)


def _scale_by_muon(
    find_axes: Resolver,
    *,
    beta,
    nesterov: bool,
    orthogonalize: Orthogonalizer | None,
    momentum: str,
    shape_scale: str,
    mu_dtype,
) -> optax.GradientTransformationExtraArgs:
    """The direction for the matrices that ``find_axes`` finds."""
    if momentum not in ("ema", "heavy_ball"):
        raise ValueError(f"momentum is 'ema' or 'heavy_ball', got {momentum!r}")
    if shape_scale not in _SHAPE_SCALES:
        raise ValueError(f"shape_scale is one of {list(_SHAPE_SCALES)}, got {shape_scale!r}")
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta lies in [0, 1), got {beta}")
    orthogonalize = newton_schulz() if orthogonalize is None else orthogonalize
    factor = _SHAPE_SCALES[shape_scale]

    def init(params):
        find_axes(params)  # an ambiguous leaf is told here, before any compute
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params)
        return MuonState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        mu, mixed = update_momentum(updates, state.mu, beta, count, nesterov, momentum)
        axes = find_axes(updates)
        directions = orthogonalize_tree(orthogonalize, mixed, axes, factor)
        directions = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, updates)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return directions, MuonState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def update_momentum(
    updates: Any, mu: Any, beta: Any, count: jax.Array, nesterov: bool, momentum: str
) -> tuple[Any, Any]:
    """One step of the momentum, and what is to be orthogonalised (see the module's table).

    Args:
        updates: gradients, a tree.
        mu: the momentum before the step, same structure.
        beta: decay.
        count: () int32, the number of this step, from 1.
        nesterov: look one step ahead.
        momentum: "ema" or "heavy_ball".

    Returns:
        The momentum after the step and the mixture, both in the wider dtype of gradient and
        momentum.

    Example:
        >>> import jax.numpy as jnp
        >>> one, zero = jnp.ones(()), jnp.zeros(())
        >>> mu, mixed = update_momentum(one, zero, 0.5, jnp.int32(1), False, "ema")
        >>> float(mu), float(mixed)
        (0.5, 1.0)
    """
    if momentum == "heavy_ball":
        mu = jax.tree.map(lambda g, m: beta * m + g, updates, mu)
        mixed = jax.tree.map(lambda g, m: g + beta * m, updates, mu) if nesterov else mu
        return mu, mixed
    mu = optax.tree.update_moment(updates, mu, beta, 1)
    if not nesterov:
        return mu, optax.tree.bias_correction(mu, beta, count)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    now = optax.tree.bias_correction(updates, beta, count)
    return mu, jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)


def orthogonalize_tree(
    orthogonalize: Orthogonalizer,
    tree: Any,
    axes: list[MatrixAxes | None],
    factor: Callable[[int, int], float] = _SHAPE_SCALES["unit"],
) -> Any:
    """Orthogonalises the matrices of a tree in buckets and scales them by their shape.

    Args:
        orthogonalize: ``(n, r, c) -> (n, r, c)``.
        tree: arrays.
        axes: one entry a leaf; leaves with None pass unchanged.
        factor: ``(in, out) ->`` the number to multiply by.

    Returns:
        A tree like ``tree``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlib_unlearn.optim.orthogonalize import svd
        >>> orthogonalize_tree(svd(), [3 * jnp.eye(2)], [MatrixAxes((), (0,), (1,))])[0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    out = [leaf for _, leaf in flat]
    picked = [(i, a) for i, a in enumerate(axes) if a is not None]
    results = map_matrices(
        orthogonalize,
        [out[i] for i, _ in picked],
        [a for _, a in picked],
        [sharding_role(flat[i][0]) for i, _ in picked],
    )
    for (i, a), result in zip(picked, results, strict=True):
        _, fan_in, fan_out = a.sizes(result.shape)
        out[i] = result * factor(fan_in, fan_out)
    return jax.tree.unflatten(structure, out)
