r"""A hook between the polar step and the shape factor, and NorMuon, which uses it."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.optim.matrices import MatrixAxes
from jaxlib_unlearn.optim.signatures import DECAY


class Post(NamedTuple):
    """A step between orthogonalisation and scaling, for ``muon(post=...)`` and ``teon(post=...)``.

    Args:
        init: A function ``(leaf, axes) -> state`` for a leaf of matrices (an array or its shape).
        update: A function ``(direction, axes, state) -> (direction, state)``; it keeps shape and
            dtype.
    """

    init: Callable[[Any, MatrixAxes], Any]
    update: Callable[[jax.Array, MatrixAxes, Any], tuple[jax.Array, Any]]


def normuon(beta2: Annotated[float, DECAY] = 0.95, eps: float = 1e-10) -> Post:
    r"""NorMuon: every output neuron moves by the same RMS; the matrix's norm is unchanged.

    .. math::
        v_j \leftarrow \beta_2 v_j + (1 - \beta_2) \operatorname{mean}_i O_{ij}^2, \qquad
        O'_{ij} = \frac{O_{ij}}{\sqrt{v_j} + \epsilon}, \qquad
        O'' = O' \frac{\|O\|_F}{\|O'\|_F}

    with i over the inputs and j over the outputs of one matrix. There is no bias correction: the
    last line removes any common factor. The state is one number per output neuron.

    Args:
        beta2: The decay of the second moment, in [0, 1).
        eps: The number epsilon that is added to the root.

    Returns:
        A :class:`Post`.

    Raises:
        ValueError: ``beta2`` outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> post, axes = normuon(), MatrixAxes((), (0,), (1,))
        >>> x = jnp.array([[1.0, 0.0], [0.0, 0.1]])
        >>> y, _ = post.update(x, axes, post.init(x, axes))
        >>> [round(float(v), 3) for v in (y[0, 0], y[1, 1], jnp.linalg.norm(y))]
        [0.711, 0.711, 1.005]

    References:
        Li et al., "NorMuon", arXiv:2510.05491, algorithm 1 (rows are outputs there).
    """
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 lies in [0, 1), got {beta2}")

    def init(leaf, axes: MatrixAxes):
        shape = [1 if a in axes.fan_in else n for a, n in enumerate(leaf.shape)]
        return jnp.zeros(shape, jnp.promote_types(jnp.finfo(leaf.dtype).dtype, jnp.float32))

    def update(direction, axes: MatrixAxes, v):
        wide = direction.astype(jnp.promote_types(direction.dtype, jnp.float32))
        square = jnp.real(wide * jnp.conj(wide))
        v = beta2 * v + (1 - beta2) * jnp.mean(square, axes.fan_in, keepdims=True)
        scaled = wide / (jnp.sqrt(v) + eps)
        both = axes.fan_in + axes.fan_out
        before = jnp.sum(square, both, keepdims=True)
        after = jnp.sum(jnp.real(scaled * jnp.conj(scaled)), both, keepdims=True)
        factor = jnp.where(after > 0, jnp.sqrt(before / jnp.where(after > 0, after, 1)), 0)
        return (scaled * factor).astype(direction.dtype), v

    return Post(init, update)
