"""Copies between host and devices, in one process or in several that share an array.

A process can only read the parts of an array that its own devices hold. `put` copies the parts of a
host value that this process needs; `host` brings the whole value to every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Read = Callable[[tuple[slice, ...]], np.ndarray]


def put(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host value as a global array; all processes hold the same value.

    Unlike `jax.device_put` this does not communicate with the other processes, so one of them may
    fail without the others waiting for it.

    Args:
        value: the whole array, on every process.
        sharding: the layout of its parts.

    Returns:
        The array.

    Example:
        >>> where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        >>> put(np.arange(3), where).tolist()
        [0, 1, 2]
    """
    value = np.asarray(value)
    return read_into(value.shape, sharding, lambda index: value[index])


def read_into(shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Read) -> jax.Array:
    """A global array of which this process reads the parts that its devices hold, each once.

    Args:
        shape: the shape of the whole array.
        sharding: the layout of its parts.
        read: `index -> values`, the index a slice for each axis.

    Returns:
        The array.
    """
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = np.asarray(read(index), order="C")
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def host(value: Any) -> np.ndarray:
    """The whole value of an array, on every process; each of them must call it."""
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)
