"""The direction of SIFT on a whole tree: the momenta, the fused matrices, and the updates.

``spectral.sift`` has the factories; ``spectral.fusion`` computes one bucket of matrices.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_unlearn.optim.combine import check_streams, check_unspent
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, by_name
from jaxlib_unlearn.optim.passing import passing_by
from jaxlib_unlearn.optim.signatures import Allowed, Count, Decay
from jaxlib_unlearn.optim.spectral.buckets import map_matrices, map_stacks
from jaxlib_unlearn.optim.spectral.direction import SHAPE_SCALES
from jaxlib_unlearn.optim.spectral.fusion import BASES, MSIGNS, Method, matrix_function
from jaxlib_unlearn.optim.spectral.localization import Candidates, find_candidates, limit_at
from jaxlib_unlearn.optim.spectral.muon import Resolver, update_momentum
from jaxlib_unlearn.optim.spectral.subspace import random_block


class SiftState(NamedTuple):
    """State of SIFT; every tree has the parameters' structure.

    ``optax.MaskedNode`` marks a leaf without an entry: the second momentum of matrices that are
    never fused (``mu`` then holds the momentum of the sum), and bases of leaves without any.
    """

    count: jax.Array  # () int32
    mu: optax.Updates  # momentum of the primary gradient
    mu_constraint: Any  # of the constraint's; a tuple of trees for several constraints
    cos: Any  # per matrix, shaped like the leaf's stack axes: the cosine of the last step
    fused: Any  # per matrix, bool: whether the last step was fused
    basis: Any  # bases="subspace": left vectors, stack axes + (stream, min(in, out), k); else ()


class SiftOptions(TypedDict, total=False):
    """The options that ``optim.scale_by_sift`` and ``optim.sift`` pass on unchanged."""

    beta: jax.typing.ArrayLike
    nesterov: bool
    rank: int
    rank_cap: bool
    threshold: jax.typing.ArrayLike | Callable[[jax.Array], Any]
    spatial_mask: Any
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None
    msign: str
    tol: jax.typing.ArrayLike
    bases: str
    passes: int
    first_passes: int
    oversample: int
    match_norm: bool
    orthogonalize: Orthogonalizer | str | None


def sift_direction(
    find_axes: Resolver,
    *,
    beta: Decay = 0.95,
    nesterov: bool = True,
    rank: Count = 256,
    rank_cap: bool = True,
    threshold: Annotated[jax.typing.ArrayLike | Callable[[jax.Array], Any], Allowed()] = 0.0,
    spatial_mask: Any = None,
    step_gate: Callable[[jax.Array], Any] | Sequence[int] | None = None,
    msign: str = "gram",
    tol: jax.typing.ArrayLike = 1e-14,
    bases: Annotated[str, Allowed(choices=BASES)] = "svd",
    passes: int = 2,
    first_passes: int = 8,
    oversample: int = 8,
    match_norm: bool = False,
    orthogonalize: Orthogonalizer | str | None = None,
    shape_scale: str,
    num_constraints: int,
    seed: int,
    mu_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of ``optim.scale_by_sift``, with the same arguments.

    Constraint gradients come as ``constraint_0=``, ``constraint_1=``, ..
    (:func:`with_constraints`), and ``find_axes`` says which leaves are matrices.
    """
    method = Method(
        rank,
        rank_cap,
        msign,
        bases,
        passes,
        first_passes,
        match_norm,
        by_name(orthogonalize),
    )
    _check(beta, method, oversample, shape_scale, num_constraints)
    factor, streams = SHAPE_SCALES[shape_scale], num_constraints + 1
    subspace = method.bases == "subspace"
    # Cosines never exceed one. A traced threshold or a schedule is compared at run time.
    sure = isinstance(threshold, int | float) and threshold > 1 and step_gate is None

    def look(tree) -> tuple[Candidates, ...]:
        return find_candidates(tree, find_axes(tree), spatial_mask)

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        plan = look(params)  # raises for an ambiguous leaf, before any compute

        def tree(make):
            return structure.unflatten([make(*x) for x in zip(plan, leaves, strict=True)])

        def second(leaf, p):
            single = leaf.axes is not None and leaf.allowed is None
            return optax.MaskedNode() if single else jnp.zeros_like(p, dtype=mu_dtype)

        def basis(leaf, p):
            if leaf.allowed is None:
                return optax.MaskedNode()
            side = min(leaf.sides)
            shape = (side, method.rank_of(streams, side))
            dtype = jnp.promote_types(p.dtype, jnp.float32)
            # The same columns for every gradient: equal matrices then have equal bases.
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

        mixed = []  # by leaf, the arrays to orthogonalise: one per gradient
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
            return indices, axes, [plan[i].role for i in indices]

        out = [_sum(arrays) for arrays in mixed]
        indices, axes, roles = pick(lambda leaf: leaf.allowed is None)
        results = map_matrices(method.orthogonalize, [mixed[i][0] for i in indices], axes, roles)
        for i, result in zip(indices, results, strict=True):
            out[i] = result

        indices, axes, roles = pick(lambda leaf: leaf.allowed is not None)
        limit = limit_at(state.count, threshold, step_gate)
        fns, extras = [], []
        for i in indices:
            allowed, side = np.asarray(plan[i].allowed), min(plan[i].sides)
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
                out[i] = out[i] * factor(*leaf.sides)
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


def sum_streams(num_constraints: int) -> optax.GradientTransformationExtraArgs:
    """Add the constraint gradients to the primary one, for the optimizer that follows."""

    def update(updates, state, params=None, **extra_args):
        del params
        trees = [
            updates,
            *(extra_args[f"constraint_{i}"] for i in range(num_constraints)),
        ]
        return jax.tree.map(lambda *x: _sum(x).astype(x[0].dtype), *trees), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def with_constraints(
    inner: optax.GradientTransformationExtraArgs, num_constraints: int
) -> optax.GradientTransformationExtraArgs:
    """Check ``constraint_grads`` and pass each tree on as an argument of its own.

    Every argument is then a tree like the gradients, so ``optax.partition`` masks it with them.
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
        check_unspent(updates, constraint_grads)
        streams = {f"constraint_{i}": tree for i, tree in enumerate(trees)}
        return inner.update(updates, state, params, **streams, **extra_args)

    return passing_by(optax.GradientTransformationExtraArgs(inner.init, update))
