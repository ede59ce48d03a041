"""Matrices that stay whole on a device, so that their bits do not depend on the mesh.

XLA splits a product over the devices that hold parts of its result, and each split has an order of
summation of its own: the last bit of an orthogonalised direction would depend on the number of
devices. Draws from keys are small and known everywhere, so every device computes all of them and
keeps its part of the result.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def whole(fn: Callable[..., Any], arrays: Iterable[jax.Array]) -> Callable[..., Any]:
    """``fn``, computed on every device of a mesh as on one device.

    Args:
        fn: A function of arrays alone: its closure holds no traced value.
        arrays: Arrays on the mesh; the mesh is read from the first array that has one. Without a
            mesh, or with Explicit axes, nothing is placed.

    Returns:
        A function with the same arguments and results, all of them copies on every device.

    Example:
        >>> import jax.numpy as jnp
        >>> whole(jnp.sum, [jnp.ones(2)])(jnp.arange(3.0)).item()
        3.0
    """

    def alone(*args: Any) -> Any:
        # Otherwise the compiler may compute only the part of a result that a device keeps, or round
        # once less in a multiplication with an addition.
        return jax.lax.optimization_barrier(fn(*args))

    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    mesh: Any = next((m for m in meshes if not m.empty and m.size > 1), None)
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return alone
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = {name for name, kind in kinds if kind == AxisType.Auto}
    if not axes:
        return alone
    return jax.shard_map(
        alone, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=axes, check_vma=False
    )
