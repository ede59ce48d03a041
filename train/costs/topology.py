"""Data about accelerators and their slices, for a plan to compare with.

Sources, read in November 2026. TPUs: the system-architecture pages of the Cloud TPU documentation
(v4, v5e, v5p, v6e, TPU7x: "Key specifications" and the lists of supported topologies; interconnect
figures there are bidirectional, one direction is half). GPUs: NVIDIA's data sheets for the A100
80GB SXM, H100 SXM and H200 SXM (dense bfloat16; NVLink is half of the bidirectional figure).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.runtime import suggest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Args:
        name: the name in `--topology NAME:...`.
        hbm_bytes: the memory that a program may use.
        flops: peak FLOP per second of bfloat16 products; None: not known.
        hbm_bandwidth: bytes per second.
        ici_bandwidth: bytes per second that leave a chip over all its links, one direction.
        devices: JAX devices per chip.
        prefix: libtpu's name of the generation.
        config: libtpu's chip configuration, where programs do not get its default: under it the two
            cores of a v4 chip are one device.
    """

    name: str
    hbm_bytes: int
    flops: float | None
    hbm_bandwidth: float | None
    ici_bandwidth: float | None
    devices: int = 1
    prefix: str = ""
    config: str = ""


# libtpu reserves a part of the HBM: of 16 GiB on v5e, programs get 15.75.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(31.75 * GIB), 275e12, 1228e9, 300e9, prefix="v4", config="megacore"),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, prefix="v5e"),
        Chip("v5p", int(94.75 * GIB), 459e12, 2765e9, 600e9, prefix="v5p"),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9, prefix="v6e"),
        Chip("tpu7x", int(189.5 * GIB), 2307e12, 7380e9, 600e9, devices=2, prefix="tpu7x"),
    )
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16")  # fmt: skip
SLICES: dict[str, tuple[str, ...]] = {
    "v4": _SOLID,
    "v5e": _FLAT,
    "v5p": (*_SOLID, "16x16x16", "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": (*_SOLID, "16x16x16", "16x16x24"),
}
GPUS = {
    "A100": Chip("A100", 80 * GIB, 312e12, 2039e9, 300e9),
    "H100": Chip("H100", 80 * GIB, 989e12, 3350e9, 450e9),
    "H200": Chip("H200", 141 * GIB, 989e12, 4800e9, 450e9),
}


@dataclass(frozen=True)
class Topology:
    """A slice: `chips` chips of one kind, and the devices that JAX sees there."""

    name: str
    chip: Chip
    chips: int
    devices: tuple[Any, ...]

    @property
    def hbm_bytes_per_device(self) -> int:
        """The memory of a device; two devices share that of a TPU7x chip."""
        return self.chip.hbm_bytes * self.chips // len(self.devices)


def check_topology(name: str) -> tuple[str, str]:
    """Split `KIND:SHAPE` into its parts, after checking that the slice exists.

    Raises:
        UserError: no such kind, or no slice of that shape; the message names the existing ones.

    Example:
        >>> check_topology("v5e:8x8")
        ('v5e', '8x8')
    """
    kind, _, shape = name.partition(":")
    if kind in ("cpu", "gpu"):
        if not shape.isdigit() or int(shape) < 1:
            raise UserError(f"--topology {name}: give a number of devices, {kind}:8")
        return kind, shape
    known = suggest.choose(kind, SLICES | {"cpu": (), "gpu": ()}, "--topology")
    if shape not in known:
        raise UserError(
            f"--topology {name} does not exist; slices of {kind}: "
            f"{', '.join(f'{kind}:{s}' for s in known)}"
        )
    return kind, shape


def find_topology(name: str) -> Topology:
    """The slice `v5e:8x8`, `cpu:8` (this machine, 8 virtual devices) or `gpu:2` (devices present).

    Call it before anything else asks JAX for devices.

    Raises:
        UserError: it does not exist, is not present, or libtpu is missing.
    """
    kind, shape = check_topology(name)
    if kind == "cpu":
        return _cpus(name, int(shape))
    if kind == "gpu":
        return _gpus(name, int(shape))
    return _tpus(name, kind, shape)


def _cpus(name: str, count: int) -> Topology:
    import jax

    _use_cpu(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--topology {name}: JAX already runs with {len(devices)} CPU device(s)")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    return Topology(name, Chip("cpu", memory, None, None, None), count, tuple(devices[:count]))


def _use_cpu(count: int | None = None) -> None:
    """Let JAX run on this machine's CPU, as `count` devices, unless it runs already."""
    import jax

    if jax._src.xla_bridge.backends_are_initialized():  # pyright: ignore[reportAttributeAccessIssue]
        return
    jax.config.update("jax_platforms", "cpu")
    if count is not None:
        jax.config.update("jax_num_cpu_devices", count)


def _gpus(name: str, count: int) -> Topology:
    import jax

    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        raise UserError(
            f"--topology {name}: no GPU is present (or JAX's plugin is missing: pip install -e "
            "'.[cuda]'); give a TPU slice or cpu:N"
        ) from None
    if len(devices) < count:
        raise UserError(f"--topology {name}: {len(devices)} GPU(s) are present")
    kind = devices[0].device_kind
    chip = next((c for word, c in GPUS.items() if word in kind), None)
    if chip is None:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
        chip = Chip(kind, limit, None, None, None)
    return Topology(name, chip, count, tuple(devices[:count]))


def _tpus(name: str, kind: str, shape: str) -> Topology:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs libtpu, which compiles for TPUs on any machine; pip install "
            "-e '.[tpu]', or plan for cpu:N"
        )
    # There is no metadata server to ask, and another process may hold libtpu's lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Otherwise it reports on stderr that it does not know the machine it runs on.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    _use_cpu()
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    if TPUS[kind].config:
        options["chip_config_name"] = TPUS[kind].config
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{TPUS[kind].prefix}:{shape}", **options
    )
    chips = math.prod(int(n) for n in shape.split("x"))
    devices = tuple(found.devices)
    if len(devices) != chips * TPUS[kind].devices:
        raise UserError(
            f"--topology {name}: libtpu lists {len(devices)} devices for {chips} chips; this "
            "version of libtpu is not known to train/costs/topology.py"
        )
    return Topology(name, TPUS[kind], chips, devices)
