r"""Random directions for zeroth-order optimizers: one row per family, drawn leaf by leaf.

A family defines the random direction Z of a matrix. Every draw is a function of (seed, purpose,
step, query, leaf, layer) by ``fold_in``, so it is regenerated when it is needed and never stored,
and drawing one layer at a time gives the same numbers as drawing the whole stack. Kernels are
``(in, out)``: the transpose of the matrices in the papers, whose m is our ``out``.

=============  ===========================  ==================  ===============================
family         direction of a matrix        kept over steps     core drawn per query
=============  ===========================  ==================  ===============================
dense          z                            nothing             z
sparse         z * mask                     nothing             z
uvt            V U^T                        V (in, r)           U (out, r), Gaussian
uzv            sqrt(in out) / r  V Z U^T    V and U, orthonorm. Z (r, r)
subspace       u P^T                        P (out, r), orth.   u (in, r)
curvature      z / sqrt(H)                  H (a moment)        z
sphere         sqrt(d) z / norm of all z    nothing             z
signs          +1 or -1                     nothing             signs
rowwise        u v^T / sqrt(r)              nothing             u (in, r) above v (out, r)
=============  ===========================  ==================  ===============================

Vectors are always drawn dense. Low-rank directions (except in ``rowwise``) are linear in their
core, so sums over queries run over cores and are lifted once; ``rowwise`` multiplies the factors of
many queries at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.optim.arrays import thin_qr
from jaxlib_unlearn.optim.draws import normal
from jaxlib_unlearn.optim.matrices import MatrixAxes

Basis = tuple[jax.Array, ...]
Moments = Mapping[str, jax.Array]

# The purpose of random numbers: the first number folded into the seed.
BASIS, QUERY, MASK = 0, 1, 2


class Factored(NamedTuple):
    """A kernel with a low-rank term that is never multiplied out: ``kernel + left @ right.T``.

    Args:
        kernel: The kernel, ``(in, out)``.
        left: The left factor, ``(in, r)``.
        right: The right factor, ``(out, r)``.
    """

    kernel: jax.Array
    left: jax.Array
    right: jax.Array


class Perturbed(Factored):
    """A :class:`Factored` kernel whose factors are never differentiated.

    :func:`matmul` may multiply it out; a gradient of its factors would then cost as much as a
    gradient of the kernel.
    """

    __slots__ = ()


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """``x @ kernel`` in the dtype of x; a :class:`Factored` kernel is applied factor by factor.

    For n rows the factors take ``2 n r (in + out)`` operations and their product ``2 r in out``, so
    a :class:`Perturbed` kernel is multiplied out if n is larger than ``in out / (in + out)`` (288
    for a square kernel of width 576) and products are computed in float32 or wider: rounded to
    bfloat16 the sum would lose a small perturbation.

    Args:
        x: The inputs, ``(..., in)``.
        kernel: An array ``(in, out)``, a :class:`Factored` or a :class:`Perturbed`.

    Returns:
        ``(..., out)``.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = Factored(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> matmul(jnp.ones((1, 2)), kernel).tolist()
        [[2.0, 2.0, 2.0]]
    """
    if not isinstance(kernel, Factored):
        return x @ kernel.astype(x.dtype)
    if isinstance(kernel, Perturbed) and _exact(x.dtype):
        fan_in, fan_out = kernel.kernel.shape
        if math.prod(x.shape[:-1]) * (fan_in + fan_out) > fan_in * fan_out:
            term = jnp.matmul(kernel.left, kernel.right.T, precision="highest")
            return x @ (kernel.kernel.astype(x.dtype) + term.astype(x.dtype))
    low = (x @ kernel.left.astype(x.dtype)) @ kernel.right.astype(x.dtype).T
    return x @ kernel.kernel.astype(x.dtype) + low


def _exact(dtype: Any) -> bool:
    """True if products of arrays of this dtype keep at least the 24 bits of float32.

    Accelerators round the factors of float32 products unless they are told not to.
    """
    if jnp.dtype(dtype).itemsize != 4:
        return jnp.dtype(dtype).itemsize > 4
    told = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return told in ("highest", "float32") or jax.default_backend() == "cpu"


class Leaf(NamedTuple):
    """The description of a parameter (of one layer of it, if layers are stacked) for a draw.

    Args:
        path: The path of the parameter, e.g. ``layers/0/mlp/up/kernel``.
        name: The path without the number of a segment; the draws depend on it.
        code: A stable hash of the name.
        shape: The shape of one layer.
        dtype: The dtype of the parameter.
        axes: The axes of one layer as a stack of matrices, or None for vectors.
        trainable: True if the parameter is perturbed and updated at all.
        decayed: True if weight decay may touch the parameter.
    """

    path: str
    name: str
    code: int
    shape: tuple[int, ...]
    dtype: Any
    axes: MatrixAxes | None
    trainable: bool
    decayed: bool


class Family(NamedTuple):
    """One row of the table above.

    Args:
        name: The name of the row.
        core: A function from ``(in, out)`` to the shape of the Gaussian core of one matrix; None
            draws leaves dense.
        basis: A function from ``(key, n, in, out, dtype)`` to arrays ``(n, ...)`` that are kept for
            some steps.
        factors: A function ``(core, basis, in) -> (left (n, in, r), right (n, out, r))``.
        gain: A function from ``(in, out)`` to the factor of the estimate for a matrix.
        vector_gain: The factor of the estimate for a vector.
        weigh: An elementwise function ``(z, key, moments) -> z``, for dense families.
        static_mask: True if ``weigh`` gets the same key at every step.
        normalize: True to scale z to norm sqrt(d) over all d parameters.
        sample: A function from ``(key, shape, dtype)`` to independent entries of mean 0 and
            variance 1.
        linear: True if ``factors`` is linear in the core.
        parts: True if every query is a part of the batch with its own loss
            (``zeroth_order.parts``).
    """

    name: str
    core: Callable[[int, int], tuple[int, int]] | None = None
    basis: Callable[[jax.Array, int, int, int, Any], Basis] | None = None
    factors: Callable[[jax.Array, Basis, int], tuple[jax.Array, jax.Array]] | None = None
    gain: Callable[[int, int], float] = lambda fan_in, fan_out: 1.0
    vector_gain: float = 1.0
    weigh: Callable[[jax.Array, jax.Array, Moments], jax.Array] | None = None
    static_mask: bool = False
    normalize: bool = False
    sample: Callable[[jax.Array, tuple[int, ...], Any], jax.Array] = normal
    linear: bool = True
    parts: bool = False


def dense() -> Family:
    """Gaussian entries (MeZO, arXiv:2305.17333)."""
    return Family("dense")


def sphere() -> Family:
    r"""The unit sphere over *all* parameters, times :math:`\sqrt d`.

    With :math:`Z = \sqrt d\, z / \lVert z \rVert` the estimate :math:`c Z` contains the factor d of
    the sphere, and ``eps`` is the step per coordinate (the radius is :math:`\epsilon \sqrt d`).
    """
    return Family("sphere", normalize=True)


def signs() -> Family:
    """Entries of +1 and -1 (Rademacher), as in FZOO (arXiv:2506.09034)."""

    def sample(key, shape, dtype):
        return jax.random.rademacher(key, shape, dtype)

    return Family("signs", sample=sample)


def sparse(keep: float, mask: str = "step") -> Family:
    """Gaussian entries, with a random share of them kept.

    The mask is Bernoulli, as in public code, not by magnitude as in Sparse-MeZO's paper.

    Args:
        keep: The share of the entries that are perturbed, in (0, 1].
        mask: The mask: "step" draws a new one every step (for all its queries), "static" only once.

    Raises:
        ValueError: ``keep`` or ``mask`` out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of perturbed entries, in (0, 1], got {keep}")
    if mask not in ("step", "static"):
        raise ValueError(f"mask is 'step' or 'static', got {mask!r}")

    def weigh(z, key, moments):
        del moments
        # Not a product: with keep = 1 z stays as it is, bit for bit.
        return jnp.where(jax.random.bernoulli(key, keep, z.shape), z, 0)

    return Family("sparse", weigh=weigh, static_mask=mask == "static")


def curvature() -> Family:
    """Gaussian entries over the root of the moment "hessian" (HiZOO, arXiv:2402.15173)."""
    return Family("curvature", weigh=lambda z, key, moments: z * jax.lax.rsqrt(moments["hessian"]))


def uvt(rank: int, divide_vectors: bool = False) -> Family:
    r"""Low rank, one factor kept: :math:`V U^T` with U drawn per query (LOZO, arXiv:2410.07698).

    The estimate is divided by the rank, which makes it unbiased.

    Args:
        rank: The rank r, capped at the smaller side of a matrix.
        divide_vectors: True to divide the estimate for vectors too, as public code does (which
            biases it).
    """
    _check_rank(rank)

    def width(*sides):
        return min(rank, *sides)

    return Family(
        "uvt",
        core=lambda fan_in, fan_out: (fan_out, width(fan_in, fan_out)),
        basis=lambda key, n, fan_in, fan_out, dtype: (
            normal(key, (n, fan_in, width(fan_in, fan_out)), dtype),
        ),
        factors=lambda core, basis, fan_in: (basis[0], core),
        gain=lambda fan_in, fan_out: 1 / width(fan_in, fan_out),
        vector_gain=1 / rank if divide_vectors else 1.0,
    )


def uzv(rank: int) -> Family:
    r"""Low rank, both bases kept: :math:`\sqrt{mn} / r \; V Z U^T` (SubZero, arXiv:2410.08989).

    Args:
        rank: The rank r, capped at the smaller side of a matrix.
    """
    _check_rank(rank)

    def basis(key, n, fan_in, fan_out, dtype):
        r = min(rank, fan_in, fan_out)
        left, right = fold(key, jnp.arange(2))
        return orthonormal(left, n, fan_in, r, dtype), orthonormal(right, n, fan_out, r, dtype)

    def factors(core, basis, fan_in):
        del fan_in
        v, u = basis
        scale = math.sqrt(v.shape[-2] * u.shape[-2]) / core.shape[-1]
        return scale * jnp.matmul(v, core, precision="highest"), u

    def core(fan_in, fan_out):
        r = min(rank, fan_in, fan_out)
        return r, r

    return Family("uzv", core=core, basis=basis, factors=factors)


def subspace(rank: int) -> Family:
    r"""Inside the span of a random orthonormal P on the output side: :math:`u P^T` (ZO-Muon).

    Args:
        rank: The dimension r of the subspace, capped at the smaller side of a matrix.
    """
    _check_rank(rank)
    return Family(
        "subspace",
        core=lambda fan_in, fan_out: (fan_in, min(rank, fan_in, fan_out)),
        basis=lambda key, n, fan_in, fan_out, dtype: (
            orthonormal(key, n, fan_out, min(rank, fan_in, fan_out), dtype),
        ),
        factors=lambda core, basis, fan_in: (core, basis[0]),
    )


def rowwise(rank: int) -> Family:
    r"""Low rank, with both factors drawn per query, and a query for every row (HyperscaleES).

    .. math::
        Z_i = \frac{1}{\sqrt r} u_i v_i^T, \qquad u_i \sim N(0, 1)^{in \times r}, \;
        v_i \sim N(0, 1)^{out \times r}

    Its entries are uncorrelated with variance 1, so on a quadratic loss the estimate is unbiased.
    In general its mean is :math:`E[\nabla f(W + \epsilon Z) \, v v^T / r]`, the gradient up to
    terms in :math:`\epsilon^2`. The rows of a batch share one product, and row b adds a term of its
    own,

    .. math::
        y_b = x_b W + \tfrac{\epsilon}{\sqrt r} (x_b u_b) v_b^T

    which is ``2 r (in + out)`` operations a token beside ``2 in out`` (1 of 288 for a square kernel
    of width 576 and rank 1). The step multiplies the factors of all q rows once, ``2 q r in out``
    operations: as many as a forward pass takes for q r tokens. In addition to activations a pass
    holds the factors of one layer, ``4 q r (in + out)`` bytes a kernel.

    Args:
        rank: The rank r, capped at the smaller side of a matrix.

    References:
        Sarkar et al., "Evolution strategies at the hyperscale" (EGGROLL), arXiv:2511.16652.
    """
    _check_rank(rank)

    def factors(core, basis, fan_in):
        del basis
        return core[:, :fan_in] / math.sqrt(core.shape[-1]), core[:, fan_in:]

    return Family(
        "rowwise",
        core=lambda fan_in, fan_out: (fan_in + fan_out, min(rank, fan_in, fan_out)),
        factors=factors,
        linear=False,
        parts=True,
    )


def orthonormal(key: jax.Array, n: int, rows: int, rank: int, dtype: Any) -> jax.Array:
    """Haar-distributed orthonormal columns: QR of a Gaussian, its diagonal made positive.

    Args:
        key: The key of the draw.
        n: The number of matrices.
        rows: The length of a column.
        rank: The number of columns, at most ``rows``.
        dtype: The dtype, float32 or float64.

    Returns:
        ``(n, rows, rank)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> p = orthonormal(jax.random.key(0), 1, 5, 2, jnp.float32)[0]
        >>> bool(jnp.allclose(p.T @ p, jnp.eye(2), atol=1e-6))
        True
    """
    q, r = thin_qr(normal(key, (n, rows, rank), dtype))
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) >= 0, 1, -1).astype(dtype)
    return q * sign[:, None, :]


def wide(dtype: Any) -> Any:
    """The dtype in which directions are drawn and added: float64 for float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def is_low_rank(family: Family, leaf: Leaf) -> bool:
    """True if the leaf's directions have a core and a basis."""
    return family.core is not None and leaf.axes is not None


def leaf_keys(key: jax.Array, leaves: Sequence[Leaf], index: jax.Array | int | None) -> jax.Array:
    """The keys of leaves, or of one layer of them: by name and absolute layer index.

    All keys are folded at once: a fold is a loop of a program, and separate folds for every leaf,
    query and place of a draw made most of the time that a zeroth-order step took to compile.

    Args:
        key: A typed key, or an array of them.
        leaves: The n leaves, at least one.
        index: The absolute index of the layer, None if layers are not stacked.

    Returns:
        ``(n, *key.shape)`` keys.
    """
    codes = jnp.asarray(np.array([leaf.code for leaf in leaves], np.uint32))
    keys = fold(key, codes.reshape(-1, *[1] * key.ndim))
    return keys if index is None else fold(keys, index)


def fold(keys: jax.Array, data: jax.typing.ArrayLike) -> jax.Array:
    """``jax.random.fold_in`` of arrays that are broadcast against each other.

    Args:
        keys: Typed keys.
        data: Integers.

    Returns:
        Keys.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> keys = fold(jax.random.key(0), jnp.arange(3))
        >>> bool(keys[2] == jax.random.fold_in(jax.random.key(0), 2))
        True
    """
    data = jnp.asarray(data)
    shape = jnp.broadcast_shapes(keys.shape, data.shape)
    if not shape:
        return jax.random.fold_in(keys, data)
    keys, data = jnp.broadcast_to(keys, shape), jnp.broadcast_to(data, shape)
    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), data.reshape(-1)).reshape(shape)


def draw_basis(family: Family, leaf: Leaf, key: jax.Array) -> Basis:
    """The arrays that the family keeps for a leaf (one layer of it), ``(n, ...)``; () for most.

    Args:
        family: The family, a row of the table above.
        leaf: The parameter.
        key: The leaf's own key (:func:`leaf_keys`) for the purpose ``BASIS`` and the refresh.
    """
    if family.basis is None or leaf.axes is None or not leaf.trainable:
        return ()
    return family.basis(key, *leaf.axes.sizes(leaf.shape), wide(leaf.dtype))


def draw_core(
    family: Family, leaf: Leaf, key: jax.Array, mask_key: Any, moments: Moments
) -> jax.Array:
    """The draw for one query: a core ``(n, ., .)``, or z of the leaf's own shape.

    Args:
        family: The family, a row of the table above.
        leaf: The parameter.
        key: The leaf's own key (:func:`leaf_keys`) for the purpose ``QUERY``, the step and the
            query.
        mask_key: The leaf's own key for the purpose ``MASK`` and the step (or no step), for
            ``weigh``.
        moments: The arrays like one layer that ``weigh`` reads.
    """
    dtype = wide(leaf.dtype)
    if family.core is not None and leaf.axes is not None:
        n, fan_in, fan_out = leaf.axes.sizes(leaf.shape)
        return normal(key, (n, *family.core(fan_in, fan_out)), dtype)
    z = family.sample(key, leaf.shape, dtype)
    return z if family.weigh is None else family.weigh(z, mask_key, moments)


def lift(family: Family, leaf: Leaf, core: jax.Array, basis: Basis) -> jax.Array:
    """The direction of the leaf's own shape that belongs to a core."""
    if family.factors is None or leaf.axes is None:
        return core
    left, right = family.factors(core, basis, leaf.axes.sizes(leaf.shape)[1])
    return as_leaf(leaf, jnp.einsum("nir,nor->nio", left, right, precision="highest"))


def as_leaf(leaf: Leaf, z: jax.Array) -> jax.Array:
    """Matrices ``(n, in, out)`` as an array of the leaf's own shape."""
    assert leaf.axes is not None
    order = leaf.axes.stack + leaf.axes.fan_in + leaf.axes.fan_out
    z = z.reshape(tuple(leaf.shape[a] for a in order))
    return jnp.transpose(z, tuple(order.index(a) for a in range(len(order))))


def perturb(
    family: Family,
    leaf: Leaf,
    x: jax.Array,
    core: jax.Array,
    basis: Basis,
    scale: jax.Array,
    factored: type[Factored] | None = None,
) -> Any:
    """One layer of a parameter moved along a direction: ``x + scale Z``, rounded once.

    A table ``(out, in)`` becomes a :class:`Factored` whose kernel has these axes: its two factors
    change places.

    Args:
        family: The family, a row of the table above.
        leaf: The parameter.
        x: The value of the parameter (one layer).
        core: The core, from :func:`draw_core`.
        basis: The basis, from :func:`draw_basis`.
        scale: The step along Z.
        factored: The class as which plain kernels and tables with low-rank directions are returned;
            None for arrays.

    Returns:
        An array like x, or a :class:`Factored`.
    """
    scale = scale.astype(core.dtype)
    last = leaf.name.rsplit("/", 1)[-1]
    plain = last == "kernel" and leaf.axes == MatrixAxes((), (0,), (1,))
    table = last == "embedding" and leaf.axes == MatrixAxes((), (1,), (0,))
    if (
        factored is not None
        and (plain or table)
        and family.factors is not None
        and leaf.axes is not None
    ):
        left, right = family.factors(core, basis, leaf.axes.sizes(leaf.shape)[1])
        left, right = (left[0], right[0]) if plain else (right[0], left[0])
        return factored(x, scale * left, right)
    return (x.astype(core.dtype) + scale * lift(family, leaf, core, basis)).astype(x.dtype)


def _check_rank(rank: int) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is a whole number of at least 1, got {rank!r}")
