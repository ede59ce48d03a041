r"""The published zeroth-order methods: each a family of directions and its own defaults.

All share the options of ``engine.zeroth_order`` and its ``update(None, state, params,
value_fn=f)``; their documentation and example are in ``zeroth_order.options``. The table shows the
evaluations of the loss per step, with q = ``num_queries``:

=============  ==========  ==================  =====================================
method         estimator   evaluations         arrays kept beside the parameters
=============  ==========  ==================  =====================================
mezo           central     2 q                 none
sparse_mezo    central     2 q                 none
lozo           central     2 q                 V
subzero        central     2 q                 U, V
hizoo          central     2 q + 1             H, as large as the parameters
subspace_mezo  central     2 q                 P
fzoo           forward     q + 1               none
rowwise        central     2 (q parts each)    none
rada_zo        central     2 q                 m and v, as large as the parameters
zo_muon        forward     q + 1               P
=============  ==========  ==================  =====================================

Compare methods at equal evaluations, not at equal steps. Their bare directions are in
``optim.zeroth_order.bare``; the bare direction of any family of
``optim.zeroth_order.perturbations`` is ``scale_by_zeroth_order(family, ...)``.
"""

from typing import Annotated, Unpack

import jax
import jax.numpy as jnp
import optax

from jaxlib_unlearn.optim.signatures import Allowed, Count, Step
from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.adaptive import (
    adaptive_rule,
    hizoo,
    rada_zo,
)
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from jaxlib_unlearn.optim.zeroth_order.options import (
    CentralOptions,
    DrawOptions,
    ZOOptions,
    zeroth_order_method,
)

__all__ = [
    "adaptive_rule",
    "fzoo",
    "hizoo",
    "lozo",
    "mezo",
    "rada_zo",
    "rowwise",
    "sparse_mezo",
    "subspace_mezo",
    "subzero",
]


@zeroth_order_method
def mezo(
    learning_rate: optax.ScalarOrSchedule, **options: Unpack[ZOOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""MeZO: a dense Gaussian direction, central differences.

    .. math::
        W \leftarrow W - \eta \left( \tfrac1q \textstyle\sum_i c_i Z_i + \lambda W \right), \quad
        Z_i \sim N(0, I)

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        options: The options that all methods share.

    References:
        Malladi et al., arXiv:2305.17333, algorithm 1.
    """
    return zeroth_order(learning_rate, perturbations.dense(), **options)


@zeroth_order_method
def sparse_mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    keep: Annotated[float, Allowed(above=0, high=1, wanted="in (0, 1]")] = 0.8,
    mask: Annotated[str, Allowed(choices=("step", "static"))] = "step",
    **options: Unpack[ZOOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""MeZO with a random mask on its directions.

    .. math::
        Z_i = z_i \circ M, \qquad M \sim \mathrm{Bernoulli}(keep)

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        keep: The share of the entries that are perturbed. Public implementations disagree on
            whether their "sparsity" is this share or one minus it.
        mask: The mask: "step" draws a new one every step (as in public code), "static" only once.
            It is random, not by magnitude as in the paper.
        options: The options that all methods share.

    References:
        Liu et al., arXiv:2402.15751.
    """
    return zeroth_order(learning_rate, perturbations.sparse(keep, mask), **options)


@zeroth_order_method
def lozo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Count = 4,
    refresh_every: Count = 100,
    divide_vectors: bool = False,
    **options: Unpack[ZOOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""LOZO: low-rank directions, one factor kept for some steps.

    .. math::
        Z_i = V U_i^T, \qquad
        W \leftarrow W - \eta \left( \tfrac{1}{qr} \textstyle\sum_i c_i Z_i + \lambda W \right)

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        rank: The rank r of the directions, capped at the smaller side of a matrix.
        refresh_every: The number of steps between two draws of V.
        divide_vectors: True to divide the estimate for vectors by r too, as public code does, which
            biases it.
        options: The options that all methods share.

    References:
        Chen et al., arXiv:2410.07698.
    """
    return zeroth_order(
        learning_rate,
        perturbations.uvt(rank, divide_vectors),
        refresh_every=refresh_every,
        **options,
    )


@zeroth_order_method
def subzero(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Count = 48,
    refresh_every: Count = 1000,
    **options: Unpack[ZOOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""SubZero: directions between two orthonormal bases that are kept for some steps.

    .. math::
        Z_i = \tfrac{\sqrt{mn}}{r} V Z'_i U^T, \qquad Z'_i \sim N(0, 1)^{r \times r}

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        rank: The rank r of the directions, capped at the smaller side of a matrix.
        refresh_every: The number of steps between two draws of U and V.
        options: The options that all methods share.

    References:
        Yu et al., arXiv:2410.08989.
    """
    return zeroth_order(
        learning_rate, perturbations.uzv(rank), refresh_every=refresh_every, **options
    )


@zeroth_order_method
def subspace_mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Count = 64,
    refresh_every: Count = 100,
    aux_learning_rate: Annotated[optax.ScalarOrSchedule | None, Allowed(low=0)] = 1e-7,
    **options: Unpack[ZOOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""MeZO inside a random subspace on the output side of every matrix.

    .. math::
        Z_i = u_i P^T, \qquad P^T P = I_r

    Args:
        learning_rate: The learning rate eta of matrices, a number or a schedule.
        rank: The dimension r of the subspace, capped at the smaller side of a matrix.
        refresh_every: The number of steps between two draws of P.
        aux_learning_rate: The learning rate of vectors; None for ``learning_rate``. P is not
            rescaled: matrices need about out / r times MeZO's rate.
        options: The options that all methods share.

    References:
        Lang et al., arXiv:2602.17155 (the ablation of ZO-Muon without orthogonalisation).
    """
    return zeroth_order(
        learning_rate,
        perturbations.subspace(rank),
        refresh_every=refresh_every,
        aux_learning_rate=aux_learning_rate,
        **options,
    )


@zeroth_order_method
def fzoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_queries: Annotated[int, Allowed(low=2)] = 8,
    eps: Step = 1e-3,
    weight_decay: jax.typing.ArrayLike = 0.0,
    **options: Unpack[DrawOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""FZOO: one-sided differences over the standard deviation of the losses, along random signs.

    .. math::
        W \leftarrow W - \eta \left( \tfrac1q \textstyle\sum_i \frac{f_i - f}{\sigma} Z_i
        + \lambda W \right), \qquad f_i = f(W + \epsilon Z_i), \quad Z_i \in \{-1, 1\}^{m \times n},
        \\ \sigma^2 = \tfrac{1}{q - 1} \textstyle\sum_i (f_i - \bar f)^2

    Steps are longer where the loss is flat: a multiple of the loss takes the same steps. Where all
    losses agree there is no step. ``num_queries`` is at least 2, and ``state.coeffs`` are the
    quotients.

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        options: The options that all methods share.

    References:
        Dang et al., "FZOO: fast zeroth-order optimizer for fine-tuning large language models
        towards Adam-scale speed", arXiv:2506.09034.
    """
    if isinstance(num_queries, int) and num_queries < 2:
        raise ValueError(f"num_queries is at least 2, to have a deviation; got {num_queries}")

    def standardized(coeffs):
        # The deviation of f_i - f is that of f_i, and the quotient does not change with eps.
        deviation = jnp.std(coeffs, ddof=1)
        return jnp.where(deviation > 0, coeffs / jnp.where(deviation > 0, deviation, 1), 0)

    return zeroth_order(
        learning_rate,
        perturbations.signs(),
        num_queries=num_queries,
        eps=eps,
        estimator="forward",
        reshape_coeffs=standardized,
        weight_decay=weight_decay,
        **options,
    )


@zeroth_order_method
def rowwise(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Count = 1,
    **options: Unpack[CentralOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Row-wise directions (EGGROLL): every row of the batch tries out a direction of its own.

    .. math::
        W \leftarrow W - \eta \left( \tfrac1q \textstyle\sum_b c_b Z_b + \lambda W \right), \qquad
        Z_b = \tfrac{1}{\sqrt r} u_b v_b^T, \qquad
        c_b = \frac{f_b(W + \epsilon Z_b) - f_b(W - \epsilon Z_b)}{2 \epsilon}

    with the loss :math:`f_b` of row b; :math:`f` is the mean of all :math:`f_b`
    (``zeroth_order.parts``).
    Both signs of a direction are tried on the same row: a step is two forward passes of the batch,
    whatever q is.

    ``value_fn`` takes ``part=`` (``zeroth_order.parts.Part``) and returns the loss of that part. A
    query is one of q equal parts of the batch; if q is the number of rows, a part is a row.
    Examples that share a row share its direction. With q = 1 the whole batch is one part, and
    ``part`` is not passed.

    Args:
        learning_rate: The learning rate eta, a number or a schedule.
        rank: The rank r of the directions, capped at the smaller side of a matrix.
        query_batch: The number of evaluations of a part at a time; None for q.
        options: The options that all methods share.

    References:
        Sarkar et al., "Evolution strategies at the hyperscale" (EGGROLL), arXiv:2511.16652.
    """
    if options.get("query_batch") is None and "num_queries" in options:
        options["query_batch"] = options["num_queries"]
    return zeroth_order(learning_rate, perturbations.rowwise(rank), **options)
