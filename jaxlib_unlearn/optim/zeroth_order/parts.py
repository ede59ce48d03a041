r"""Parts of a batch with a direction each: the losses that a family with ``parts`` needs.

.. math::
    f(\theta) = \frac1q \sum_{i<q} f_i(\theta), \qquad
    \hat g = \frac1q \sum_{i<q} \frac{f_i(\theta + \epsilon Z_i) - f_i(\theta - \epsilon Z_i)}
                                     {2 \epsilon} Z_i

A loss that adds up over the rows of a batch is the mean of the losses :math:`f_i` of q equal parts.
Its gradient is the mean of their gradients, so an estimate with one direction for every part is
unbiased (for the smoothed loss). Its q directions are tried out in the time of *one* direction on
the whole batch, as a part costs 1 / q of the batch.

The caller provides one thing more than a scalar loss: ``value_fn(params, part=part)``, the loss of
one part. This is the smallest interface that is exact. Losses per row beside the scalar would have
to be defined anew for every objective, and would tie the estimate to models that take one kernel a
row. A part is a micro-batch, and every objective that adds up over rows already has the loss of a
micro-batch. Evaluating parts under ``jax.vmap`` shares the product of a batch with the unperturbed
kernel, since only a low-rank term differs between parts.
"""

from typing import Any, NamedTuple

import jax


class Part(NamedTuple):
    """One of the equal parts of a batch.

    Args:
        index: The index of the part, () int32; it may be traced and batched.
        count: The number q of parts.
    """

    index: Any
    count: int


def take(batch: Any, part: Part) -> Any:
    """The rows of one part: consecutive ones, ``B / q`` of every array.

    Args:
        batch: A tree of arrays ``(B, ...)``, whose leading sizes may differ.
        part: The part to take.

    Returns:
        The tree with arrays ``(B / q, ...)``.

    Raises:
        ValueError: the number of parts does not divide a leading size.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"tokens": jnp.arange(4), "label": jnp.arange(8)}
        >>> {name: x.tolist() for name, x in take(batch, Part(1, 4)).items()}
        {'label': [2, 3], 'tokens': [1]}
    """

    def one(x: jax.Array) -> jax.Array:
        if x.shape[0] % part.count:
            raise ValueError(
                f"{x.shape[0]} rows do not divide into {part.count} parts with a direction each; "
                "num_queries divides the rows of a batch"
            )
        size = x.shape[0] // part.count
        return jax.lax.dynamic_slice_in_dim(x, part.index * size, size)

    return jax.tree.map(one, batch)
