r"""ZO-Muon: zeroth-order estimates in a random subspace, averaged and orthogonalised.

This follows the intent of the published code: one P for all queries of a step, drawn once per
refresh, before any query. (The code draws another P for every query of a refresh step, which leaves
1 / q of the signal at that step.)
"""

from typing import Annotated, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.matrices import Specs
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, by_name
from jaxlib_unlearn.optim.signatures import Allowed, Count, Step, spelled_out
from jaxlib_unlearn.optim.spellings import with_optax_spellings
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.options import DrawOptions
from jaxlib_unlearn.optim.zeroth_order.perturbations import subspace


class _Options(DrawOptions, total=False):
    """Options that are passed on to the engine; the arguments of ``zo_muon`` explain them."""

    matrices: Specs
    layout: str
    factored: bool


@with_optax_spellings
@spelled_out(zeroth_order)
def scale_by_zo_muon(
    *,
    num_queries: int = 4,
    rank: int = 64,
    eps: jax.typing.ArrayLike = 1e-3,
    refresh_every: int = 100,
    estimator: str = "forward",
    orthogonalize: Orthogonalizer | str | None = None,
    **options: Unpack[_Options],
) -> optax.GradientTransformationExtraArgs:
    """The direction of ZO-Muon, with the gradient's sign: no learning rates, no decay.

    Matrices get the orthogonalised direction, vectors their estimate (chain the two learning rates
    yourself, or use :func:`zo_muon`).

    Args:
        num_queries, rank, eps, refresh_every, estimator, orthogonalize: see :func:`zo_muon`.
        seed, query_batch, query_axis, trainable, rng_impl, matrices: see :func:`zo_muon`.
        layout, factored: see :func:`zo_muon`.

    Returns:
        A transformation; ``update`` takes ``value_fn=`` (see ``zeroth_order``).

    Raises:
        ValueError: a bad argument, or a masked tree.

    Example:
        >>> import optax
        >>> tx = optax.chain(scale_by_zo_muon(rank=16), optax.scale_by_learning_rate(1e-2))
    """
    return zeroth_order(
        None,
        subspace(rank),
        num_queries=num_queries,
        eps=eps,
        refresh_every=refresh_every,
        estimator=estimator,
        reshape_core=_orthogonalizer(orthogonalize),
        **options,
    )


@with_optax_spellings
@spelled_out(zeroth_order)
def zo_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_queries: Count = 4,
    rank: Count = 64,
    eps: Step = 1e-3,
    refresh_every: Count = 100,
    estimator: str = "forward",
    orthogonalize: Annotated[Orthogonalizer | str | None, Allowed()] = None,
    aux_learning_rate: Annotated[optax.ScalarOrSchedule | None, Allowed(low=0)] = 1e-7,
    weight_decay: jax.typing.ArrayLike = 0.0,
    **options: Unpack[_Options],
) -> optax.GradientTransformationExtraArgs:
    r"""ZO-Muon: Muon's direction inside a random subspace, from values of the loss alone.

    .. math::
        R = \tfrac1q \textstyle\sum_i c_i u_i, \qquad
        W \leftarrow W - \eta \left( \mathrm{orth}(R) P^T + \lambda W \right), \qquad
        v \leftarrow v - \eta_{aux} \tfrac1q \textstyle\sum_i c_i z_i

    with :math:`c_i = (f(W + \epsilon u_i P^T, v + \epsilon z_i) - f) / \epsilon`, Gaussian
    :math:`u_i` (in, r) and :math:`z_i`, and P (out, r) with orthonormal columns. No momentum and no
    shape factor: a matrix moves by about :math:`0.72 \eta \sqrt r` in Frobenius norm.

    Args:
        learning_rate: The learning rate eta of matrices (every leaf with two axes or more,
            embeddings included).
        num_queries: The number q of directions per step; a step evaluates the loss q + 1 times.
        rank: The dimension r of the subspace, capped at the smaller side of a matrix.
            Orthogonalisation helps from 64 on.
        eps: The step epsilon along a direction.
        refresh_every: The number T of steps between two draws of P: it is drawn at steps 0, T, 2 T,
            ...
        estimator: The estimator of the coefficients: "forward", "central" (2 q evaluations) or
            "jvp".
        orthogonalize: A function of ``optim.orthogonalize`` or the name of one ("svd"). The default
            is Newton-Schulz with Jordan's coefficients and 5 steps; "normalize" only scales R to
            norm 0.72 sqrt(r) (with r much smaller than ``in`` nearly the same direction: run it as
            the ablation); "none" is Subspace-MeZO.
        aux_learning_rate: The learning rate of vectors (1e-7 for language models, 1e-4 for ViT in
            public code); None for ``learning_rate``.
        weight_decay: The decoupled weight decay lambda, for matrices whose name does not say norm,
            bias or scale.
        seed: The seed of all draws.
        query_batch: The number of evaluations at a time; None for one. With ``layered_value_fn``
            more of them cost activations, not weights.
        query_axis: The mesh axis over which evaluations are split.
        trainable: A function of a path that says whether the leaf is trained; None for all leaves.
        matrices: The choice of matrices, ``MuonDimensionNumbers`` for all leaves; None for the
            rules of ``zeroth_order.leaves``.
        layout: The order of a kernel's axes, "in_out" or "out_in".
        factored: True to let ``layer_map`` return kernels as ``perturbations.Factored``.
        rng_impl: The random bit generator.

    Returns:
        A transformation; ``update`` takes ``value_fn=`` (see ``zeroth_order``).

    Raises:
        ValueError: a bad argument, or a masked tree.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
        >>> tx = zo_muon(0.1, num_queries=8, rank=3)
        >>> def loss(p):
        ...     return jnp.sum(jnp.square(p["w"] - 1.0))
        >>> @jax.jit
        ... def step(params, state):
        ...     return tx.update(None, state, params, value_fn=loss)
        >>> updates, state = step(params, tx.init(params))
        >>> bool(loss(optax.apply_updates(params, updates)) < state.value)
        True

    References:
        Lang et al., arXiv:2602.17155.
    """
    return zeroth_order(
        learning_rate,
        subspace(rank),
        num_queries=num_queries,
        eps=eps,
        refresh_every=refresh_every,
        estimator=estimator,
        reshape_core=_orthogonalizer(orthogonalize),
        aux_learning_rate=aux_learning_rate,
        weight_decay=weight_decay,
        **options,
    )


def _normalize(x: jax.Array) -> jax.Array:
    """``0.72 sqrt(r) x / norm``: as long as what Newton-Schulz returns for noise."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    length = 0.72 * min(x.shape[-2:]) ** 0.5
    return jnp.where(norm > 0, length * x / jnp.where(norm > 0, norm, 1), 0)


def _orthogonalizer(given: Orthogonalizer | str | None) -> Orthogonalizer | None:
    if given == "normalize":
        return _normalize
    if given == "none":
        return None
    try:
        return by_name(given)
    except ValueError as error:
        raise ValueError(f"{error}; also 'normalize' and 'none'") from None
