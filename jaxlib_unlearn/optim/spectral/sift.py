r"""SIFT changes Muon for two objectives, at the matrices and steps whose gradients disagree.

Every objective has its own momentum. If the cosine between the momenta of one matrix falls below a
threshold, the update is built from the leading singular vectors of each, made orthonormal to each
other; otherwise it is Muon's update of the sum. With :math:`U_i, V_i` the top k singular vectors of
momentum i,

.. math::
    O = \mathrm{msign}([U_1 U_2])\, \mathrm{msign}([V_1 V_2])^H
    = \hat U\, (\hat U^H \hat U)^{-1/2} (\hat V^H \hat V)^{-1/2}\, \hat V^H

Worth knowing before use:

- O does not depend on the norm of a momentum: a weight on a loss has no effect on a matrix that is
  always fused. It has an effect on Muon's steps, on AdamW's leaves and on the choice of matrices.
- O has norm sqrt(2 k), a Muon step sqrt(min(in, out)), at one learning rate (``match_norm=True``
  makes them equal).
- Clip both gradients by one factor (``optim.clip_streams``) and accumulate both
  (``optim.accumulate``); Optax's own wrappers see the primary gradient only.
- A gradient that is absent at a step is passed as a tree of zeros: its momentum decays, and a
  momentum of zero adds no direction.
- Momenta that nearly oppose each other are separated in float64 (on CPUs and NVIDIA GPUs, whatever
  the dtype of the parameters): with M_2 = -M_1 plus a share e of an independent direction the
  update is full-size and within 1e-3 of a float64 reference down to e = 0.01 %. Below, single
  directions start to be dropped (at 0.001 %, with bases of half the matrix, a fifth of the norm);
  below 0.0001 % of their norm momenta differ by rounding, and opposed ones give no step. On TPUs,
  which have no float64 decompositions, the error is about 0.3 % at e = 0.1 % and grows as 1 / e.
  With ``bases="subspace"`` the error of the iteration comes on top. (Derivatives of an update are
  computed in the momenta's own dtype, without directions that it cannot resolve.)
"""

from typing import Unpack

import jax
import optax

from jaxlib_unlearn.optim.matrices import Specs, every_matrix, resolve
from jaxlib_unlearn.optim.signatures import Decay, Dtype, Epsilon, spelled_out
from jaxlib_unlearn.optim.spectral.rest import AdamWRest, DecayMask, with_adamw
from jaxlib_unlearn.optim.spectral.sift_direction import (
    SiftOptions,
    sift_direction,
    sum_streams,
    with_constraints,
)
from jaxlib_unlearn.optim.spellings import with_optax_spellings


@with_optax_spellings
@spelled_out(sift_direction, before="shape_scale")
def scale_by_sift(
    *,
    shape_scale: str = "unit",
    num_constraints: int = 1,
    seed: int = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    **options: Unpack[SiftOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of SIFT, with the gradient's sign: no learning rate, no decay.

    .. math::
        m_i \leftarrow \beta m_i + g_i, \qquad M_i = g_i + \beta m_i, \qquad
        o = s \cdot \begin{cases} \hat U (\hat U^H \hat U)^{-1/2} (\hat V^H \hat V)^{-1/2} \hat V^H
        & \cos(M_1, M_2) < \epsilon \\ \mathrm{orth}(M_1 + M_2) & \text{else} \end{cases}

    with :math:`\hat U = [U_1 U_2]` the top k left singular vectors of both momenta. Every leaf of
    rank >= 2 is a stack of (in, out) matrices over its last two axes; leaves of rank 0 and 1 get
    :math:`M_1 + M_2`. ``update(g_1, state, params, constraint_grads=g_2)``.

    Args:
        beta: The decay of the momenta (heavy ball), in [0, 1).
        nesterov: The direction looks one step ahead of the momenta; otherwise M = m.
        rank: The number k of singular vectors of each momentum.
        rank_cap: The rank is at most ``min(in, out) // (num_constraints + 1)``. Without this cap
            more columns than rows get stacked, which cannot be orthonormal: at full rank, square
            matrices get half the sum of the msigns.
        threshold: The bound of the cosine: matrices with a cosine strictly below it are fused. It
            is a number, traced or not, or a schedule of the count of earlier steps. Above 1:
            always. ``-inf``: never, but the cosine is recorded.
        spatial_mask: The matrices that may be fused: None for all, a function of the path's text,
            or a tree of bools (prefixes allowed). Both may give an array of bools, shaped like the
            leaf's stack axes (layers), in place of a bool. Leaves without any such matrix are plain
            Muon.
        step_gate: The steps that may fuse: a function of the count of earlier steps, or a sequence
            of counts; None for all.
        msign: The method of fusing: "gram" (2k x 2k eigendecompositions; singular values in float64
            if an eigenvalue is below 1e-3, see "Worth knowing"), "ns" (Newton-Schulz, Jordan's 5
            steps, on the stacked vectors: approximate, and shared directions fade smoothly) or
            "svd" (singular values in the dtype of the momenta, without ``tol``: shared or opposed
            directions return as arbitrary ones of full size).
        tol: The bound of eigenvalues (1 minus the cosine of an angle) that "gram" drops: directions
            in which the momenta agree or oppose each other to within sqrt(tol).
        bases: The method for singular vectors: "svd" (exact) or "subspace" (block iteration from
            the vectors of the last fused step, kept in the state, for devices with slow SVDs).
        passes: The number of iterations at a step that follows a fused one.
        first_passes: The number of iterations at any other step, which starts from old or random
            vectors.
        oversample: The number of random columns beside the old vectors at every step.
        match_norm: True to scale the fused update to the norm of a Muon step.
        orthogonalize: Muon's orthogonaliser, a function ``(n, r, c) -> (n, r, c)``, or a name as in
            ``scale_by_muon``. The default is Newton-Schulz with Jordan's coefficients and 5 steps.
        shape_scale: The factor s of a matrix, as in ``scale_by_muon``, for both kinds of step.
        num_constraints: The number of constraint gradients. Above 1, ``constraint_grads`` is a
            tuple of that many trees, and the cosine is the smallest of all pairs.
        seed: The seed of the random columns.
        mu_dtype: The dtype of the momenta; None for the parameters'.

    Returns:
        A transformation whose state is a :class:`SiftState`.

    Raises:
        ValueError: a bad argument; at ``init``, a leaf of rank >= 2 named norm, bias, scale, embed;
            at ``update``, no ``constraint_grads`` or trees that differ.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(scale_by_sift(rank=1), optax.scale_by_learning_rate(0.1))
        >>> w = {"w": jnp.eye(2)}
        >>> forget, retain = {"w": jnp.diag(jnp.array([1.0, -1.0]))}, {"w": -2 * jnp.eye(2)}
        >>> updates, state = tx.update(forget, tx.init(w), w, constraint_grads=retain)
        >>> float(state[0].cos["w"]), bool(state[0].fused["w"])  # not below 0: Muon
        (0.0, False)

    References:
        "SIFT: Subspace Control", arXiv:2604.04231, figure 1.
    """
    direction = sift_direction(
        every_matrix,
        shape_scale=shape_scale,
        num_constraints=num_constraints,
        seed=seed,
        mu_dtype=mu_dtype,
        **options,
    )
    return with_constraints(direction, num_constraints)


@with_optax_spellings
@spelled_out(sift_direction, before="shape_scale")
def sift(
    learning_rate: optax.ScalarOrSchedule,
    *,
    shape_scale: str = "width",
    num_constraints: int = 1,
    seed: int = 0,
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Decay = 0.9,
    adam_b2: Decay = 0.999,
    adam_eps: Epsilon = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: DecayMask = None,
    matrices: Specs = None,
    layout: str = "in_out",
    mu_dtype: Dtype = None,
    **options: Unpack[SiftOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""SIFT for the hidden matrices, AdamW on the sum of the gradients for everything else.

    .. math::
        W \leftarrow W - \eta \left( s \cdot o_t + \lambda W \right)

    with the direction :math:`o_t` of :func:`scale_by_sift`.

    Args:
        learning_rate: The learning rate eta of the matrices, a number or a schedule.
        beta, nesterov, rank, rank_cap, threshold, spatial_mask: see :func:`scale_by_sift`.
        step_gate, msign, tol, bases, passes, first_passes: see :func:`scale_by_sift`.
        oversample, match_norm, orthogonalize, num_constraints, seed: see :func:`scale_by_sift`.
        shape_scale: The factor s of a matrix: the default "width" is the published sqrt(max(1, out
            / in)); "match_rms" is the Kimi scaling of the authors' other scripts.
        weight_decay: The decoupled weight decay lambda of the matrices, multiplied by eta but not
            by s.
        adam_learning_rate: The learning rate of the other leaves; None for ``learning_rate``.
        adam_b1: The decay of AdamW's first moment.
        adam_b2: The decay of AdamW's second moment.
        adam_eps: The epsilon of AdamW.
        adam_weight_decay: The decoupled weight decay of AdamW.
        weight_decay_mask: The leaves that decay, matrices and others: a tree of bools like the
            parameters (or a prefix of one) or a function of the parameters that returns it, as in
            ``optax.add_decayed_weights``; None for everything.
        matrices: The choice of matrices, as in ``muon``.
        layout: The order of a kernel's axes, "in_out" or "out_in", for the rules.
        mu_dtype: The dtype of the momenta; None for the parameters'.

    Returns:
        A transformation; ``optax.partition`` by "muon" and "adamw".

    Raises:
        ValueError: the cases of :func:`scale_by_sift`; at ``init``, a leaf that the rules cannot
            place.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}
        >>> tx, ones = sift(0.02, adam_learning_rate=1e-3), jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = tx.update(ones, tx.init(params), params, constraint_grads=ones)
        >>> float(updates["up"]["bias"][0])
        -0.001

    References:
        "SIFT: Subspace Control", arXiv:2604.04231, figure 1.
    """
    direction = sift_direction(
        lambda tree: resolve(tree, matrices, layout),
        shape_scale=shape_scale,
        num_constraints=num_constraints,
        seed=seed,
        mu_dtype=mu_dtype,
        **options,
    )
    both = with_adamw(
        direction,
        learning_rate,
        weight_decay,
        AdamWRest(adam_learning_rate, adam_b1, adam_b2, adam_eps, adam_weight_decay, mu_dtype),
        weight_decay_mask,
        matrices,
        layout,
        before_rest=sum_streams(num_constraints),
    )
    return with_constraints(both, num_constraints)
