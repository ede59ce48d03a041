r"""SIFT: Muon for two objectives whose gradients disagree, only where and when they do.

Every objective has a momentum of its own. Where the cosine between the momenta of one matrix falls
below a threshold, the update is built from the leading singular vectors of each, made orthonormal
to each other; elsewhere it is Muon's on the sum. With :math:`U_i, V_i` the top k singular vectors
of momentum i,

.. math::
    O = \mathrm{msign}([U_1 U_2])\, \mathrm{msign}([V_1 V_2])^H
    = \hat U\, (\hat U^H \hat U)^{-1/2} (\hat V^H \hat V)^{-1/2}\, \hat V^H

Worth knowing before use:

- O does not see how long a momentum is: a weight on a loss has no effect on a matrix that is always
  fused. It does have one on Muon's steps, on AdamW's leaves and on which matrices are fused.
- O has norm sqrt(2 k), a Muon step sqrt(min(in, out)), at one learning rate (``match_norm=True``
  makes them equal).
- Clip both streams by one factor (``optim.clip_streams``) and accumulate both
  (``optim.accumulate``); Optax's own wrappers see the first stream only.
- A stream that is absent at a step is a tree of zeros: its momentum decays, and a momentum of zero
  adds no direction.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_unlearn.optim.buckets import map_matrices, map_stacks
from jaxlib_unlearn.optim.direction import SHAPE_SCALES
from jaxlib_unlearn.optim.fusion import BASES, JORDAN, MSIGNS, Method, matrix_function
from jaxlib_unlearn.optim.localization import Candidates, find_candidates, limit_at
from jaxlib_unlearn.optim.matrices import Specs, labels, resolve, sharding_role
from jaxlib_unlearn.optim.muon import (
    Resolver,
    every_matrix,
    update_momentum,
    with_adamw,
)
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer
from jaxlib_unlearn.optim.subspace import random_block
from jaxlib_unlearn.optim.two_stream import check_streams

SIFT_STATIC_ARGS = (
    "nesterov",
    "rank",
    "rank_cap",
    "spatial_mask",
    "step_gate",
    "msign",
    "bases",
    "passes",
    "first_passes",
    "oversample",
    "match_norm",
    "orthogonalize",
    "shape_scale",
    "num_constraints",
    "seed",
    "mu_dtype",
    "matrices",
    "layout",
)
"""``static_args`` for ``optax.inject_hyperparams(sift, static_args=...)``."""


class SiftState(NamedTuple):
    """State of SIFT; every tree has the parameters' structure.

    ``optax.MaskedNode`` stands where a leaf has no entry: the second momentum of matrices that are
    never fused (``mu`` then holds the momentum of the sum), and bases of leaves without any.
    """

    count: jax.Array  # () int32
    mu: optax.Updates  # momentum of the primary gradient
    mu_constraint: Any  # of the constraint's; a tuple of trees for several constraints
    cos: Any  # per matrix, shaped like the leaf's stack axes: the cosine of the last step
    fused: Any  # per matrix, bool: whether the last step was fused
    basis: Any  # bases="subspace": left vectors, stack axes + (stream, min(in, out), k); else ()


def scale_by_sift(
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    rank: int = 256,
    rank_cap: bool = True,
    threshold: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 0.0,
    spatial_mask: Any = None,
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None = None,
    msign: str = "gram",
    tol: jax.typing.ArrayLike = 1e-5,
    bases: str = "svd",
    passes: int = 2,
    first_passes: int = 8,
    oversample: int = 8,
    match_norm: bool = False,
    orthogonalize: Orthogonalizer | None = None,
    shape_scale: str = "unit",
    num_constraints: int = 1,
    seed: int = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
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
        beta: decay of the momenta (heavy ball), in [0, 1).
        nesterov: look one step ahead; else M = m.
        rank: k, singular vectors of each stream.
        rank_cap: at most ``min(in, out) // streams``. Without it more columns than rows get
            stacked, which cannot be orthonormal: square and full rank is half the sum of msigns.
        threshold: fused if the cosine is strictly below. A number, traced or not, or a schedule of
            the count of earlier steps. Above 1: always. ``-inf``: never, but the cosine is kept.
        spatial_mask: which matrices may be fused: None for all, a function of the path's text, or a
            tree of bools (prefixes allowed). Instead of one bool either may say an array of them,
            shaped like the leaf's stack axes (layers). Leaves without any are plain Muon.
        step_gate: which steps may fuse: a function of the count of earlier steps, or a sequence of
            counts.
        msign: "gram" (2k x 2k eigendecompositions), "ns" (Newton-Schulz, Jordan's 5 steps, on the
            stacked vectors: approximate, and shared directions fade smoothly) or "svd" (exact, but
            without ``tol``: shared or opposed directions return as arbitrary ones of full size).
        tol: "gram" drops eigenvalues up to this. It decides what happens to directions in which
            both momenta agree or oppose each other to within sqrt(tol).
        bases: "svd" (exact) or "subspace" (block iteration from the vectors of the last fused
            step, kept in the state: where SVDs are slow).
        passes: of the iteration at a step after a fused one.
        first_passes: of the iteration at any other step, whose vectors are old or random.
        oversample: random columns beside the old vectors at every step.
        match_norm: scale the fused update to the norm of a Muon step.
        orthogonalize: Muon's ``(n, r, c) -> (n, r, c)``; default Newton-Schulz, Jordan, 5 steps.
        shape_scale: as in ``scale_by_muon``; one factor for both kinds of step.
        num_constraints: number of constraint streams. Above 1, ``constraint_grads`` is a tuple of
            so many trees, and the cosine is the smallest of all pairs.
        seed: of the random columns.
        mu_dtype: dtype of the momenta; None for the parameters'.

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
    direction = _scale_by_sift(
        every_matrix,
        beta=beta,
        nesterov=nesterov,
        threshold=threshold,
        spatial_mask=spatial_mask,
        step_gate=step_gate,
        tol=tol,
        method=Method(
            rank,
            rank_cap,
            msign,
            bases,
            passes,
            first_passes,
            match_norm,
            JORDAN if orthogonalize is None else orthogonalize,
        ),
        oversample=oversample,
        shape_scale=shape_scale,
        num_constraints=num_constraints,
        seed=seed,
        mu_dtype=mu_dtype,
    )
    return _with_constraints(direction, num_constraints)


def sift(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    rank: int = 256,
    rank_cap: bool = True,
    threshold: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 0.0,
    spatial_mask: Any = None,
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None = None,
    msign: str = "gram",
    tol: jax.typing.ArrayLike = 1e-5,
    bases: str = "svd",
    passes: int = 2,
    first_passes: int = 8,
    oversample: int = 8,
    match_norm: bool = False,
    orthogonalize: Orthogonalizer | None = None,
    shape_scale: str = "width",
    num_constraints: int = 1,
    seed: int = 0,
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
    r"""SIFT for the hidden matrices, AdamW on the sum of the gradients for everything else.

    .. math::
        W \leftarrow W - \eta \left( s \cdot o_t + \lambda W \right)

    with the direction :math:`o_t` of :func:`scale_by_sift`.

    Args:
        learning_rate: eta of the matrices, a number or a schedule.
        beta, nesterov, rank, rank_cap, threshold, spatial_mask, step_gate, msign, tol, bases,
            passes, first_passes, oversample, match_norm, orthogonalize, num_constraints, seed:
            see :func:`scale_by_sift`.
        shape_scale: the default "width" is the published sqrt(max(1, out / in)); "match_rms" is
            the Kimi scaling of its other scripts.
        weight_decay: lambda, multiplied by eta but not by s.
        adam_learning_rate: of the other leaves; None for ``learning_rate``.
        adam_b1: decay of AdamW's first moment.
        adam_b2: decay of AdamW's second moment.
        adam_eps: AdamW's epsilon.
        adam_weight_decay: AdamW's decoupled decay.
        matrices: which leaves are matrices, as in ``muon``.
        layout: "in_out" or "out_in", for the rules.
        mu_dtype: dtype of the momenta; None for the parameters'.

    Returns:
        A transformation; ``optax.partition`` by "muon" and "adamw".

    Raises:
        ValueError: as :func:`scale_by_sift`; at ``init``, a leaf that the rules cannot place.

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
    direction = _scale_by_sift(
        lambda tree: resolve(tree, matrices, layout),
        beta=beta,
        nesterov=nesterov,
        threshold=threshold,
        spatial_mask=spatial_mask,
        step_gate=step_gate,
        tol=tol,
        method=Method(
            rank,
            rank_cap,
            msign,
            bases,
            passes,
            first_passes,
            match_norm,
            JORDAN if orthogonalize is None else orthogonalize,
        ),
        oversample=oversample,
        shape_scale=shape_scale,
        num_constraints=num_constraints,
        seed=seed,
        mu_dtype=mu_dtype,
    )
    adamw = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=adam_weight_decay,
        mu_dtype=mu_dtype,
    )
    both = with_adamw(
        direction,
        learning_rate,
        weight_decay,
        optax.chain(_sum_streams(num_constraints), adamw),
        lambda params: labels(params, matrices=matrices, layout=layout),
    )
    return _with_constraints(both, num_constraints)


def _scale_by_sift(
    find_axes: Resolver,
    *,
    beta,
    nesterov: bool,
    threshold,
    spatial_mask,
    step_gate,
    tol,
    method: Method,
    oversample: int,
    shape_scale: str,
    num_constraints: int,
    seed: int,
    mu_dtype,
) -> optax.GradientTransformationExtraArgs:
    """The direction; constraint streams come as ``constraint_0=``, ``constraint_1=``, .."""
    _check(beta, method, oversample, shape_scale, num_constraints)
    factor, streams = SHAPE_SCALES[shape_scale], num_constraints + 1
    subspace = method.bases == "subspace"
    # Cosines never exceed one. What is traced or scheduled is decided at run time.
    sure = isinstance(threshold, int | float) and threshold > 1 and step_gate is None

    def look(tree) -> list[Candidates]:
        return find_candidates(tree, find_axes(tree), spatial_mask)

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        plan = look(params)  # an ambiguous leaf is told here, before any compute

        def tree(make):
            return structure.unflatten([make(*x) for x in zip(plan, leaves, strict=True)])

        def second(leaf, p):
            single = leaf.axes is not None and leaf.allowed is None
            return optax.MaskedNode() if single else jnp.zeros_like(p, dtype=mu_dtype)

        def basis(leaf, p):
            if leaf.allowed is None:
                return optax.MaskedNode()
            shape = (leaf.side, method.rank_of(streams, leaf.side))
            dtype = jnp.promote_types(p.dtype, jnp.float32)
            # The same columns for every stream: equal matrices then have equal bases.
            block = random_block(seed, leaf.path, 0, (*leaf.stack, 1, *shape), dtype)
            return jnp.repeat(block, streams, axis=-3)

        others = tuple(tree(second) for _ in range(num_constraints))
        return SiftState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params),
            others if num_constraints > 1 else others[0],
            tree(lambda leaf, p: jnp.ones(leaf.stack, _real(p.dtype))),
            tree(lambda leaf, p: jnp.zeros(leaf.stack, bool)),
            tree(basis) if subspace else (),
        )

    def update(updates, state, params=None, **extra_args):
        del params
        grads, structure = jax.tree.flatten(updates)
        plan, numbers = look(updates), range(num_constraints)
        given = [
            grads,
            *(structure.flatten_up_to(extra_args[f"constraint_{i}"]) for i in numbers),
        ]
        others = state.mu_constraint if num_constraints > 1 else (state.mu_constraint,)
        momenta = [structure.flatten_up_to(x) for x in (state.mu, *others)]
        cos, fused = (structure.flatten_up_to(x) for x in (state.cos, state.fused))
        basis = structure.flatten_up_to(state.basis) if subspace else []
        count = jnp.asarray(optax.safe_increment(state.count))

        mixed = []  # by leaf, what is to be orthogonalised: one array a stream
        for i, leaf in enumerate(plan):
            g, m = [x[i] for x in given], [x[i] for x in momenta]
            if leaf.axes is not None and leaf.allowed is None:
                g, m = [_sum(g)], m[:1]
            new, ahead = update_momentum(g, m, beta, count, nesterov, "heavy_ball")
            for tree, value, old in zip(momenta, new, m, strict=False):
                tree[i] = value.astype(old.dtype)
            mixed.append([x.astype(jnp.result_type(*ahead)) for x in ahead])

        def pick(leaves):
            indices = [i for i, leaf in enumerate(plan) if leaf.axes and leaves(leaf)]
            axes = [axes for i in indices if (axes := plan[i].axes)]
            return indices, axes, [sharding_role(plan[i].path) for i in indices]

        out = [_sum(arrays) for arrays in mixed]
        indices, axes, roles = pick(lambda leaf: leaf.allowed is None)
        results = map_matrices(method.orthogonalize, [mixed[i][0] for i in indices], axes, roles)
        for i, result in zip(indices, results, strict=True):
            out[i] = result

        indices, axes, roles = pick(lambda leaf: leaf.allowed is not None)
        limit = limit_at(state.count, threshold, step_gate)
        fns, extras = [], []
        for i in indices:
            allowed, side = np.asarray(plan[i].allowed), plan[i].side
            n, k = allowed.size, method.rank_of(streams, side)
            real = _real(mixed[i][0].dtype)
            extra = {
                "limit": jnp.where(allowed, limit, -jnp.inf).astype(real),
                "tol": jnp.full(n, tol, real),
            }
            if subspace:
                fresh = (n, side, min(oversample, side - k))
                extra |= {
                    "basis": basis[i].reshape(n, streams, side, k),
                    "fresh": random_block(seed, plan[i].path, count, fresh, basis[i].dtype),
                    "stale": ~fused[i].reshape(n),
                }
            fns.append(matrix_function(method, sure and bool(allowed.all())))
            extras.append(extra)
        results, aux = map_stacks(fns, [mixed[i] for i in indices], axes, roles, extras=extras)
        for i, result, beside in zip(indices, results, aux, strict=True):
            out[i] = result
            cos[i] = beside["cos"].reshape(cos[i].shape).astype(cos[i].dtype)
            fused[i] = beside["fused"].reshape(fused[i].shape)
            if subspace:
                basis[i] = beside["basis"].reshape(basis[i].shape)

        for i, leaf in enumerate(plan):
            if leaf.axes is not None:
                out[i] = out[i] * factor(*leaf.axes.sizes(leaf.shape)[1:])
            out[i] = out[i].astype(grads[i].dtype)
        first, *rest = (structure.unflatten(x) for x in momenta)
        new = SiftState(
            count,
            first,
            tuple(rest) if num_constraints > 1 else rest[0],
            structure.unflatten(cos),
            structure.unflatten(fused),
            structure.unflatten(basis) if subspace else (),
        )
        return structure.unflatten(out), new

    return optax.GradientTransformationExtraArgs(init, update)


def _check(beta, method: Method, oversample: int, shape_scale: str, num_constraints: int) -> None:
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(f"beta lies in [0, 1), got {beta}")
    for name, value, known in (
        ("msign", method.msign, MSIGNS),
        ("bases", method.bases, BASES),
        ("shape_scale", shape_scale, tuple(SHAPE_SCALES)),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {known}, got {value!r}")
    for name, value, least in (
        ("rank", method.rank, 1),
        ("passes", method.passes, 1),
        ("first_passes", method.first_passes, 1),
        ("oversample", oversample, 0),
        ("num_constraints", num_constraints, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is at least {least}, got {value}")


def _sum(arrays: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, arrays)


def _real(dtype) -> Any:
    return jnp.finfo(jnp.promote_types(dtype, jnp.float32)).dtype


def _sum_streams(num_constraints: int) -> optax.GradientTransformationExtraArgs:
    """Adds the constraint streams to the gradient, for the optimizer that follows."""

    def update(updates, state, params=None, **extra_args):
        del params
        trees = [
            updates,
            *(extra_args[f"constraint_{i}"] for i in range(num_constraints)),
        ]
        return jax.tree.map(lambda *x: _sum(x).astype(x[0].dtype), *trees), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _with_constraints(
    inner: optax.GradientTransformationExtraArgs, num_constraints: int
) -> optax.GradientTransformationExtraArgs:
    """Checks ``constraint_grads`` and hands on one argument a stream.

    So every argument is a tree like the gradients, which ``optax.partition`` masks with them.
    """

    def update(updates, state, params=None, *, constraint_grads=None, **extra_args):
        if constraint_grads is None:
            raise ValueError(
                "SIFT takes two gradients: update(primary_grads, state, params, "
                "constraint_grads=...), a tree like primary_grads"
            )
        trees = tuple(constraint_grads) if num_constraints > 1 else (constraint_grads,)
        if len(trees) != num_constraints:
            raise ValueError(f"num_constraints={num_constraints}, got {len(trees)} trees")
        for tree in trees:
            check_streams(updates, tree)
        streams = {f"constraint_{i}": tree for i, tree in enumerate(trees)}
        return inner.update(updates, state, params, **streams, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
