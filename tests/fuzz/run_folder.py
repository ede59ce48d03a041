"""Rows of the fuzz table for what a run writes: every file has a digest, so no damage is silent.

A reader that sets a file aside or computes it again does not raise; here it does, so that the table
counts it as refused.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data import references
from train.options.config import RunConfig, to_json
from train.runtime import checkpointing, steplog
from train.runtime.folder import check_folder, enter_folder
from train.runtime.stages import json_stage

WANTED = to_json(RunConfig(preset="quickstart"))
LOG = {"forget_rouge": {"agg_value": 0.25, "value_by_index": {"0": {"rouge": 0.25}}}}
STEPS = [{"stage": "unlearned", "step": step, "loss": 1 / (step + 1)} for step in range(8)]
VALUES = [np.linspace(0, 1, 5, dtype=np.float32), np.full(3, -2, np.float32)]


def metrics_log(folder: Path) -> Path:
    lines = [steplog.step_line(x["stage"], x["step"], {"loss": x["loss"]}) for x in STEPS]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder / "metrics.jsonl"


def of_metrics(path: Path) -> Any:
    """The steps; those that remain in a damaged log must be unchanged."""
    steps, bad = steplog.split_steps(path)
    found = [{key: row[key] for key in STEPS[0]} for _, row in steps]
    if bad or (found != STEPS and all(row in STEPS for row in found)):
        raise UserError(f"{len(bad)} damaged line(s) set aside, {len(found)} left")
    return found


def cache(folder: Path) -> Path:
    references._write(folder / "forget-logps.npz", VALUES)
    return folder / "forget-logps.npz"


def of_cache(path: Path) -> Any:
    found = references._read(path, len(VALUES))
    if found is None:
        raise UserError("damaged, computed again")
    return [value.tolist() for value in found]


def evaluation(folder: Path) -> Path:
    json_stage(folder / "model.json", {"params": "a"}, lambda: LOG)
    return folder / "model.json"


def again() -> Any:
    raise UserError("damaged, computed again")


def of_evaluation(path: Path) -> Any:
    return json_stage(path, {"params": "a"}, again)


def run_folder(folder: Path) -> Path:
    return enter_folder(folder / "run", WANTED) / "config.json"


def of_run_folder(path: Path) -> Any:
    """What the run finds after entering its folder: its own configuration, repaired."""
    before = path.read_bytes()
    assert check_folder(path.parent, WANTED)
    enter_folder(path.parent, WANTED)
    assert json.loads(path.read_text()) == WANTED
    if path.read_bytes() != before:
        raise UserError("damaged, written again")
    return WANTED


def tree() -> Any:
    return {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(3)}


def checkpoint(name: str, folder: Path) -> Path:
    checkpointing.save_tree(folder / "saved", tree(), {"stage": "original"})
    found = [path for path in sorted((folder / "saved").rglob("*")) if path.is_file()]
    named = [path for path in found if path.name == name]
    return named[0] if named else max(found, key=lambda path: path.stat().st_size)


def of_checkpoint(path: Path) -> Any:
    root = next(parent for parent in path.parents if parent.name == "saved")
    return jax.tree.map(lambda x: np.asarray(x).tolist(), checkpointing.load_tree(root, tree()))


def rows(damage: Any) -> list[Any]:
    """The rows, of the module `damage` that the table is made with."""
    every = {**damage.NOISE, "binary": damage.binary, "empty": damage.empty}
    whole = {**every, "cut": damage.cut}
    once = {name: fault for name, fault in whole.items() if name != "repeat"}
    nothing = "nothing"
    return [
        damage.Row("metrics.jsonl", metrics_log, of_metrics, once, {"repeat": damage.repeat},
                   "lines that are gone, or stand there twice", 200),
        damage.Row("cache", cache, of_cache, whole, {}, nothing, 200),
        damage.Row("evaluation", evaluation, of_evaluation, whole, {}, nothing, 200),
        damage.Row("run folder", run_folder, of_run_folder, whole, {}, nothing, 100),
        damage.Row("checkpoint", functools.partial(checkpoint, "arrays"), of_checkpoint, whole, {},
                   nothing, 60),
        damage.Row("checkpoint manifest", functools.partial(checkpoint, checkpointing.MANIFEST),
                   of_checkpoint, whole, {"meta": damage.flip}, "its own note of the stage", 60),
    ]  # fmt: skip
