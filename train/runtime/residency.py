"""Models that are not in use wait in host memory, away from training and scoring.

A run has several models (base, original, oracle, unlearned) and works with one or two at a time.
The others wait in host memory: every device's shard moves to the memory of its host in the same
layout, so nothing is gathered and any number of processes can do it. A stage that starts from a
model on the host makes a single copy on the device, the one that it trains.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

HOST = "pinned_host"
DEVICE = "device"


def to_host(params: Any) -> Any:
    """Move arrays to host memory, shard by shard; device memory is freed with the last reference.

    Args:
        params: a tree; leaves that are not a `jax.Array` are in host memory already.

    Returns:
        A tree of equal arrays with the same shardings, except for the memory kind.

    Example:
        >>> import jax.numpy as jnp
        >>> to_host(jnp.ones(2)).sharding.memory_kind
        'pinned_host'
    """
    return _moved(params, HOST)


def to_device(params: Any) -> Any:
    """Move arrays to device memory; arrays that are there already are returned unchanged.

    Args:
        params: a tree of arrays.

    Returns:
        A tree of equal arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> to_device(to_host(jnp.ones(2))).sharding.memory_kind
        'device'
    """
    return _moved(params, DEVICE)


def fresh(params: Any, shardings: Any) -> Any:
    """A copy on the device that may be donated, from arrays in host or device memory.

    Args:
        params: a tree of arrays, on host or device.
        shardings: the shardings of the copy, a tree of the same structure.

    Returns:
        A tree of equal arrays that shares no memory with `params`.
    """

    def one(x, where):
        # Put from one device onto several, an array lends its buffer to the replica on its own.
        if isinstance(x, jax.Array) and x.sharding.device_set != where.device_set:
            x = jnp.copy(x)
        return jax.device_put(x, where, may_alias=False)

    return jax.tree.map(one, params, shardings)


def _moved(params: Any, kind: str) -> Any:
    def one(x):
        if not isinstance(x, jax.Array) or x.sharding.memory_kind == kind:
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    return jax.tree.map(one, params)
