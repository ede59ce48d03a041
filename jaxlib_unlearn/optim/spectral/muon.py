r"""Muon orthogonalises the momentum of matrices; :func:`muon` gives every other leaf to AdamW.

Published implementations differ in their conventions:

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

Coming from ``optax.contrib.muon`` (its own spellings raise a TypeError that says the same):

- ``ns_coeffs``, ``ns_steps``: ``orthogonalize=optim.orthogonalize.newton_schulz(coeffs, steps)``,
  or a name: ``"polar_express"``, ``"gram_newton_schulz"``, ``"svd"``.
- ``beta``, ``nesterov``, ``mu_dtype``, ``weight_decay``, ``weight_decay_mask``, ``adam_*``: the
  same. The mask holds for AdamW's leaves too. Do not chain ``optax.add_decayed_weights`` after
  ``muon``: the learning rate's sign is already applied, so weights would grow.
- ``eps``: ``adam_eps``; matrices need none. ``adam_eps_root``: no counterpart.
- ``adaptive``: ``orthogonalize=lambda z: (z * f(z)).sum((-2, -1), keepdims=True) * f(z)``.
- ``preconditioning``: ``"frobenius"`` is the default, ``"aol"`` is ``orthogonalize="aol4"``.
- ``consistent_rms=0.2``: ``shape_scale="match_rms"``; None: ``"width"``.
- ``muon_weight_dimension_numbers``: ``matrices=``, the same objects.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.first_moments import widen
from jaxlib_unlearn.optim.matrices import MatrixAxes, Specs, every_matrix, resolve
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, by_name
from jaxlib_unlearn.optim.passing import passing_by
from jaxlib_unlearn.optim.signatures import POSITIVE, Allowed, Decay, Dtype, Epsilon
from jaxlib_unlearn.optim.spectral.direction import (
    SHAPE_SCALES,
    Meet,
    alone,
    init_post,
    orthogonalize_tree,
)
from jaxlib_unlearn.optim.spectral.plan import Part, plan_of
from jaxlib_unlearn.optim.spectral.post import Post
from jaxlib_unlearn.optim.spectral.rest import AdamWRest, DecayMask, with_adamw
from jaxlib_unlearn.optim.spectral.splitting import Splits
from jaxlib_unlearn.optim.spellings import with_optax_spellings

Resolver = Callable[[Any], list[MatrixAxes | None]]
SHAPES = Allowed(choices=tuple(SHAPE_SCALES))


class MuonState(NamedTuple):
    """State of Muon (and of TEON): the number of steps, the momentum, the state of ``post``."""

    count: jax.Array  # () int32
    mu: optax.Updates  # like the parameters
    post: Any = ()


@with_optax_spellings
def scale_by_muon(
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    orthogonalize: Orthogonalizer | str | None = None,
    *,
    momentum: str = "ema",
    shape_scale: str = "unit",
    split: Splits | None = None,
    post: Post | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    comm_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of Muon, with the gradient's sign: no learning rate, no decay.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
        u_t = \frac{\beta m_t}{1 - \beta^{t+1}} + \frac{(1 - \beta) g_t}{1 - \beta^t}, \qquad
        o_t = s \cdot \mathrm{orth}(u_t)

    Every leaf of rank >= 2 is a stack of (in, out) matrices over its last two axes. Leaves of rank
    0 and 1 get :math:`u_t` itself (:math:`m_t / (1 - \beta^t)` without Nesterov).

    Args:
        beta: The decay of the momentum, in [0, 1).
        nesterov: The direction looks one step ahead of the momentum (see the module's table).
        orthogonalize: The orthogonaliser: a function ``(n, r, c) -> (n, r, c)``, or a name: "svd",
            "polar_express", "gram_newton_schulz", or the name of a table of
            ``optim.orthogonalize``. The default is Newton-Schulz with Jordan's coefficients and 5
            steps, in the dtype of gradient and momentum.
        momentum: The form of the momentum, "ema" or "heavy_ball" (see the module's table).
        shape_scale: The factor s of a matrix: "unit" 1, "width" sqrt(max(1, out / in)), "spectral"
            sqrt(out / in), "match_rms" 0.2 sqrt(max(in, out)).
        split: The leaves that hold several matrices each (heads, fused q/k/v): see
            ``spectral.splitting``.
        post: A step between orthogonalisation and scaling: see ``spectral.post`` (NorMuon).
        mu_dtype: The dtype of the momentum; None for the parameters'.
        comm_dtype: The dtype to which matrices and directions are rounded when they are sent
            between devices (and on one device as well); the orthogonaliser then works in float32.
            bfloat16 halves those bytes. None: they are sent as they are.

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
    direction = scale_by_momentum(
        every_matrix,
        beta=beta,
        nesterov=nesterov,
        orthogonalize=by_name(orthogonalize),
        momentum=momentum,
        shape_scale=shape_scale,
        split=split,
        post=post,
        mu_dtype=mu_dtype,
        comm_dtype=comm_dtype,
    )
    return passing_by(direction)


@with_optax_spellings
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: Decay = 0.95,
    nesterov: Annotated[bool, Allowed()] = True,
    momentum: str = "ema",
    orthogonalize: Annotated[Orthogonalizer | str | None, Allowed()] = None,
    shape_scale: Annotated[str, SHAPES] = "width",
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: Annotated[optax.ScalarOrSchedule | None, POSITIVE] = None,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps: Epsilon = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: DecayMask = None,
    matrices: Specs = None,
    layout: str = "in_out",
    split: Splits | None = None,
    post: Post | None = None,
    mu_dtype: Dtype = None,
    comm_dtype: Dtype = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon for the hidden matrices, AdamW for everything else.

    .. math::
        W \leftarrow W - \eta \left( s \cdot \mathrm{orth}(u_t) + \lambda W \right)

    with the momentum :math:`u_t` of :func:`scale_by_muon`. The defaults move matrices as
    ``optax.contrib.muon`` does with dimension numbers that name the same matrices; the AdamW part
    is plain AdamW (optax passes ``nesterov`` on to it).

    Args:
        learning_rate: The learning rate eta of the matrices, a number or a schedule.
        beta: The decay of the momentum.
        nesterov: The direction looks one step ahead of the momentum (Nesterov).
        momentum: The form of the momentum, "ema" or "heavy_ball".
        orthogonalize: see :func:`scale_by_muon`.
        shape_scale: The factor s of a matrix: "width", "spectral", "match_rms" (one learning rate
            then fits both parts) or "unit"; out and in are the sizes of the flattened matrix.
        weight_decay: The decoupled weight decay lambda of the matrices, multiplied by eta but not
            by s.
        adam_learning_rate: The rate of the other leaves; None for ``learning_rate``, which is far
            too large unless ``shape_scale="match_rms"``.
        adam_b1: The decay of AdamW's first moment.
        adam_b2: The decay of AdamW's second moment.
        adam_eps: The epsilon of AdamW.
        adam_weight_decay: The decoupled weight decay of AdamW.
        weight_decay_mask: The leaves that decay, matrices and others: a tree of bools like the
            parameters (or a prefix of one) or a function of the parameters that returns it, as in
            ``optax.add_decayed_weights``; None for everything.
        matrices: The choice of matrices: None for the rules of ``optim.matrices``; "all_2d" for the
            rules, with two axes as a matrix if a name says nothing (``wq``, ``theta``); or a tree
            (prefixes allowed) of ``optax.contrib.MuonDimensionNumbers``, of None for AdamW's
            leaves, and of the words "rules" and "all_2d" for leaves that these decide; or a
            function that returns one.
        layout: The order of a kernel's axes, "in_out" or "out_in", for the rules.
        split: The leaves that hold several matrices each, by path: ``{"attn/q/": 9}`` for nine
            heads, ``{"c_attn": (768, 768, 768)}`` for fused q, k, v,
            ``{"attn/o/": Split(9, "in")}``. Shape factors belong to the blocks.
        post: A step between orthogonalisation and scaling, e.g. ``optim.normuon()``.
        mu_dtype: The dtype of the momenta; None for the parameters'.
        comm_dtype: see :func:`scale_by_muon`.

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
    direction = scale_by_momentum(
        lambda tree: resolve(tree, matrices, layout),
        beta=beta,
        nesterov=nesterov,
        orthogonalize=by_name(orthogonalize),
        momentum=momentum,
        shape_scale=shape_scale,
        split=split,
        post=post,
        mu_dtype=mu_dtype,
        comm_dtype=comm_dtype,
    )
    return with_adamw(
        direction,
        learning_rate,
        weight_decay,
        AdamWRest(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay, mu_dtype),
        weight_decay_mask,
        matrices,
        layout,
    )


def scale_by_momentum(
    find_axes: Resolver,
    *,
    beta: jax.typing.ArrayLike,
    nesterov: bool,
    orthogonalize: Orthogonalizer,
    momentum: str,
    shape_scale: str,
    split: Splits | None = None,
    post: Post | None = None,
    meet: Meet = alone,
    check: Callable[[Sequence[Part]], None] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    comm_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The momentum of the matrices that ``find_axes`` finds, orthogonalised in ``meet``'s groups.

    Muon and TEON share this function, and the other arguments are those of :func:`scale_by_muon`.
    ``init`` calls ``check`` with all parts.

    Example:
        >>> tx = scale_by_momentum(every_matrix, beta=0.9, nesterov=False, momentum="ema",
        ...     orthogonalize=by_name("svd"), shape_scale="unit")
        >>> tx.init({"v": jnp.ones(2)}).mu["v"].tolist()
        [0.0, 0.0]
    """
    if momentum not in ("ema", "heavy_ball"):
        raise ValueError(f"momentum is 'ema' or 'heavy_ball', got {momentum!r}")
    if shape_scale not in SHAPE_SCALES:
        raise ValueError(f"shape_scale is one of {list(SHAPE_SCALES)}, got {shape_scale!r}")
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta lies in [0, 1), got {beta}")
    if comm_dtype is not None and not jnp.issubdtype(comm_dtype, jnp.floating):
        raise ValueError(f"comm_dtype is a floating dtype, got {comm_dtype!r}")

    def init(params):
        axes = find_axes(params)  # raises for an ambiguous leaf, before any compute
        if check is not None:
            check(plan_of(params, axes, split).parts)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params)
        return MuonState(jnp.zeros([], jnp.int32), mu, init_post(params, axes, split, post))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        mu, mixed = update_momentum(updates, state.mu, beta, count, nesterov, momentum)
        directions, post_state = orthogonalize_tree(
            orthogonalize,
            mixed,
            find_axes(updates),
            SHAPE_SCALES[shape_scale],
            split=split,
            post=post,
            post_state=state.post,
            meet=meet,
            comm_dtype=comm_dtype,
        )
        directions = optax.tree.cast_like(directions, updates)
        mu = optax.tree.cast_like(mu, state.mu)
        return directions, MuonState(count, mu, post_state)

    return optax.GradientTransformationExtraArgs(init, update)


def update_momentum(
    updates: Any, mu: Any, beta: Any, count: jax.Array, nesterov: bool, momentum: str
) -> tuple[Any, Any]:
    """One step of the momentum, and the mixture to orthogonalise (see the module's table).

    Args:
        updates: The gradients, a tree.
        mu: The momentum before the step, of the same structure.
        beta: The decay of the momentum.
        count: The number of this step, from 1, () int32.
        nesterov: True to look one step ahead of the momentum.
        momentum: The form of the momentum, "ema" or "heavy_ball".

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
    mu = widen(mu, updates)
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
