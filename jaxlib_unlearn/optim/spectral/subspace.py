r"""Leading singular subspaces, exact or from a few passes of block subspace iteration.

The iteration is for optimizers that need the top k singular vectors of a slowly changing matrix at
every step: it starts from the vectors of the step before and costs matrix products, two thin QR
decompositions a pass and one small SVD, where a full SVD is slow or missing (accelerators).

Both work in float32 or wider, whatever the input, and both return *paired* vectors: column i of u
belongs to column i of v. Columns without a singular value are zero in u and v, so a zero or
rank-deficient matrix adds nothing instead of arbitrary directions.
"""

import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.arrays import adjoint, eigh, matmul, scale_to_one, thin_qr, thin_svd
from jaxlib_unlearn.optim.draws import normal


@functools.partial(jax.jit, static_argnames=("rank", "eps"))
def top_singular(
    matrix: jax.Array, rank: int, eps: float | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The leading singular triplets, from a full SVD: the reference, and slow.

    .. math::
        X \approx U \operatorname{diag}(s) V^H, \qquad s_1 \ge \dots \ge s_k

    Args:
        matrix: The matrices, ``(..., r, c)``.
        rank: The number k of triplets, at most ``min(r, c)``.
        eps: The relative rounding error of the entries; None for the rounding of their dtype.

    Returns:
        u ``(..., r, k)``, s ``(..., k)``, v ``(..., c, k)``. Singular values at rounding level,
        ``max(r, c) * eps * s_1``, count as zero, and so do their vectors.

    Raises:
        ValueError: the rank does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> u, s, v = top_singular(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> s.tolist(), abs(u[1]).tolist()
        ([3.0, 2.0], [1.0, 0.0])
    """
    _check_rank(matrix.shape, rank)
    x, largest = scale_to_one(matrix)
    u, s, vh = thin_svd(x)
    return _without_null(
        u[..., :rank], s[..., :rank], adjoint(vh)[..., :rank], matrix.shape, largest, eps
    )


@functools.partial(jax.jit, static_argnames=("rank", "eps"))
def subspace_iteration(
    matrix: jax.Array,
    start: jax.Array,
    rank: int,
    passes: int | jax.Array = 2,
    eps: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The leading singular triplets by block subspace iteration with a Rayleigh-Ritz step.

    .. math::
        V = \mathrm{qr}(X^H Q), \quad Q = \mathrm{qr}(X V) \quad \text{(a pass)}; \qquad
        Q R = X V, \quad R = A S B^H, \quad U = Q A, \quad V \leftarrow V B

    With a block of b columns each pass shrinks the tangent of the angle to the leading k-subspace
    by :math:`(s_{b+1} / s_k)^2`.

    Args:
        matrix: The matrices, ``(..., r, c)``.
        start: The block to start from, ``(..., r, b)`` with k <= b <= min(r, c), of any scale: the
            left vectors of a similar matrix, with a few random columns beside them so that new
            directions can come in.
        rank: The number k of triplets.
        passes: The number of passes, at least 1; it may be traced.
        eps: The relative rounding error of the entries, as in :func:`top_singular`.

    Returns:
        u, s and v, as from :func:`top_singular`.

    Raises:
        ValueError: rank or block does not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
        >>> start = jax.random.normal(jax.random.key(0), (3, 2))
        >>> u, s, v = subspace_iteration(x, start, 1, passes=8)
        >>> round(float(s[0]), 3)
        3.0

    References:
        Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.1.
    """
    _check_rank(matrix.shape, rank)
    width = start.shape[-1]
    if not rank <= width <= min(matrix.shape[-2:]) or start.shape[-2] != matrix.shape[-2]:
        raise ValueError(
            f"a start of shape {start.shape} does not fit rank {rank} of {matrix.shape}: "
            "(..., rows, between rank and min(rows, columns))"
        )
    x, largest = scale_to_one(matrix)
    back = adjoint(x)

    def to_right(q):
        return thin_qr(matmul(back, q))[0]

    def one_pass(_, v):
        return to_right(thin_qr(matmul(x, v))[0])

    first = 1 if isinstance(passes, int) else jnp.ones_like(passes)  # of one dtype
    v = jax.lax.fori_loop(first, passes, one_pass, to_right(start.astype(x.dtype)))
    q, r = thin_qr(matmul(x, v))
    a, s, bh = thin_svd(r)
    u = matmul(q, a[..., :rank])
    v = matmul(v, adjoint(bh)[..., :rank])
    return _without_null(u, s[..., :rank], v, matrix.shape, largest, eps)


def random_block(
    seed: int | jax.Array, purpose: str, count: int | jax.Array, shape: Sequence[int], dtype
) -> jax.Array:
    """Random columns to start from: normal, the same for the same (seed, purpose, count).

    Args:
        seed: A uint32.
        purpose: A text, e.g. the parameter's path.
        count: The number of the step.
        shape: The shape of the result.
        dtype: A real or complex dtype.

    Returns:
        An array of that shape.

    Example:
        >>> import jax.numpy as jnp
        >>> a = random_block(0, "layers/up/kernel", 1, (4, 2), jnp.float32)
        >>> b = random_block(0, "layers/up/kernel", 1, (4, 2), jnp.float32)
        >>> bool((a == b).all())
        True
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return normal(jax.random.fold_in(key, count), tuple(shape), dtype)


@jax.jit
def gram_inverse_root(columns: jax.Array, tol: jax.typing.ArrayLike = 1e-5) -> jax.Array:
    r"""The factor that makes columns orthonormal: the nearest orthonormal ones are ``A @ root``.

    .. math::
        (A^H A)^{-1/2} = E \operatorname{diag}(\lambda_i^{-1/2} [\lambda_i > \tau]) E^H

    Args:
        columns: The columns A, ``(..., r, n)``, of unit or zero length.
        tol: The bound tau, a number or ``(...)``. Eigenvalues up to it are dropped: they belong to
            directions that the columns do not span. The eigenvalues of two orthonormal bases are 1
            +- the cosines of their angles.

    Returns:
        ``(..., n, n)``.

    Example:
        >>> import jax.numpy as jnp
        >>> twice = jnp.array([[1.0, 1.0], [0.0, 0.0]])
        >>> (twice @ gram_inverse_root(twice)).round(4).tolist()
        [[0.7071, 0.7071], [0.0, 0.0]]
    """
    gram = matmul(adjoint(columns), columns)
    return inverse_root(gram, jnp.asarray(tol, jnp.finfo(gram.dtype).dtype))[0]


@jax.custom_jvp
def inverse_root(gram: jax.Array, tol: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse root of positive matrices without eigenvalues up to ``tol``; all eigenvalues.

    The derivative is computed for the root as a whole, and is finite at equal eigenvalues.

    Args:
        gram: The matrices, ``(..., n, n)``, Hermitian.
        tol: The bound of dropped eigenvalues, a number or ``(...)``, in the real dtype of ``gram``.

    Returns:
        ``(..., n, n)`` and the eigenvalues ``(..., n)``, the smallest first.

    Example:
        >>> import jax.numpy as jnp
        >>> root, values = inverse_root(jnp.diag(jnp.array([4.0, 0.0])), jnp.float32(1e-5))
        >>> root.tolist(), values.tolist()
        ([[0.5, 0.0], [0.0, 0.0]], [0.0, 4.0])
    """
    values, vectors, roots = _roots(gram, tol)
    return matmul(vectors * roots[..., None, :], adjoint(vectors)), values


def _roots(gram: jax.Array, tol: jax.Array):
    values, vectors = eigh(gram)
    keep = values > tol[..., None]
    return values, vectors, jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1)), 0)


@inverse_root.defjvp
def _inverse_root_derivative(primals, tangents):
    (gram, tol), (change, _) = primals, tangents
    values, vectors, roots = _roots(gram, tol)
    z = matmul(matmul(adjoint(vectors), change), vectors)
    one, other = roots[..., :, None], roots[..., None, :]
    both = one * other
    # Divided differences of the root; for two kept eigenvalues in a form that subtracts nothing.
    gap = values[..., :, None] - values[..., None, :]
    mixed = jnp.where(one == other, 0, (one - other) / jnp.where(gap == 0, 1, gap))
    kept = -jnp.square(both) / jnp.where(both > 0, one + other, 1)
    z = z * jnp.where(both > 0, kept, mixed)
    root = matmul(vectors * roots[..., None, :], adjoint(vectors))
    slopes = jnp.real(jnp.diagonal(matmul(matmul(adjoint(vectors), change), vectors), 0, -2, -1))
    return (root, values), (matmul(matmul(vectors, z), adjoint(vectors)), slopes)


def _check_rank(shape: Sequence[int], rank: int) -> None:
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank lies between 1 and min(rows, columns) of {shape}, got {rank}")


def _without_null(
    u, s, v, shape: Sequence[int], largest, eps: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    eps = float(jnp.finfo(s.dtype).eps) if eps is None else eps
    keep = s > max(shape[-2:]) * eps * s[..., :1]
    mask = keep[..., None, :].astype(u.dtype)
    return u * mask, jnp.where(keep, s, 0) * largest[..., 0], v * mask
