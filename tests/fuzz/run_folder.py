"""Rows of the fuzz table for what a run writes: every file has a digest, so no damage is silent.

A reader that sets a file aside or computes it again does not raise; here it does, so that the table
counts it as refused.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data import references
from train.engine.replays import stored
from train.jobs import trace_files
from train.options import config_files
from train.options.config import RunConfig, to_json
from train.reporting import tables
from train.runtime import checkpointing, files, steplog
from train.runtime.folder import check_folder, enter_folder, write_about
from train.runtime.stages import json_stage

WANTED = to_json(RunConfig(preset="quickstart"))
LOG = {"forget_rouge": {"agg_value": 0.25, "value_by_index": {"0": {"rouge": 0.25}}}}
STEPS = [{"stage": "unlearned", "step": step, "loss": 1 / (step + 1)} for step in range(8)]
VALUES = [np.linspace(0, 1, 5, dtype=np.float32), np.full(3, -2, np.float32)]


TRACES = ["I know her.", "Hmm.", "She was born in Lima."]


def stop(message: str) -> Any:
    raise UserError(message)


def metrics_log(folder: Path) -> Path:
    lines = [steplog.step_line(x["stage"], x["step"], {"loss": x["loss"]}) for x in STEPS]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder / "metrics.jsonl"


def finished_log(folder: Path) -> Path:
    path = metrics_log(folder)
    files.key_of(path).write_text(files.key_text(path.read_text()))
    return path


def of_finished_log(path: Path) -> Any:
    return steplog.read_steps(path, stop)


def of_metrics(path: Path) -> Any:
    """The steps that a stage finds as it continues behind all of them."""
    steps, bad = steplog.split_steps(path)
    if words := steplog.odd(steps, "unlearned", len(STEPS)) or ("damaged" if bad else ""):
        raise UserError(words)
    return [{key: row[key] for key in STEPS[0]} for _, row in steps]


def traces(folder: Path) -> Path:
    trace_files.add(folder / "traces.jsonl", 0, TRACES)
    return folder / "traces.jsonl"


def of_traces(path: Path) -> Any:
    found = trace_files.kept(path)
    if found != TRACES and found == TRACES[: len(found)]:
        raise UserError("damaged, made again")
    return found


def replay(folder: Path) -> Path:
    header = {name: kind(1) if kind in (str, int) else {} for name, kind in stored.ENTRIES.items()}
    data = stored.header_line(header)
    data += np.ones(1, stored.FLOATS).tobytes() + stored.milestone_bytes("ab" * 32, np.ones(4))
    (folder / stored.NAME).write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    return folder / stored.NAME


def of_replay(path: Path) -> Any:
    return repr(stored.read(path))


def finished(name: str, folder: Path) -> Path:
    root = enter_folder(folder / "run", WANTED)
    (root / "summary.json").write_text(text := json.dumps({"unlearned": {"rouge": 0.5}}))
    (root / "summary.key").write_text(files.key_text(text))
    write_about(root, {"all": 2.5}, [], {"roles": {"judged": "unlearned"}})
    return root / name


def of_finished(path: Path) -> Any:
    found = tables.load_run(path.parent)
    return found if not any("damaged" in note for note in found.notes) else stop(found.notes[0])


def of_configuration(path: Path) -> Any:
    return config_files.read_config(RunConfig, path)


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
    loaded = checkpointing.load_tree(root, tree())
    return jax.tree.map(lambda x: np.asarray(x).tolist(), loaded)


def of_manifest(path: Path) -> Any:
    manifest = checkpointing.read_manifest(path.parent) or stop("damaged, computed again")
    return of_checkpoint(path), manifest


def rows(damage: Any) -> list[Any]:
    """The rows, of the module `damage` that the table is made with."""
    every = {**damage.NOISE, "binary": damage.binary, "empty": damage.empty}
    whole = {**every, "cut": damage.cut}
    nothing = "nothing"
    make = functools.partial
    return [
        damage.Row("metrics.jsonl", metrics_log, of_metrics, whole, {}, nothing, 200),
        damage.Row("finished metrics", finished_log, of_finished_log, whole, {}, nothing, 200),
        damage.Row("traces", traces, of_traces, whole, {}, nothing, 200),
        damage.Row("replay", replay, of_replay, whole, {}, nothing, 200),
        damage.Row("summary", make(finished, "summary.json"), of_finished, whole, {}, nothing, 100),
        damage.Row("run.json", make(finished, "run.json"), of_finished, whole, {}, nothing, 100),
        damage.Row("config.json", make(finished, "config.json"), of_configuration, whole, {},
                   nothing, 100),
        damage.Row("cache", cache, of_cache, whole, {}, nothing, 200),
        damage.Row("evaluation", evaluation, of_evaluation, whole, {}, nothing, 200),
        damage.Row("run folder", run_folder, of_run_folder, whole, {}, nothing, 100),
        damage.Row("checkpoint", make(checkpoint, "arrays"), of_checkpoint, whole, {}, nothing, 60),
        damage.Row("checkpoint manifest", make(checkpoint, checkpointing.MANIFEST), of_manifest,
                   whole, {}, nothing, 60),
    ]  # fmt: skip
