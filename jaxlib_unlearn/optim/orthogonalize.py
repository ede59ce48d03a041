r"""Orthogonalisers: builders of functions that replace a matrix by its polar factor.

Every builder returns a pure function ``(..., r, c) -> (..., r, c)``. With :math:`X = U \Sigma V^T`
it returns (an approximation of) :math:`U V^T`; leading axes are a batch. Coefficients are Python
floats, fixed when the function is built, so they do not enter an optimizer's state.

The iterations apply odd polynomials :math:`\sigma \mapsto a\sigma + b\sigma^3 + c\sigma^5` to the
singular values and need matrix products only:

.. math::
    A = X X^H, \qquad X \leftarrow a X + (b A + c A^2) X

On CPUs matrices are processed one by one (a batch spills the caches and runs at 0.6 to 0.9 of the
speed), wide ones through their Gram matrices, for which float32 is accurate enough.

``optim.coefficients`` has the tables of a, b and c.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxlib_unlearn.optim.arrays import adjoint, matrix_by_matrix, polar_factor, scale_to_one
from jaxlib_unlearn.optim.coefficients import TABLES, Row, Table, rows_of

Orthogonalizer = Callable[[jax.Array], jax.Array]
_BLOCK_ROWS = 512  # the least number of rows in a block of a Hermitian product
_MOST_BLOCKS = 8  # more would save less than a ninth of the rest


def newton_schulz(
    coeffs: str | Sequence[float] | Sequence[Sequence[float]] = "jordan",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Orthogonalizer:
    r"""Newton-Schulz iteration with a published or a custom table of coefficients.

    .. math::
        X \leftarrow X / \|X\|_F, \qquad
        X \leftarrow a_t X + (b_t A + c_t A^2) X, \quad A = X X^H, \quad t = 1 \dots T

    on the orientation with fewer rows than columns. On CPUs and in float32, matrices at least twice
    as wide as tall take the path of :func:`gram_newton_schulz` with a restart every three steps.
    Norms are summed in float32 (float64 for float64) after a division by the largest entry, so
    neither tiny nor huge gradients are lost and no epsilon is needed; zeros stay zeros.

    Args:
        coeffs: The name of a table in ``TABLES``, one row ``(a, b, c)`` to repeat, or rows. Rows
            given as numbers are used after a plain Frobenius normaliser, and their number is the
            number of steps.
        steps: The number of steps; None for the number the table was published for (5 for
            "jordan"). Tables without a repeatable last row have one length only.
        dtype: The dtype of the matrix products (``jnp.bfloat16`` halves memory); None for the
            input's.

    Returns:
        A function ``(..., r, c) -> (..., r, c)`` that keeps the input's dtype.

    Raises:
        ValueError: an unknown table, a number of steps the table does not have, or a first
            polynomial that is not positive on (0, 1] (it would flip the gradient's sign).

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.diag(jnp.array([2.0, 1.0, 0.5]))
        >>> s = jnp.linalg.svd(newton_schulz("polar_express", 8)(x), compute_uv=False)
        >>> bool(jnp.allclose(s, 1.0, atol=1e-4))
        True

    References:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
        Amsel et al., arXiv:2505.16932, section 3 (Polar Express).
    """
    table, rows = rows_of(coeffs, steps)
    elsewhere = functools.partial(_iterate, rows=rows, table=table, dtype=dtype)
    here = functools.partial(_iterate_on_cpu, rows=rows, table=table, dtype=dtype)
    return functools.partial(_wide_way, matrix_by_matrix(here, elsewhere), elsewhere)


def polar_express(steps: int = 5, dtype: jax.typing.DTypeLike | None = None) -> Orthogonalizer:
    r"""Polar Express: the composition of quintics that is optimal on singular values >= 1e-3.

    .. math::
        (a_t, b_t, c_t) = \arg\min \max_{\sigma \in [\ell_t, u_t]} |1 - p(\sigma)|

    Args:
        steps: The number of steps, any positive number (rows after the seventh are the limit).
        dtype: The dtype of the matrix products; None for the input's.

    Returns:
        A function ``(..., r, c) -> (..., r, c)``.

    Raises:
        ValueError: ``steps`` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> jnp.round(polar_express(8)(jnp.array([[3.0, 0.0], [0.0, 0.1]])), 3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    References:
        Amsel et al., arXiv:2505.16932, algorithm 1.
    """
    return newton_schulz("polar_express", steps, dtype)


def gram_newton_schulz(
    coeffs: str | Sequence[float] | Sequence[Sequence[float]] = "polar_express_gram",
    steps: int | None = None,
    restarts: Sequence[int] = (2,),
    dtype: jax.typing.DTypeLike | None = None,
) -> Orthogonalizer:
    r"""Newton-Schulz carried out on the small Gram matrix; the same map up to rounding.

    .. math::
        R = X X^H,\; Q = I; \qquad Z_t = b_t R + c_t R^2, \quad
        Q \leftarrow Q (Z_t + a_t I), \quad R \leftarrow (Z_t + a_t I) R (Z_t + a_t I)

    and finally :math:`Q X`. A restart replaces :math:`X` by :math:`Q X`, which bounds the growth of
    negative eigenvalues that rounding puts into :math:`R`. For r x c matrices five steps with one
    restart cost :math:`28 r^3 + 8 r^2 c` against :math:`10 r^3 + 20 r^2 c`, which pays from
    ``c >= 2 r`` on. Square matrices take the plain iteration.

    Args:
        coeffs: The coefficients, as in :func:`newton_schulz`; a table with the "aol" preconditioner
            is refused.
        steps: The number of steps, as in :func:`newton_schulz`.
        restarts: The indices (from 0) of the steps that begin from the current X.
        dtype: The dtype of the products. float16 is safer than bfloat16 here: the Gram matrix
            squares the rounding error.

    Returns:
        A function ``(..., r, c) -> (..., r, c)``.

    Raises:
        ValueError: the cases of :func:`newton_schulz`, or an "aol" table.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (4, 16))
        >>> y, z = gram_newton_schulz("jordan")(x), newton_schulz("jordan")(x)
        >>> bool(abs(y - z).max() < 1e-4)
        True

    References:
        Dao AI Lab, "Gram Newton-Schulz" (2026).
    """
    table, rows = rows_of(coeffs, steps)
    if table.preconditioner != "frobenius":
        raise ValueError(f"gram_newton_schulz needs a Frobenius-normalised table, got {coeffs!r}")
    iterate = functools.partial(
        _iterate_gram, rows=rows, table=table, restarts=frozenset(restarts), dtype=dtype
    )
    return functools.partial(_wide_way, matrix_by_matrix(iterate), iterate)


def svd() -> Orthogonalizer:
    r"""The exact polar factor from a singular value decomposition: the reference, and slow.

    .. math::
        X = U \Sigma V^H \mapsto \sum_{\sigma_i > \tau} u_i v_i^H, \qquad
        \tau = \max(r, c)\, \epsilon_{machine}\, \sigma_1

    Directions of singular value zero are left out, so zeros stay zeros.

    Returns:
        A function ``(..., r, c) -> (..., r, c)``; computed in float32 for narrower dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> svd()(jnp.array([[0.0, 2.0], [-0.5, 0.0]])).round(5).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    return _exact


def by_name(given: Orthogonalizer | str | None, default: str = "newton_schulz") -> Orthogonalizer:
    """The function that an argument ``orthogonalize=`` stands for.

    Args:
        given: A function ``(..., r, c) -> (..., r, c)``; or a name: "newton_schulz",
            "polar_express", "gram_newton_schulz" or "svd" for these functions with their defaults,
            or the name of a table in ``TABLES`` for :func:`newton_schulz` with that table; or None.
        default: The name that None stands for.

    Returns:
        The function; for a name always the same object, so that nothing compiles twice.

    Raises:
        ValueError: ``given`` is neither a function nor a known name.

    Example:
        >>> import jax.numpy as jnp
        >>> by_name("svd")(jnp.diag(jnp.array([2.0, 0.5]))).round(5).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> by_name("polar_express") is by_name(None, "polar_express")
        True
    """
    name = default if given is None else given
    if isinstance(name, str) and (name in _BUILDERS or name in TABLES):
        return _built(name)
    if isinstance(name, str) or not callable(name):
        names = ", ".join(dict.fromkeys([*_BUILDERS, *TABLES]))
        raise ValueError(f"orthogonalize is a function of matrices or one of {names}; got {name!r}")
    return name


_BUILDERS: dict[str, Callable[[], Orthogonalizer]] = {
    "newton_schulz": newton_schulz,
    "polar_express": polar_express,
    "gram_newton_schulz": gram_newton_schulz,
    "svd": svd,
}


@functools.cache
def _built(name: str) -> Orthogonalizer:
    return _BUILDERS[name]() if name in _BUILDERS else newton_schulz(name)


def _wide(x: jax.Array) -> tuple[jax.Array, bool]:
    """The orientation with rows <= columns, and True if it is the transpose."""
    if x.ndim < 2:
        raise ValueError(f"an orthogonaliser takes (..., rows, columns), got shape {x.shape}")
    tall = x.shape[-2] > x.shape[-1]
    return (adjoint(x), True) if tall else (x, False)


def _real_square(x: jax.Array) -> jax.Array:
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x**2


def _normalize(x: jax.Array, margin: float) -> jax.Array:
    x = scale_to_one(x)[0]
    square = jnp.sum(_real_square(x), axis=(-2, -1), keepdims=True)
    # No epsilon is needed: after scale_to_one a norm is zero or at least one. (Zeros are replaced
    # before the root, as its derivative at zero is infinite.)
    return x / (margin * jnp.sqrt(jnp.where(square == 0, 1, square)))


def _precondition_aol(x: jax.Array) -> jax.Array:
    """diag(s) X with s_i = (sum_j |X X^H|_ij)^(-1/2), which has no singular value above one."""
    x = scale_to_one(x)[0]
    sums = jnp.sum(jnp.abs(x @ jnp.conj(x.mT)), axis=-1, keepdims=True)
    return x * jnp.where(sums == 0, 0, jax.lax.rsqrt(jnp.where(sums == 0, 1, sums)))


def symmetric_product(left: jax.Array, right: jax.Array) -> jax.Array:
    r"""``left @ right`` for a result known to be Hermitian, from little more than one triangle.

    .. math::
        S_{ij} = A_i B_j \text{ for } j \le i, \qquad S_{ij} = S_{ji}^H \text{ for } j > i

    in n blocks of rows; a block is one product with the columns up to its last row. This is
    (n + 1) / 2n of the work.

    Args:
        left: The left factors, ``(..., r, k)``.
        right: The right factors, ``(..., k, r)``.

    Returns:
        ``(..., r, r)``, exactly Hermitian outside the diagonal blocks.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> symmetric_product(x, x.T).tolist()
        [[5.0, 11.0], [11.0, 25.0]]
    """
    rows = left.shape[-2]
    count = min(_MOST_BLOCKS, rows // _BLOCK_ROWS)
    if count < 2:
        return left @ right
    ends = [rows * (i + 1) // count for i in range(count)]
    parts = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        part = left[..., start:end, :] @ right[..., :, :end]
        parts.append(jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, rows - end)]))
    lower = jnp.concatenate(parts, axis=-2)
    block = np.searchsorted(ends, np.arange(rows), side="right")
    return jnp.where(block[:, None] >= block[None, :], lower, jnp.conj(lower.mT))


def _polynomial(gram: jax.Array, row: Any) -> jax.Array:
    """b A + c A^2; cubic rows skip the square."""
    _, b, c = row
    if isinstance(c, float) and not c:
        return b * gram
    return b * gram + c * symmetric_product(gram, gram)


def _compute_dtype(original, dtype, table: Table):
    dtype = jnp.dtype(original if dtype is None else dtype)
    return dtype if table.narrow else jnp.promote_types(dtype, jnp.float32)


def _wide_way(by_platform: Orthogonalizer, batch: Orthogonalizer, x: jax.Array) -> jax.Array:
    """An iteration on the orientation with rows <= columns; `batch` where a loop is impossible."""
    original = x.dtype
    x, turned = _wide(x)
    mesh = jax.typeof(x).sharding.mesh
    # CPUs would loop over an axis that may be sharded.
    explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    x = batch(x) if explicit else by_platform(x)
    return (adjoint(x) if turned else x).astype(original)


def _iterate_on_cpu(x, *, rows: tuple[Row, ...], table: Table, dtype) -> jax.Array:
    """The cheaper method in float32, which tolerates squared rounding errors; 16 bits do not."""
    small, large = x.shape[-2:]
    exact = jnp.finfo(_compute_dtype(x.dtype, dtype, table)).bits >= 32
    if not exact or table.preconditioner != "frobenius" or large < 2 * small or len(rows) < 3:
        return _iterate(x, rows=rows, table=table, dtype=dtype)
    restarts = frozenset(range(2, len(rows), 3))
    return _iterate_gram(x, rows=rows, table=table, restarts=restarts, dtype=dtype)


def _iterate(x, *, rows: tuple[Row, ...], table: Table, dtype) -> jax.Array:
    original = x.dtype
    x = _precondition_aol(x) if table.preconditioner == "aol" else _normalize(x, table.margin)
    x = x.astype(_compute_dtype(original, dtype, table))

    def step(x, row):
        return row[0] * x + _polynomial(symmetric_product(x, jnp.conj(x.mT)), row) @ x

    if x.shape[-2] >= 2 * _BLOCK_ROWS and all(c for _, _, c in rows):
        # Products of many blocks compile once, not once per step.
        return jax.lax.scan(lambda x, row: (step(x, row), None), x, jnp.asarray(rows, x.dtype))[0]
    for row in rows:
        x = step(x, row)
    return x


def _iterate_gram(
    x, *, rows: tuple[Row, ...], table: Table, restarts: frozenset[int], dtype
) -> jax.Array:
    if x.shape[-2] == x.shape[-1]:
        return _iterate(x, rows=rows, table=table, dtype=dtype)
    x = _normalize(x, table.margin).astype(_compute_dtype(x.dtype, dtype, table))
    gram, q = symmetric_product(x, jnp.conj(x.mT)), None  # q = None stands for the identity
    eye = jnp.eye(x.shape[-2], dtype=x.dtype)
    for t, row in enumerate(rows):
        if t in restarts and q is not None:
            x = q @ x
            gram, q = symmetric_product(x, jnp.conj(x.mT)), None
        factor = _polynomial(gram, row) + row[0] * eye
        # Polynomials of one Hermitian matrix commute: their products are Hermitian, too.
        q = factor if q is None else symmetric_product(q, factor)
        if t + 1 < len(rows) and t + 1 not in restarts:
            gram = symmetric_product(factor, symmetric_product(gram, factor))
    assert q is not None
    return q @ x


def _exact(x: jax.Array) -> jax.Array:
    scaled = scale_to_one(x)[0]
    tolerance = max(x.shape[-2:]) * float(jnp.finfo(scaled.dtype).eps)
    return polar_factor(scaled, tolerance).astype(x.dtype)
