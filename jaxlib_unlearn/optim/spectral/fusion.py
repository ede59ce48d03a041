r"""One matrix and its streams: the test for a conflict, and the update that separates them.

This part of SIFT works on buckets of matrices; ``optim.sift`` is the transformation around it. A
stream is the momentum of one gradient.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.arrays import adjoint, matmul, polar_factor, scale_to_one
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, newton_schulz
from jaxlib_unlearn.optim.spectral.subspace import inverse_root, subspace_iteration, top_singular

MSIGNS = ("gram", "ns", "svd")
BASES = ("svd", "subspace")
JORDAN = newton_schulz()  # one object: functions that hold it are equal
NEAR = 1e-3  # the least eigenvalue that float32 Gram matrices resolve well enough
SAME = 1e-6  # streams that differ by less (of their norm) differ by float32 rounding alone


def fuse(
    u: jax.Array, v: jax.Array, msign: str = "gram", tol: jax.typing.ArrayLike = 1e-5
) -> jax.Array:
    r"""The fused update of streams from their singular vectors.

    .. math::
        O = \mathrm{msign}([U_1 \dots U_S])\, \mathrm{msign}([V_1 \dots V_S])^H

    Args:
        u: The left vectors ``(..., S, r, k)``, float32 or wider.
        v: The right vectors ``(..., S, c, k)``; column i belongs to column i of u.
        msign: The method, "gram", "ns" or "svd": see :func:`scale_by_sift`.
        tol: The bound of eigenvalues that "gram" drops, a number or ``(...)``.

    Returns:
        ``(..., r, c)`` with S k singular values 1 (fewer where directions were dropped).

    Example:
        >>> import jax.numpy as jnp
        >>> one, other = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
        >>> both = jnp.stack([one, other])
        >>> fuse(both, both).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if msign == "gram":
        return _by_gram(u, v, tol)[0]
    u, v = _side_by_side(u), _side_by_side(v)
    polar = JORDAN if msign == "ns" else _polar
    return matmul(polar(u), adjoint(polar(v)))


def _by_gram(u: jax.Array, v: jax.Array, tol: Any) -> tuple[jax.Array, jax.Array]:
    """The update, and the smallest eigenvalue ``(...)`` of a Gram matrix without absent vectors."""
    out, smallest = [], []
    for columns in (_side_by_side(u), _side_by_side(v)):
        gram = matmul(adjoint(columns), columns)
        tol = jnp.asarray(tol, jnp.finfo(gram.dtype).dtype)
        root, values = inverse_root(gram, tol)
        out.append(matmul(columns, root))
        absent = jnp.sum(jnp.real(jnp.diagonal(gram, 0, -2, -1)) == 0, -1, keepdims=True)
        last = values.shape[-1] - 1
        smallest.append(jnp.take_along_axis(values, jnp.minimum(absent, last), -1)[..., 0])
    return matmul(out[0], adjoint(out[1])), jnp.minimum(*smallest)


def _side_by_side(x: jax.Array) -> jax.Array:
    """(..., S, r, k) -> (..., r, S k)"""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def _polar(x: jax.Array) -> jax.Array:
    return polar_factor(x, -1.0)


def _in_double(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function computed in float64 (complex128), its result rounded to the input's dtype.

    One call at a time under ``jax.vmap``: batching rules would run without 64-bit types.
    """

    def widen(x):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return x.astype(jnp.promote_types(x.dtype, jnp.float64)) if inexact else x

    def call(*args):
        with jax.enable_x64(True):
            return fn(*jax.tree.map(widen, args)).astype(args[0].dtype)

    return jax.custom_batching.sequential_vmap(call)


def _same_vectors(streams: jax.Array, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give streams that agree or are opposed up to rounding the vectors of the first one."""
    norms = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(streams)), (-2, -1), keepdims=True))
    unit = streams / jnp.where(norms == 0, 1, norms)
    count = streams.shape[-3]
    us, vs = [u[..., i, :, :] for i in range(count)], [v[..., i, :, :] for i in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        for sign in (1, -1):
            apart = unit[..., j, :, :] - sign * unit[..., i, :, :]
            apart = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(apart)), (-2, -1), keepdims=True))
            us[j] = jnp.where(apart < SAME, us[i], us[j])
            vs[j] = jnp.where(apart < SAME, sign * vs[i], vs[j])
    return jnp.stack(us, -3), jnp.stack(vs, -3)


class Method(NamedTuple):
    """The settings of the fused update, fixed when the optimizer is built (``scale_by_sift``)."""

    rank: int
    rank_cap: bool
    msign: str
    bases: str
    passes: int
    first_passes: int
    match_norm: bool
    orthogonalize: Orthogonalizer

    def rank_of(self, streams: int, side: int) -> int:
        """Singular vectors per stream, for matrices whose shorter side is ``side``."""
        return max(1, min(self.rank, side // streams if self.rank_cap else side))


@functools.lru_cache(maxsize=64)
def matrix_function(method: Method, always: bool) -> Callable[..., Any]:
    """The function of a bucket: Muon on the sum, or the fused update where a cosine is low.

    Args:
        method: The settings of the fused update.
        always: True to fuse every matrix at every step: no test, one batch.

    Returns:
        A function for ``buckets.map_stacks``. It takes one ``(n, r, c)`` per stream and a dict of
        ``limit`` (n,), the cosine below which to fuse, ``tol`` (n,), and for ``bases="subspace"``
        ``basis`` (n, S, r, k), ``fresh`` (n, r, p), random columns, and ``stale`` (n,), True if the
        basis does not come from the step before. It returns ``(n, r, c)`` and a dict of ``cos``
        (n,), ``fused`` (n,) and ``basis``. Equal arguments give the same object, so nothing
        recompiles.

    Example:
        >>> import jax.numpy as jnp
        >>> method = Method(1, True, "gram", "svd", 2, 8, False, JORDAN)
        >>> numbers = {"limit": jnp.full(3, 0.5), "tol": jnp.full(3, 1e-5)}
        >>> ones = jnp.ones((3, 2, 2))
        >>> out, aux = matrix_function(method, False)(ones, ones, numbers)
        >>> aux["cos"].tolist(), aux["fused"].tolist()
        ([1.0, 1.0, 1.0], [False, False, False])
    """

    def rank_of(stacked):
        return method.rank_of(*stacked.shape[-3:-1])

    def by_singular_values(stacked, tol, start):
        """The update, as accurate at all angles as the dtype of its arguments allows."""
        # The entries have float32 accuracy even where they are passed as float64.
        k, eps = rank_of(stacked), float(jnp.finfo(jnp.float32).eps)
        if start is None:
            u, _, v = top_singular(stacked, k, eps)
        else:
            u, _, v = subspace_iteration(stacked, start[0], k, start[1], eps)
        u, v = _same_vectors(stacked, u, v)
        if jnp.finfo(stacked.dtype).bits < 64:
            tol = jnp.maximum(tol, 1e-11)  # below, singular vectors differ by rounding alone
        left, right = (polar_factor(_side_by_side(x), jnp.sqrt(tol)) for x in (u, v))
        return matmul(left, adjoint(right))

    in_double = _in_double(by_singular_values)

    @jax.custom_jvp
    def directions(stacked, extra):
        """Directions of (..., S, r, c); a block has the passes that its stalest matrix needs."""
        k, basis, start = rank_of(stacked), extra.get("basis"), None
        if basis is None:
            u, _, v = top_singular(stacked, k)
        else:
            fresh = extra["fresh"][..., None, :, :]
            fresh = jnp.broadcast_to(fresh, (*basis.shape[:-1], fresh.shape[-1]))
            passes = jnp.where(jnp.any(extra["stale"]), method.first_passes, method.passes)
            start = jnp.concatenate([basis, fresh], axis=-1), passes
            u, s, v = subspace_iteration(stacked, start[0], k, passes)
            # Columns that found no direction keep their old vectors: zeros would be no start.
            basis = jnp.where(s[..., None, :] > 0, u, basis).astype(basis.dtype)
        if method.msign != "gram":
            return fuse(u, v, method.msign), basis
        out, smallest = _by_gram(u, v, extra["tol"])
        if jnp.finfo(stacked.dtype).bits < 64:
            out = jax.lax.cond(
                jnp.any(smallest < NEAR),
                lambda *args: jax.lax.platform_dependent(
                    *args, cpu=in_double, cuda=in_double, default=by_singular_values
                ),
                lambda *args: out,
                stacked,
                extra["tol"],
                start,
            )
        return out, basis

    @directions.defjvp
    def derivative(primals, tangents):
        """The derivative from exact singular vectors that Gram matrices can resolve."""
        (stacked, extra), (change, _) = primals, tangents
        found, basis = directions(stacked, extra)
        least = 1e3 * float(jnp.finfo(stacked.dtype).eps)

        def exact(stacked):
            u, _, v = top_singular(stacked, rank_of(stacked))
            return fuse(u, v, method.msign, jnp.maximum(extra["tol"], least))

        slope = jax.jvp(exact, (stacked,), (change,))[1]
        return (found, basis), (slope, None if basis is None else jnp.zeros_like(basis))

    def fused_update(streams, extra):
        stacked = jnp.stack(streams, axis=-3)
        stacked = stacked.astype(jnp.promote_types(stacked.dtype, jnp.float32))
        out, basis = directions(stacked, extra)
        if method.match_norm:
            side = stacked.shape[-2]
            out *= (side / min(side, rank_of(stacked) * len(streams))) ** 0.5
        return out.astype(streams[0].dtype), basis

    def plain(streams, extra):
        wide = jnp.promote_types(streams[0].dtype, jnp.float32)
        total = functools.reduce(operator.add, (x.astype(wide) for x in streams))
        return method.orthogonalize(total.astype(streams[0].dtype)), extra.get("basis")

    def plain_one(streams, extra):
        out, basis = plain([x[None] for x in streams], extra)
        return out[0], basis

    def one_by_one(streams, extra, fused):
        # A loop, not a batch: batched, both branches of the condition would run for all.
        return jax.lax.map(
            lambda args: jax.lax.cond(args[0], fused_update, plain_one, *args[1:]),
            (fused, streams, extra),
        )

    def function(*args):
        *streams, extra = args
        cos = smallest_cosine(streams)
        fused = cos < extra["limit"]
        if always:
            out, basis = fused_update(streams, extra)
        else:
            out, basis = jax.lax.cond(
                jnp.any(fused),
                one_by_one,
                lambda streams, extra, _: plain(streams, extra),  # one batch, as fast as Muon
                streams,
                extra,
                fused,
            )
        return out, {"cos": cos, "fused": fused, "basis": basis}

    return function


def smallest_cosine(streams: Sequence[jax.Array]) -> jax.Array:
    r"""The smallest cosine of any two streams, matrix by matrix.

    .. math::
        \min_{i < j} \frac{\mathrm{Re} \langle M_i, M_j \rangle_F}{\|M_i\|_F \|M_j\|_F}

    Args:
        streams: Two or more arrays ``(n, r, c)``.

    Returns:
        ``(n,)`` in [-1, 1], float32 or wider; 1 if either matrix is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> smallest_cosine([jnp.eye(2)[None], -jnp.eye(2)[None]]).round(5).tolist()
        [-1.0]
    """

    def inner(x, y):
        return jnp.sum(jnp.real(x * jnp.conj(y)), axis=(-2, -1))

    def cosine(x, y):
        squares = inner(x, x) * inner(y, y)
        zero = squares == 0
        norms = jnp.sqrt(jnp.where(zero, 1, squares))
        return jnp.where(zero, 1, jnp.clip(inner(x, y) / norms, -1, 1))

    scaled = [scale_to_one(x)[0] for x in streams]
    return functools.reduce(jnp.minimum, (cosine(*p) for p in itertools.combinations(scaled, 2)))
