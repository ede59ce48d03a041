"""Meshes `(query x) data x fsdp x tp`, and the layout of every array on them.

The batch is split over `data` and `fsdp`, parameters by the rules of their model (`models.layout`).
Zeroth-order steps distribute their evaluations over `query`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.errors import UserError
from models import arrays, layout
from models.layout import Rules, path_str, spec_of

AXES = ("data", "fsdp", "tp")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all remaining devices.

    Args:
        data: the number of copies of the model, each with its part of the batch.
        fsdp: the number of devices that split parameters and the batch.
        tp: the number of devices that split the computation of a layer.
        query: the number of groups of devices that share the evaluations of zeroth-order steps;
            each group repeats all other work.
    """

    data: int = -1
    fsdp: int = 1
    tp: int = 1
    query: int = 1


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The device mesh with Auto axes `("data", "fsdp", "tp")`, after `"query"` if it is not 1.

    Only losses cross `query`: it is the outermost axis, on the slowest links.

    Raises:
        UserError: the sizes are not positive or do not fit the devices present.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.query, config.data, config.fsdp, config.tp]
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh {_named(sizes)}: sizes must be positive (one of them may be -1: all devices "
            "left)"
        )
    sizes = [max(1, len(devices) // given) if size == -1 else size for size in sizes]
    if math.prod(sizes) > len(devices):
        raise UserError(
            f"mesh {_named(sizes)} needs {math.prod(sizes)} devices, {len(devices)} are present; "
            "lower --mesh.data, --mesh.fsdp or --mesh.tp"
            + (" or --mesh.query" if sizes[0] > 1 else "")
        )
    if jax.process_count() > 1 and math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {_named(sizes)} leaves devices out: {jax.process_count()} processes have "
            f"{len(devices)}; use all of them"
        )
    names = ("query", *AXES)
    if sizes[0] == 1:
        names, sizes = names[1:], sizes[1:]
    grid = _grid(devices[: math.prod(sizes)], sizes, len(devices))
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _grid(devices: list[Any], sizes: list[int], present: int) -> np.ndarray:
    """The devices in order; a whole TPU slice follows its links, several slices are stacked.

    Raises:
        UserError: the outermost axis does not divide over the slices, so that more than losses or
            sums of gradients would cross between them.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or len(devices) < present:
        return np.asarray(devices).reshape(sizes)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(
            f"{slices} TPU slices are joined by the outermost axis alone; give --mesh.data (or "
            f"--mesh.query) a multiple of {slices}, not {sizes[0]}"
        )
    within, across = [sizes[0] // slices, *sizes[1:]], [slices, *[1] * len(sizes[1:])]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _named(sizes: list[int]) -> str:
    query, data, fsdp, tp = sizes
    return (f"query {query} x " if query != 1 else "") + f"data {data} x fsdp {fsdp} x tp {tp}"


def query_axis(mesh: Mesh) -> str | None:
    """The axis over which zeroth-order steps distribute their evaluations, if the mesh has one."""
    return "query" if "query" in mesh.axis_names else None


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Raise `UserError` for more tensor-parallel devices than the model has attention heads."""
    if mesh.shape["tp"] > num_heads:
        raise UserError(
            f"--mesh.tp {mesh.shape['tp']}: the model has {num_heads} attention heads, and a head "
            f"is not split; use --mesh.tp {num_heads} or less and more --mesh.fsdp"
        )


def batch_ways(mesh: Mesh) -> int:
    """The number of devices over which the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, accumulate: int, what: str) -> None:
    """Raise `UserError` unless the batch splits into micro-batches and over data x fsdp."""
    ways = batch_ways(mesh)
    if batch_size < 1 or accumulate < 1:
        raise UserError(
            f"{what} batch size {batch_size} with {accumulate} micro-batch(es): "
            "both must be at least 1"
        )
    if batch_size % (ways * accumulate):
        raise UserError(
            f"{what} batch size {batch_size} does not divide over data x fsdp = {ways} with "
            f"{accumulate} micro-batch(es); use a multiple of {ways * accumulate} or another mesh"
        )


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = layout.DECODER
) -> NamedSharding:
    """The sharding of one parameter on the mesh."""
    return NamedSharding(mesh, spec_of(path, shape, mesh, rules))


def param_shardings(tree: Any, mesh: Mesh, rules: Rules = layout.DECODER) -> Any:
    """A `NamedSharding` for every leaf of a parameter tree (arrays or shapes)."""

    def one(path, leaf):
        return sharding_of(path_str(path), leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(one, tree)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: leaves that end in a parameter's path get its sharding.

    `params` are arrays, or shapes with shardings.
    """
    known = {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, leaf):
        parts = path_str(path).split("/")
        for i in range(len(parts)):
            name = "/".join(parts[i:])
            if name in known and known[name].shape == leaf.shape:
                return known[name].sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes of the mesh, everything else whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def rows_here(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a global batch of `size` that this process's devices hold, ascending."""
    held = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in held.values()]))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, size: int | None = None
) -> dict[str, jax.Array]:
    """A host batch as global arrays (rows split over `data` and `fsdp`).

    Args:
        batch: the global batch, or with `size` the rows `rows_here(mesh, size)` of it.
        mesh: the devices.
        size: rows of the global batch.
    """
    where = batch_sharding(mesh)
    if size is None:
        return {name: arrays.put(x, where) for name, x in batch.items()}
    held = len(rows_here(mesh, size))
    # Columns of tokens have fewer rows than `size` where examples share rows.
    places = {n: rows_here(mesh, size * n // held) for n in {len(x) for x in batch.values()}}

    def put(x: np.ndarray) -> jax.Array:
        rows, here = size * len(x) // held, places[len(x)]

        def read(index):
            first, last, _ = index[0].indices(rows)
            start = int(np.searchsorted(here, first))  # a device's rows are consecutive here too
            return x[start : start + last - first]

        return arrays.read_into((rows, *x.shape[1:]), where, read)

    return {name: put(x) for name, x in batch.items()}


def put_params(params: Any, mesh: Mesh, rules: Rules = layout.DECODER) -> Any:
    """Parameters laid out on the mesh by the rules; host values must be equal on all processes."""

    def put(x, where):
        # An array on this process's devices alone is a host value as well.
        local = jax.process_count() > 1 and getattr(x, "is_fully_addressable", True)
        return arrays.put(x, where) if local else jax.device_put(x, where)

    return jax.tree.map(put, params, param_shardings(params, mesh, rules))


def describe(params: Any, mesh: Mesh, rules: Rules = layout.DECODER) -> str:
    """A table of leaf, shape, spec and bytes per device, one line per leaf."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        spec = spec_of(path_str(path), leaf.shape, mesh, rules)
        ways = math.prod(mesh.shape[a] for a in spec if a)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize // ways
        lines.append(f"{path_str(path):40} {leaf.shape!s:22} {spec!s:40} {size / 2**20:9.2f} MiB")
    return "\n".join(lines)
