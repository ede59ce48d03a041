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

A table of coefficients belongs to one normaliser (how the singular values are brought below one
first); the two are kept together in :class:`Table` and never mixed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxlib_unlearn.optim.arrays import adjoint, matrix_by_matrix, polar_factor, scale_to_one

Orthogonalizer = Callable[[jax.Array], jax.Array]
_BLOCK_ROWS = 512  # least rows of a block of a product whose result is Hermitian
_MOST_BLOCKS = 8  # more would save less than a ninth of the rest
Row = tuple[float, float, float]


class Table(NamedTuple):
    """Coefficients of an iteration and the normaliser they were made for.

    Args:
        rows: one ``(a, b, c)`` per step.
        margin: the input is divided by ``margin`` times its Frobenius norm.
        tail: the row to repeat after the last one, or None if the length is fixed.
        steps: how many steps the table is published for.
        preconditioner: "frobenius" or "aol" (rows scaled by inverse roots of the Gram's row sums).
        narrow: whether 16-bit products are safe; if not, they are done in float32.
    """

    rows: tuple[Row, ...]
    margin: float = 1.0
    tail: Row | None = None
    steps: int = 5
    preconditioner: str = "frobenius"
    narrow: bool = True


def _with_safety(rows: Sequence[Row], safety: float) -> tuple[Row, ...]:
    """The polynomials p(x / safety): rounding may push a singular value slightly above one."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


_JORDAN = (3.4445, -4.7750, 2.0315)
_CLASSICAL = (1.875, -1.25, 0.375)
# Minimax quintics for the interval [1e-3, 1], each composed on the range of the one before.
_POLAR_EXPRESS: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

TABLES: dict[str, Table] = {
    "jordan": Table((_JORDAN,), tail=_JORDAN),
    "you5": Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "you6": Table(
        (
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        ),
        steps=6,
    ),
    # As the authors run it: the safety factor enters the rows and the normaliser.
    "polar_express": Table(_with_safety(_POLAR_EXPRESS, 1.01), margin=1.01, tail=_CLASSICAL),
    "polar_express_speedrun": Table(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
    ),
    "polar_express_gram": Table(_with_safety(_POLAR_EXPRESS[:5], 1.05)),
    "cans5": Table(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        # Values reach the edge of what the next polynomial contracts: bfloat16 diverges (5e11).
        narrow=False,
    ),
    # The corrected table. The one before it changes the sign of large singular values.
    "aol4": Table(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        steps=4,
        preconditioner="aol",
    ),
    "cubic5": Table(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        )
    ),
    "deepseek10": Table((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, steps=10),
    "classical": Table((_CLASSICAL,), tail=_CLASSICAL),
}


def newton_schulz(
    coeffs: str | Sequence[float] | Sequence[Sequence[float]] = "jordan",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Orthogonalizer:
    r"""Newton-Schulz iteration with a published or a custom table of coefficients.

    .. math::
        X \leftarrow X / \|X\|_F, \qquad
        X \leftarrow a_t X + (b_t A + c_t A^2) X, \quad A = X X^H, \quad t = 1 \dots T

    on the orientation with fewer rows than columns; on CPUs and in float32, matrices at least twice
    as wide as tall as in :func:`gram_newton_schulz` with a restart every three steps. Norms are
    summed in float32 (float64 for float64) after a division by the largest entry, so neither tiny
    nor huge gradients are lost and no epsilon is needed; zeros stay zeros.

    Args:
        coeffs: a name in ``TABLES``, one row ``(a, b, c)`` to repeat, or rows. Rows given as
            numbers are used after a plain Frobenius normaliser, and their number is the number of
            steps.
        steps: number of steps; None for the number the table was published for (5 for "jordan").
            Tables without a repeatable last row have one length only.
        dtype: dtype of the matrix products (``jnp.bfloat16`` halves memory); None for the input's.

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
    table, rows = _rows(coeffs, steps)
    elsewhere = functools.partial(_iterate, rows=rows, table=table, dtype=dtype)
    here = functools.partial(_iterate_on_cpu, rows=rows, table=table, dtype=dtype)
    return functools.partial(_wide_way, matrix_by_matrix(here, elsewhere), elsewhere)


def polar_express(steps: int = 5, dtype: jax.typing.DTypeLike | None = None) -> Orthogonalizer:
    r"""Polar Express: the composition of quintics that is optimal on singular values >= 1e-3.

    .. math::
        (a_t, b_t, c_t) = \arg\min \max_{\sigma \in [\ell_t, u_t]} |1 - p(\sigma)|

    Args:
        steps: number of steps, any positive number (rows after the seventh are the limit).
        dtype: dtype of the matrix products; None keeps the input's.

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
    restart cost :math:`28 r^3 + 8 r^2 c` against :math:`10 r^3 + 20 r^2 c`: worth it from
    ``c >= 2 r`` on. Square matrices take the plain iteration.

    Args:
        coeffs: as in :func:`newton_schulz`; a table with the "aol" preconditioner is refused.
        steps: as in :func:`newton_schulz`.
        restarts: indices (from 0) of the steps that begin from the current X.
        dtype: dtype of the products. float16 is safer than bfloat16 here: the Gram matrix squares
            the rounding error.

    Returns:
        A function ``(..., r, c) -> (..., r, c)``.

    Raises:
        ValueError: as in :func:`newton_schulz`, or an "aol" table.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (4, 16))
        >>> y, z = gram_newton_schulz("jordan")(x), newton_schulz("jordan")(x)
        >>> bool(abs(y - z).max() < 1e-4)
        True

    References:
        Dao AI Lab, "Gram Newton-Schulz" (2026).
    """
    table, rows = _rows(coeffs, steps)
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

    Directions without a singular value are left out, so zeros stay zeros.

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
        given: a function ``(..., r, c) -> (..., r, c)``; or a name: "newton_schulz",
            "polar_express", "gram_newton_schulz" or "svd" for these functions with their defaults,
            or a table of ``TABLES`` for :func:`newton_schulz` with it; or None.
        default: the name that None stands for.

    Returns:
        The function; for a name always the same object, so that nothing compiles twice.

    Raises:
        ValueError: neither a function nor a known name.

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


def _rows(coeffs, steps: int | None) -> tuple[Table, tuple[Row, ...]]:
    """The table and its coefficients, one row per step."""
    if isinstance(coeffs, str):
        if coeffs not in TABLES:
            raise ValueError(f"unknown coefficients {coeffs!r}; known: {', '.join(TABLES)}")
        table = TABLES[coeffs]
    else:
        array = np.asarray(coeffs, float)
        if array.shape == (3,):
            row: Row = tuple(array.tolist())  # type: ignore[assignment]
            table = Table((row,), tail=row)
        elif array.ndim == 2 and array.shape[0] > 0 and array.shape[1] == 3:
            table = Table(tuple(tuple(r) for r in array.tolist()), steps=len(array))  # type: ignore
        else:
            raise ValueError(f"coefficients are (3,) or (steps, 3), got shape {array.shape}")
    steps = table.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if table.tail is None and steps != len(table.rows):
        raise ValueError(f"{coeffs!r} has {len(table.rows)} steps, got steps={steps}")
    rows = table.rows[:steps]
    if table.tail is not None:
        rows += (table.tail,) * (steps - len(rows))
    a, b, c = rows[0]
    squares = np.linspace(0.0, 1.0, 1001)[1:]
    if np.min(a + b * squares + c * squares**2) <= 0:
        raise ValueError(f"the first polynomial {rows[0]} is not positive on (0, 1]: signs turn")
    return table, rows


def _wide(x: jax.Array) -> tuple[jax.Array, bool]:
    """The orientation with rows <= columns, and whether that meant a transpose."""
    if x.ndim < 2:
        raise ValueError(f"an orthogonaliser takes (..., rows, columns), got shape {x.shape}")
    tall = x.shape[-2] > x.shape[-1]
    return (adjoint(x), True) if tall else (x, False)


def _real_square(x: jax.Array) -> jax.Array:
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else x**2


def _normalize(x: jax.Array, margin: float) -> jax.Array:
    x = scale_to_one(x)[0]
    square = jnp.sum(_real_square(x), axis=(-2, -1), keepdims=True)
    # No epsilon: the norm of what scale_to_one returns is zero or at least one. (Zeros are replaced
    # before the root: its derivative at zero is infinite.)
    return x / (margin * jnp.sqrt(jnp.where(square == 0, 1, square)))


def _precondition_aol(x: jax.Array) -> jax.Array:
    """diag(s) X with s_i = (sum_j |X X^H|_ij)^(-1/2), which has no singular value above one."""
    x = scale_to_one(x)[0]
    sums = jnp.sum(jnp.abs(x @ adjoint(x)), axis=-1, keepdims=True)
    return x * jnp.where(sums == 0, 0, jax.lax.rsqrt(jnp.where(sums == 0, 1, sums)))


def symmetric_product(left: jax.Array, right: jax.Array) -> jax.Array:
    r"""``left @ right`` for a result known to be Hermitian: computes little more than one triangle.

    .. math::
        S_{ij} = A_i B_j \text{ for } j \le i, \qquad S_{ij} = S_{ji}^H \text{ for } j > i

    in n blocks of rows, each one product with the columns up to its own: (n + 1) / 2n of the work.

    Args:
        left: ``(..., r, k)``.
        right: ``(..., k, r)``.

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
    return jnp.where(block[:, None] >= block[None, :], lower, adjoint(lower))


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
        return row[0] * x + _polynomial(symmetric_product(x, adjoint(x)), row) @ x

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
    gram, q = symmetric_product(x, adjoint(x)), None  # q = None stands for the identity
    eye = jnp.eye(x.shape[-2], dtype=x.dtype)
    for t, row in enumerate(rows):
        if t in restarts and q is not None:
            x = q @ x
            gram, q = symmetric_product(x, adjoint(x)), None
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
