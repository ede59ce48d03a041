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


def _bases(tasks: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Left vectors (..., m, T k), values (..., T k), right vectors (..., n, T k)."""
    parts = zip(*(top_singular(task, rank) for task in tasks), strict=True)
    u, s, v = (jnp.concatenate(part, axis=-1) for part in parts)
    return u, s, v
