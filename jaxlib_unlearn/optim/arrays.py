"""What every piece that computes on stacks of matrices ``(..., r, c)`` needs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Half-precision passes, the default of some accelerators, would ruin bases and Gram matrices.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose of the last two axes.

    Args:
        x: ``(..., r, c)``.

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
        x: ``(..., r, c)``.

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


def matrix_by_matrix(fn: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """A decomposition of a batch of matrices that does not hang on CPUs.

    jaxlib's LAPACK calls share a batch out among the workers of XLA's thread pool and let the
    calling worker wait: as many such calls at once as there are workers wait for ever (jaxlib
    0.10.2, two cores, batched QRs: after a few hundred). On CPUs matrices therefore go one by one,
    under ``jax.vmap`` as well; elsewhere as a batch.

    Args:
        fn: takes ``(..., r, c)`` and returns a tree of arrays with the same leading axes.

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

    @functools.wraps(fn)
    def apply(x):
        return jax.lax.platform_dependent(x, cpu=on_cpu, default=fn)

    return apply


eigh = matrix_by_matrix(lambda x: tuple(jnp.linalg.eigh(x)))
thin_qr = matrix_by_matrix(lambda x: tuple(jnp.linalg.qr(x)))
thin_svd = matrix_by_matrix(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)))
