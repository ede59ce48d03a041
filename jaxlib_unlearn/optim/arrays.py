"""Shared functions of stacks of matrices ``(..., r, c)``."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

# Half-precision passes, the default of some accelerators, would ruin bases and Gram matrices.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def concrete(*trees: Any) -> bool:
    """True if all values are concrete, so that eager code may branch and loop in Python.

    An eager step then compiles nothing: ``lax.cond``, ``lax.map`` and ``lax.scan`` over functions
    created at every step would be compiled at every step.

    Args:
        trees: Any pytrees.

    Returns:
        False if an array is being traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> concrete({"w": jnp.ones(2)}), bool(jax.jit(lambda x: concrete(x))(jnp.ones(2)))
        (True, False)
    """
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding in an array's type, or None where the axes of its mesh are not Explicit.

    Args:
        x: An array.

    Returns:
        A sharding as ``jax.sharding.reshard`` and ``out_sharding=`` take it, or None.

    Example:
        >>> import jax.numpy as jnp
        >>> explicit_sharding(jnp.ones(2)) is None
        True
    """
    sharding: Any = jax.typeof(x).sharding
    mesh = sharding.mesh
    return None if mesh.empty or not mesh.are_all_axes_explicit else sharding


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose of the last two axes.

    Args:
        x: The matrices, ``(..., r, c)``.

    Returns:
        ``(..., c, r)``.

    Example:
        >>> import jax.numpy as jnp
        >>> adjoint(jnp.array([[1, 2j]])).tolist()
        [[(1-0j)], [-2j]]
    """
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def scale_to_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices divided by their largest entry, in float32 or wider, and that entry.

    Args:
        x: The matrices, ``(..., r, c)``.

    Returns:
        ``(..., r, c)`` and ``(..., 1, 1)``; a zero matrix is divided by one.

    Example:
        >>> import jax.numpy as jnp
        >>> x, largest = scale_to_one(jnp.array([[1e-30, -2e-30]]))
        >>> x.tolist()
        [[0.5, -1.0]]
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    largest = jnp.where(largest == 0, 1, largest)
    return x / largest, largest


def matrix_by_matrix(
    fn: Callable[[jax.Array], Any], elsewhere: Callable[[jax.Array], Any] | None = None
) -> Callable[[jax.Array], Any]:
    """A function applied to matrices one by one on CPUs, as a batch on other devices.

    This makes products faster and keeps decompositions from deadlocking: jaxlib's LAPACK calls
    distribute a batch over the workers of XLA's thread pool while the calling worker waits, so as
    many concurrent calls as there are workers wait forever (jaxlib 0.10.2, two cores, batched QRs:
    after a few hundred). On CPUs matrices go one by one under ``jax.vmap`` as well. Both modes of
    differentiation use ``fn`` in a plain loop (``elsewhere`` on other devices).

    Args:
        fn: A function that takes ``(..., r, c)`` and returns a tree of arrays with the same leading
            axes.
        elsewhere: The function that is called on devices other than CPUs; None for ``fn``.

    Returns:
        A function with the same arguments and results.

    Example:
        >>> import jax.numpy as jnp
        >>> svdvals = matrix_by_matrix(lambda x: jnp.linalg.svd(x, compute_uv=False))
        >>> svdvals(jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])).tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """
    one = jax.custom_batching.sequential_vmap(fn)

    def on_cpu(x):
        lead = x.shape[:-2]
        if not lead:
            return one(x)
        out = jax.vmap(one)(x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)

    def loop(x):
        lead = x.shape[:-2]
        if not lead:
            return fn(x)
        out = jax.lax.map(fn, x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)

    @jax.custom_jvp
    def apply(x):
        return jax.lax.platform_dependent(x, cpu=on_cpu, default=elsewhere or fn)

    @apply.defjvp
    def derivative(primals, tangents):
        # The result of `sequential_vmap` cannot be transposed; a loop can.
        def plain(x):
            return jax.lax.platform_dependent(x, cpu=loop, default=elsewhere or fn)

        return jax.jvp(plain, primals, tangents)

    return apply


def cholesky_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""QR of tall matrices by matrix products, for devices that are slow at anything else.

    .. math::
        A^H A + \epsilon I = L L^H, \quad Q = A L^{-H}, \quad R = L^H \qquad
        \text{three times, on columns of unit length}

    Householder QR on a TPU works column by column and takes a minute to compile; this method needs
    matrix products and one small factorisation. The shift keeps it finite for dependent columns:
    zero columns stay zero, and dependent ones become shorter than one.

    Args:
        x: The matrices, ``(..., r, c)`` with r >= c.

    Returns:
        ``(..., r, c)`` and the upper triangular ``(..., c, c)``, its diagonal positive.

    Example:
        >>> import jax.numpy as jnp
        >>> q, r = cholesky_qr(jnp.array([[3.0, 3.0], [4.0, 4.0], [0.0, 2.0]]))
        >>> q.round(4).tolist(), r.round(4).tolist()
        ([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]], [[5.0, 5.0], [0.0, 2.0]])

    References:
        Fukaya et al., SIAM J. Sci. Comput. 42(1), 2020, "Shifted Cholesky QR".
    """
    q, largest = scale_to_one(x)
    length = jnp.sqrt(jnp.sum(jnp.real(q * jnp.conj(q)), axis=-2, keepdims=True))
    q = q / jnp.where(length == 0, 1, length)
    size, eps = x.shape[-1], jnp.finfo(q.dtype).eps
    eye = jnp.eye(size, dtype=q.dtype)
    whole = eye * (length * largest)
    # The trace is at most `size`: the shift has the order of its rounding error.
    for shift in (10 * size * eps, eps, eps):
        lower = jnp.linalg.cholesky(matmul(adjoint(q), q) + shift * eye)
        q = jax.lax.linalg.triangular_solve(
            lower, q, left_side=False, lower=True, transpose_a=True, conjugate_a=True
        )
        whole = matmul(adjoint(lower), whole)
    return q.astype(x.dtype), whole.astype(x.dtype)


eigh = matrix_by_matrix(lambda x: tuple(jnp.linalg.eigh(x)))
thin_qr = matrix_by_matrix(lambda x: tuple(jnp.linalg.qr(x)), cholesky_qr)
thin_svd = matrix_by_matrix(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))


@jax.custom_jvp
def polar_factor(x: jax.Array, tolerance: jax.typing.ArrayLike) -> jax.Array:
    r"""The exact polar factor from an SVD, without the directions of small singular values.

    .. math::
        X = U \Sigma V^H \mapsto \sum_{\sigma_i > \tau \sigma_1} u_i v_i^H

    The derivative is computed for the factor as a whole: it stays finite at equal singular values,
    unlike the derivatives of single vectors.

    Args:
        x: The matrices, ``(..., r, c)``, float32 or wider.
        tolerance: The bound tau, a number or ``(...)``; a negative one keeps the directions of
            singular value zero, which are arbitrary.

    Returns:
        ``(..., r, c)``.

    Example:
        >>> import jax.numpy as jnp
        >>> polar_factor(jnp.array([[0.0, 2.0], [-0.5, 0.0]]), 1e-6).round(5).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    u, keep, _, vh = _kept(x, tolerance)
    return matmul(u * keep[..., None, :].astype(u.dtype), vh)


def _kept(x: jax.Array, tolerance: jax.typing.ArrayLike):
    u, s, vh = thin_svd(x)
    least = jnp.asarray(tolerance, s.dtype)[..., None] * s[..., :1]
    return u, (s > least).astype(s.dtype), s, vh


@polar_factor.defjvp
def _polar_derivative(primals, tangents):
    (x, tolerance), (dx, _) = primals, tangents
    u, keep, s, vh = _kept(x, tolerance)
    v, uh = adjoint(vh), adjoint(u)
    z = matmul(matmul(uh, dx), v)
    one, other = keep[..., :, None], keep[..., None, :]

    def over(number, by):
        return jnp.where(by == 0, 0, number / jnp.where(by == 0, 1, by))

    # As a function of singular values, the map is 1 for kept values and 0 for the others.
    even = over(one - other, s[..., :, None] - s[..., None, :])
    odd = over(one + other, s[..., :, None] + s[..., None, :])
    inner = (even * (z + adjoint(z)) + odd * (z - adjoint(z))) / 2
    out = matmul(matmul(u, inner), vh)
    inverse = over(keep, s)[..., None, :].astype(u.dtype)
    rows, columns = x.shape[-2:]
    if rows > columns:
        rest = matmul(dx, v)
        out += matmul((rest - matmul(u, matmul(uh, rest))) * inverse, vh)
    elif columns > rows:
        rest = matmul(uh, dx)
        out += matmul(u * inverse, rest - matmul(matmul(rest, v), vh))
    return matmul(u * keep[..., None, :].astype(u.dtype), vh), out
