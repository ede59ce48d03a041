"""What every piece that computes on stacks of matrices ``(..., r, c)`` needs."""

import functools

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
