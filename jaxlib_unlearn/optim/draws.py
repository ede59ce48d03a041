"""The normal numbers of `jax.random.normal`, bit for bit, on CPUs in a quarter of the time.

JAX lowers its generator on CPUs to loops that pass over whole arrays in memory, round by round.
Here the twenty rounds are written out, so that XLA fuses them, the conversion of bits to normal
numbers and the addition to a parameter into one loop: no array of random numbers is stored. A
zeroth-order step draws every direction three times, which was most of its time on a CPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.optim.arrays import concrete

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
    out_sharding: Any = None,
) -> jax.Array:
    """Standard normal numbers, equal to ``jax.random.normal`` of the same arguments.

    Args:
        key: A typed key. Generators other than threefry are left to JAX.
        shape: The shape of the result.
        dtype: The dtype of the result. Dtypes other than float32 are left to JAX.
        out_sharding: The sharding of the result on meshes with Explicit axes, as in
            ``jax.random.normal``.

    Returns:
        An array of that shape.

    Example:
        >>> import jax
        >>> key = jax.random.key(3)
        >>> bool((normal(key, (5, 7)) == jax.random.normal(key, (5, 7))).all())
        True

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Threefry-2x32-20.
    """
    ours = (
        str(jax.random.key_impl(key)) == "threefry2x32"
        and jnp.dtype(dtype) == jnp.float32
        and getattr(jax.config, "jax_threefry_partitionable", True)
        and out_sharding is None
        and math.prod(shape) < 2**32  # the low word counts the elements, the high one is 0
    )
    if ours:
        return _normal(key, tuple(shape))
    return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)


def drawn_once(draw: Callable[[], jax.Array], key: jax.Array) -> jax.Array:
    """The numbers of ``draw()``, as an array that its consumers read.

    XLA fuses a draw into its consumer: if it is added to a parameter, there is one loop, but if it
    is broadcast over tokens, every token draws it again. On CPUs an optimisation barrier is removed
    before XLA fuses; a loop of one round stays, if XLA does not know its number of rounds.

    Args:
        draw: A function that draws numbers.
        key: Any typed key that is an argument of the program, and not batched where ``draw`` is
            under ``vmap``; its value has no influence. If it is not traced, numbers are drawn as
            without this function.

    Returns:
        ``draw()``, up to the last bit, in which fused loops may differ.

    Example:
        >>> import jax
        >>> key = jax.random.key(3)
        >>> once = jax.jit(lambda key: drawn_once(lambda: normal(key, (5,)), key))
        >>> bool(jnp.allclose(once(key), normal(key, (5,)), rtol=1e-6))
        True
    """
    if concrete(key):  # nothing is fused, and a loop would be compiled at every step
        return draw()
    shape = jax.eval_shape(draw)

    def loop(word):
        rounds = jnp.minimum(1, 1 + (word >> 31).astype(jnp.int32))
        start = jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.fori_loop(0, rounds, lambda i, _: draw(), start)

    def barrier(word):
        del word
        return jax.lax.optimization_barrier(draw())

    word = jax.random.key_data(key).reshape(-1)[0]
    return jax.lax.platform_dependent(word, cpu=loop, default=barrier)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    first, second = threefry(jax.random.key_data(key), jnp.zeros(shape, jnp.uint32), _count(shape))
    bits = first ^ second
    # 23 mantissa bits with the exponent of one: [1, 2), then (-1, 1).
    one = jax.lax.bitcast_convert_type((bits >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, (one - 1) * (np.float32(1) - low) + low)
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


def _count(shape: tuple[int, ...]) -> jax.Array:
    """0, 1, 2, ... in the order of memory."""
    total, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        total += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return total


def threefry(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, applied to pairs of words.

    Args:
        key: The key, ``(2,)`` uint32.
        first: The first words of the pairs, uint32.
        second: The second words of the pairs, uint32, of the same shape.

    Returns:
        Two arrays of that shape.

    Example:
        >>> import jax.numpy as jnp
        >>> zero = jnp.zeros((1,), jnp.uint32)
        >>> [hex(x[0]) for x in threefry(jnp.zeros(2, jnp.uint32), zero, zero)]
        ['0x6b200159', '0x99ba4efe']
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            first = first + second
            second = (second << np.uint32(turn)) | (second >> np.uint32(32 - turn))
            second = first ^ second
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + np.uint32(block + 1)
    return first, second
