"""Observations of an optimizer's state, `observed-STAGE/STEP.npz` in a run folder.

A row's `observe` is a program of its own, which reads the state after each step. The step itself is
the same with and without it. Replays and other programs that take steps without this loop observe
nothing. `numpy.load` reads the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.runtime import distributed, files


class Observations:
    """Observes the steps of a stage; each process calls it, the first one writes.

    Args:
        observe: The function of the optimizer's row; None: it has none, and nothing is written.
        folder: The folder of the files.
        start: The step at which the stage continues; the files of later steps are removed.
        everywhere: The sharding of an array that all devices hold.
    """

    def __init__(
        self,
        observe: Callable[[Any], dict[str, jax.Array]] | None,
        folder: Path,
        start: int,
        everywhere: jax.sharding.Sharding,
    ):
        self.folder = folder
        # Whole on every process, as metrics are; given a sharding, `jit` copies an array of the
        # state, whose own buffers the next step takes.
        self._look = None if observe is None else jax.jit(observe, out_shardings=everywhere)
        self._unsaved: list[Path] = []
        for path in list(folder.glob("*.npz")) if distributed.is_first() else []:
            if path.stem.isdigit() and int(path.stem) >= start:
                path.unlink()

    def look(self, opt_state: Any) -> Mapping[str, jax.Array]:
        """The arrays of a state, before the next step takes its buffers."""
        return {} if self._look is None else self._look(opt_state)

    def write(self, step: int, arrays: Mapping[str, jax.Array]) -> None:
        """Write the observation of a step."""
        if not arrays or not distributed.is_first():
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{step}.npz"
        part = files.part_of(path)
        with part.open("wb") as file:
            np.savez(file, **jax.device_get(dict(arrays)))
        os.replace(part, path)
        self._unsaved.append(path)

    def save(self) -> None:
        """Force the files to the disk, before a checkpoint relies on them."""
        for path in (*self._unsaved, *([self.folder] if self._unsaved else [])):
            files.sync(path)
        self._unsaved.clear()
