r"""One-shot merging of task matrices without interference between their singular subspaces.

A task matrix is the change made by fine-tuning: trained minus original weights. Added up, tasks
interfere where their leading singular vectors overlap on both sides; merging replaces the stacked
vectors by their nearest orthonormal ones first. ``optim.sift`` carries the same idea into every
step of training.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.arrays import adjoint, matmul
from jaxlib_unlearn.optim.spectral.subspace import gram_inverse_root, top_singular


def merge(
    task_matrices: jax.Array | Sequence[jax.Array],
    rank: int | None = None,
    *,
    tol: jax.typing.ArrayLike = 1e-5,
) -> jax.Array:
    r"""The sum of task matrices, their singular vectors first made orthonormal to each other.

    .. math::
        T_i \approx U_i S_i V_i^H, \qquad
        T_* = \mathrm{msign}([U_1 \dots U_T]) \operatorname{diag}(S_1, \dots, S_T)\,
        \mathrm{msign}([V_1 \dots V_T])^H

    with :math:`\mathrm{msign}(A) = A (A^H A)^{-1/2}`, the nearest matrix with orthonormal columns.

    Args:
        task_matrices: a sequence of T matrices ``(..., m, n)`` or one array ``(T, ..., m, n)``;
            axes in between are batch axes (layers, for example).
        rank: vectors kept of each task; None for ``min(m, n) // T``, which is also the maximum,
            because more columns than rows cannot be orthonormal.
        tol: eigenvalues of the Gram matrices up to this are dropped: directions shared by tasks
            (or opposed in them) up to rounding.

    Returns:
        The merged matrix ``(..., m, n)`` in the dtype of the tasks; add it to the original weights.

    Raises:
        ValueError: no task, shapes that differ, or a rank below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> one, two = jnp.diag(jnp.array([3.0, 0.0])), jnp.diag(jnp.array([0.0, 2.0]))
        >>> merge([one, two], rank=1).round(4).tolist()
        [[3.0, 0.0], [0.0, 2.0]]

    References:
        Gargiulo et al., "Task Singular Vectors" (CVPR 2025), TSV-Merge.
    """
    tasks = _stack(task_matrices)
    side = max(1, min(tasks.shape[-2:]) // tasks.shape[0])
    return _merge(tasks, tol, rank=side if rank is None else min(_positive(rank), side))


def interference(
    task_matrices: jax.Array | Sequence[jax.Array], rank: int | None = None, normalize: bool = False
) -> jax.Array:
    r"""The interference of task matrices when they are added: singular task interference (STI).

    .. math::
        \mathrm{STI} = \left\| (\hat U^H \hat U - I)\, \Sigma\, (\hat V^H \hat V - I) \right\|_1,
        \qquad \hat U = [U_1 \dots U_T],\ \Sigma = \operatorname{diag}(S_1, \dots, S_T)

    (the sum of absolute entries). Zero if the tasks are orthogonal on either side.

    Args:
        task_matrices: the tasks, as :func:`merge` takes them.
        rank: leading singular vectors of each task, k; None for all, and never more than all.
        normalize: divide by the number of entries off the diagonal, ``T k (T k - 1)``.

    Returns:
        ``(...)`` float32 or wider, not negative. With equal singular values within a task the
        vectors, and with them this number, are not unique.

    Raises:
        ValueError: see :func:`merge`; or a single vector is to be normalised.

    Example:
        >>> import jax.numpy as jnp
        >>> task = jnp.diag(jnp.array([3.0, 0.0]))
        >>> float(interference([task, task], rank=1)), float(interference([task, task[::-1]], 1))
        (6.0, 0.0)

    References:
        Gargiulo et al., "Task Singular Vectors" (CVPR 2025); arXiv:2604.04231.
    """
    tasks = _stack(task_matrices)
    full = min(tasks.shape[-2:])
    rank = full if rank is None else min(_positive(rank), full)
    size = rank * tasks.shape[0]
    if normalize and size < 2:
        raise ValueError("one task of rank 1 has no pair of vectors to normalise by")
    total = _interference(tasks, rank=rank)
    return total / (size * (size - 1)) if normalize else total


def _stack(task_matrices) -> jax.Array:
    shapes = [jnp.shape(x) for x in task_matrices]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) < 2:
        raise ValueError(f"tasks are matrices of one shape, at least one; got shapes {shapes}")
    return jnp.stack([jnp.asarray(x) for x in task_matrices])


def _positive(rank: int) -> int:
    if rank < 1:
        raise ValueError(f"rank is at least 1, got {rank}")
    return rank


@functools.partial(jax.jit, static_argnames="rank")
def _merge(tasks: jax.Array, tol: jax.typing.ArrayLike, *, rank: int) -> jax.Array:
    u, s, v = _bases(tasks, rank)
    left = matmul(u, gram_inverse_root(u, tol))
    right = matmul(v, gram_inverse_root(v, tol))
    return matmul(left * s[..., None, :], adjoint(right)).astype(tasks.dtype)


@functools.partial(jax.jit, static_argnames="rank")
def _interference(tasks: jax.Array, *, rank: int) -> jax.Array:
    u, s, v = _bases(tasks, rank)
    left, right = _off_diagonal(u), _off_diagonal(v)
    return jnp.sum(jnp.abs(matmul(left * s[..., None, :], right)), axis=(-2, -1))


def _bases(tasks: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Left vectors (..., m, T k), values (..., T k), right vectors (..., n, T k)."""
    parts = zip(*(top_singular(task, rank) for task in tasks), strict=True)
    u, s, v = (jnp.concatenate(part, axis=-1) for part in parts)
    return u, s, v


def _off_diagonal(columns: jax.Array) -> jax.Array:
    """The Gram matrix minus the identity; null columns count as orthonormal."""
    gram = matmul(adjoint(columns), columns)
    return gram * (1 - jnp.eye(gram.shape[-1], dtype=gram.dtype))
