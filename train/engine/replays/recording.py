"""Writing `replay.zo` while a stage trains: the bytes are the same however often it is killed."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxlib_unlearn
from train.engine.replays import coefficients, stored
from train.options.config import LoraConfig, SelectConfig, to_json
from train.options.optimizers import Options, schedule_numbers
from train.runtime import compiling, digests, distributed, remote
from train.runtime.checkpointing import read_manifest
from train.runtime.tracking import say


class Recording(NamedTuple):
    """The path of a stage's coefficients, and the header of that file."""

    path: Path
    header: Mapping[str, Any]


def recording(
    path: Path,
    name: str,
    base: str,
    trained: Any,
    optimizer: Options,
    steps: int,
    adapters: LoraConfig | None,
    select: SelectConfig | None,
    seed: int,
    classes: Sequence[str] | None = None,
) -> Recording:
    """The file of a stage.

    Args:
        path: the path of the file.
        name: the name of the stage.
        base: the sha256 of the parameters that it starts from.
        trained: the tree that it trains.
        optimizer: the optimizer's options.
        steps: the number of its steps.
        adapters: the adapters that are trained in place of the parameters, if any.
        select: the choice of the leaves that are trained, if not all are.
        seed: the seed of the run, from which adapters are drawn.
        classes: the names of the classes that the model tells apart, if it has any.
    """
    header: dict[str, Any] = {"stage": name, "base_sha256": base, "steps": steps}
    if adapters is not None and adapters.rank is not None:
        header |= {"lora": to_json(adapters), "lora_seed": seed}
    if select is not None and select.given:
        header["select"] = to_json(select)
    if classes is not None:
        header["classes"] = list(classes)
    header |= {"optimizer": to_json(optimizer), "schedule": schedule_numbers(optimizer, steps)}
    return Recording(path, header | {"leaves": digests.tree_shapes(trained)})


def surroundings() -> dict[str, Any]:
    """The surroundings on which the bits of a step depend beside its numbers."""
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    return {
        "generator": f"threefry2x32{'' if partitionable else ', not partitionable'}",
        "jax": jax.__version__,
        "platform": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "made_by": f"jaxlib-unlearn {jaxlib_unlearn.__version__}",
        "compiled": compiling.effort(),
    }


class Recorder:
    """Writes the file of a stage; each process calls it, the first one writes.

    Args:
        recording: the path and the header of the file.
        queries: the number of coefficients per step.
        seed: the seed of the optimizer's draws.
        start: the step at which the stage continues.
        kept: the value of `checkpoint` for the checkpoint from which it continues.
    """

    def __init__(
        self,
        recording: Recording,
        queries: int,
        seed: int,
        start: int,
        kept: Mapping[str, Any] | None,
    ):
        self.path, self.steps = recording.path, recording.header["steps"]
        more = {"queries": queries, "seed": seed, "every": stored.EVERY}
        self.line = stored.header_line({**recording.header, **more, **surroundings()})
        self.width = queries * stored.FLOATS.itemsize
        self.crc = zlib.crc32(self.line)
        self.size = len(self.line)
        self.open = distributed.of_first(lambda: self._begin(start, kept))

    def _begin(self, start: int, kept: Mapping[str, Any] | None) -> bool:
        """Create the file, or cut it to the steps before the checkpoint."""
        if start == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self.line)
            return True
        try:
            data = self.path.read_bytes()
            rest = data.removeprefix(self.line)
            crc, after = stored.continued(self.crc, rest, start, self.width)
            size = len(data) - len(after)
            same = kept == {"bytes": size, "crc32": crc} and len(rest) < len(data)
        except (OSError, ValueError):
            same = False
        if not same:
            self.path.unlink(missing_ok=True)
            say(
                f"{self.path}: not the file of the checkpoint at step {start} (damaged, or begun "
                "by another version or elsewhere); none is written for this stage"
            )
            return False
        os.truncate(self.path, size)
        self.crc, self.size = crc, size
        return True

    def _write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
        self.size += len(data)

    def add(self, opt_state: Any) -> None:
        """Append the coefficients of a step, which the optimizer's state holds after it."""
        if not self.open or not distributed.is_first():
            return
        coeffs = jax.device_get(coefficients.state_of(opt_state).coeffs)
        data = np.asarray(coeffs, stored.FLOATS).tobytes()
        self.crc = zlib.crc32(data, self.crc)
        self._write(data)

    def mark(self, step: int, params: Any) -> None:
        """Append a milestone where one is due after `step` steps; `params` are those then."""
        if not self.open or (step % stored.EVERY and step != self.steps):
            return
        data = stored.milestone_bytes(digests.params_sha256(params), digests.sketch(params))
        if distributed.is_first():
            self.crc = zlib.crc32(data, self.crc)
            self._write(data + self.crc.to_bytes(stored.CRC, "little"))

    def checkpoint(self) -> dict[str, Any]:
        """Force the file to the disk; what the checkpoint written next says of it."""
        if not self.open or not distributed.is_first():
            return {}
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        remote.send(self.path.parent)
        return {"replay": {"bytes": self.size, "crc32": self.crc}}


def recorder_of(
    recording: Recording | None, opt_state: Any, start: int, checkpoints: Any
) -> Recorder | None:
    """The recorder of a stage that continues at step `start`; None without a recording."""
    if recording is None:
        return None
    state = coefficients.state_of(opt_state)
    kept = None
    if start:
        manifest = distributed.of_first(lambda: read_manifest(checkpoints / str(start)))
        kept = (manifest or {}).get("replay")
    return Recorder(recording, state.coeffs.size, int(jax.device_get(state.seed)), start, kept)
