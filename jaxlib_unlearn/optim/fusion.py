r"""One matrix and its streams: are they in conflict, and the update that keeps them apart.

The part of SIFT that works on buckets of matrices; ``optim.sift`` is the transformation around it.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.arrays import adjoint, matmul, scale_to_one, thin_svd
from jaxlib_unlearn.optim.orthogonalize import Orthogonalizer, newton_schulz
from jaxlib_unlearn.optim.subspace import gram_inverse_root, subspace_iteration, top_singular

MSIGNS = ("gram", "ns", "svd")
BASES = ("svd", "subspace")
JORDAN = newton_schulz()  # one object: functions that hold it are equal


def fuse(
    u: jax.Array, v: jax.Array, msign: str = "gram", tol: jax.typing.ArrayLike = 1e-5
) -> jax.Array:
    r"""The fused update of streams whose singular vectors are given.

    .. math::
        O = \mathrm{msign}([U_1 \dots U_S])\, \mathrm{msign}([V_1 \dots V_S])^H

    Args:
        u: left vectors ``(..., S, r, k)``, float32 or wider.
        v: right vectors ``(..., S, c, k)``, column i with column i of u.
        msign: "gram", "ns" or "svd", see :func:`scale_by_sift`.
        tol: for "gram", a number or ``(...)``.

    Returns:
        ``(..., r, c)`` with S k singular values 1 (fewer where directions were dropped).

    Example:
        >>> import jax.numpy as jnp
        >>> one, other = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [1.0]])
        >>> both = jnp.stack([one, other])
        >>> fuse(both, both).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    u, v = _side_by_side(u), _side_by_side(v)
    if msign == "gram":
        root = matmul(gram_inverse_root(u, tol), gram_inverse_root(v, tol))
        return matmul(matmul(u, root), adjoint(v))
    polar = JORDAN if msign == "ns" else _polar
    return matmul(polar(u), adjoint(polar(v)))


def _side_by_side(x: jax.Array) -> jax.Array:
    """(..., S, r, k) -> (..., r, S k)"""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def _polar(x: jax.Array) -> jax.Array:
    u, _, vh = thin_svd(x)
    return matmul(u, vh)


class Method(NamedTuple):
    """How a matrix is treated, fixed when the optimizer is built; see ``scale_by_sift``."""

    rank: int
    rank_cap: bool
    msign: str
    bases: str
    passes: int
    first_passes: int
    match_norm: bool
    orthogonalize: Orthogonalizer

    def rank_of(self, streams: int, side: int) -> int:
        """Singular vectors a stream, for matrices whose shorter side is ``side``."""
        return max(1, min(self.rank, side // streams if self.rank_cap else side))


@functools.lru_cache(maxsize=64)
def matrix_function(method: Method, always: bool) -> Callable[..., Any]:
    """The function of a bucket: Muon on the sum, or the fused update where a cosine is low.

    Args:
        method: how.
        always: every matrix is fused at every step: no test, one batch.

    Returns:
        For ``buckets.map_stacks``: takes one ``(n, r, c)`` a stream and a dict of ``limit`` (n,),
        the cosine below which to fuse, ``tol`` (n,), and for ``bases="subspace"`` ``basis``
        (n, S, r, k), ``fresh`` (n, r, p), random columns, and ``stale`` (n,), whether the basis is
        not that of the step before. Returns ``(n, r, c)`` and a dict of ``cos`` (n,), ``fused``
        (n,) and ``basis``. The same object for the same arguments, so nothing recompiles.

    Example:
        >>> import jax.numpy as jnp
        >>> method = Method(1, True, "gram", "svd", 2, 8, False, JORDAN)
        >>> numbers = {"limit": jnp.full(3, 0.5), "tol": jnp.full(3, 1e-5)}
        >>> ones = jnp.ones((3, 2, 2))
        >>> out, aux = matrix_function(method, False)(ones, ones, numbers)
        >>> aux["cos"].tolist(), aux["fused"].tolist()
        ([1.0, 1.0, 1.0], [False, False, False])
    """

    def fused_update(streams, extra):
        """Matrices (..., r, c) a stream; a block takes the passes of its stalest matrix."""
        stacked = jnp.stack(streams, axis=-3)
        side = stacked.shape[-2]
        k, basis = method.rank_of(len(streams), side), extra.get("basis")
        if basis is None:
            u, _, v = top_singular(stacked, k)
        else:
            fresh = extra["fresh"][..., None, :, :]
            fresh = jnp.broadcast_to(fresh, (*basis.shape[:-1], fresh.shape[-1]))
            passes = jnp.where(jnp.any(extra["stale"]), method.first_passes, method.passes)
            start = jnp.concatenate([basis, fresh], axis=-1)
            u, s, v = subspace_iteration(stacked, start, k, passes)
            # Columns that found no direction keep what they had: zeros are no start.
            basis = jnp.where(s[..., None, :] > 0, u, basis).astype(basis.dtype)
        out = fuse(u, v, method.msign, extra["tol"])
        if method.match_norm:
            out *= (side / min(side, k * len(streams))) ** 0.5
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
        streams: two or more ``(n, r, c)``.

    Returns:
        ``(n,)`` in [-1, 1], float32 or wider; 1 beside a zero matrix, which opposes nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> smallest_cosine([jnp.eye(2)[None], -jnp.eye(2)[None]]).round(5).tolist()
        [-1.0]
    """

    def inner(x, y):
        return jnp.sum(jnp.real(x * jnp.conj(y)), axis=(-2, -1))

    def cosine(x, y):
        norms = jnp.sqrt(inner(x, x) * inner(y, y))
        zero = norms == 0
        return jnp.where(zero, 1, jnp.clip(inner(x, y) / jnp.where(zero, 1, norms), -1, 1))

    scaled = [scale_to_one(x)[0] for x in streams]
    return functools.reduce(jnp.minimum, (cosine(*p) for p in itertools.combinations(scaled, 2)))
