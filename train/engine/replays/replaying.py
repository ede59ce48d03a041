"""Taking the steps of a `replay.zo` again: the coefficients in the place of every loss."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models import arrays
from train.engine.replays import coefficients
from train.engine.replays.recording import surroundings
from train.engine.replays.stored import Milestone, Replay
from train.engine.step import init_state
from train.engine.trainable import Trainable, trainable_of
from train.evaluators.evaluation import Model
from train.options import cli
from train.options.config import LoraConfig, SelectConfig
from train.options.optimizers import OPTIMIZERS, ROWS, Options, build
from train.runtime import checkpointing, digests, distributed, residency, sharding
from train.runtime.compiling import compiled
from train.runtime.tracking import progress, say

SAVE_SECONDS = 120.0
LAST_BITS = 1e-6  # the change by other platforms and versions, as a share of the norm


class Checked(NamedTuple):
    """The comparison of a replay with the run.

    Args:
        apart: the distance of the parameters by norm at the worst milestone; 0.0 also where they
            differ by less than float32 sketches can tell.
        milestones: the number of milestones that were compared.
        bitwise: whether the parameters are bit by bit equal at all of them; False where none was
            compared.
    """

    apart: float
    milestones: int
    bitwise: bool


def optimizer_of(made: Replay, path: Path) -> Options:
    """The optimizer of a file.

    Raises:
        UserError: it needs more than coefficients, or this version has no such optimizer.
    """
    entries = made.header["optimizer"]
    kind, given = ROWS.read(entries, "", f"{path}: optimizer ")
    options = cli.from_json(kind, given, "optimizer")
    refuse(options.name, str(path))
    return options


def refuse(name: str, where: str) -> None:
    """Raise `UserError` for an optimizer whose steps cannot be replayed."""
    if not OPTIMIZERS[name].replays:
        known = ", ".join(row.name for row in OPTIMIZERS.values() if row.replays)
        raise UserError(
            f"{where}: a step of optimizer {name} needs more than the coefficients of its losses, "
            f"so there is nothing to replay; {known} can be replayed"
        )


def check_base(made: Replay, base: Model, path: Path, given: str) -> None:
    """Raise `UserError` for a model that the run did not start from."""
    if base.sha != made.header["base_sha256"]:
        raise UserError(
            f"--model.path {given} (params_sha256 {base.sha[:16]}…) is not the model that {path} "
            f"starts from ({made.header['base_sha256'][:16]}…); give that one, in float32"
        )


def check_generator(made: Replay, path: Path) -> None:
    """Raise `UserError` where random numbers are drawn in another way."""
    here = surroundings()["generator"]
    if made.header["generator"] != here:
        raise UserError(
            f"{path} was written with the generator {made.header['generator']}, here it is {here}; "
            "set jax_threefry_partitionable as it was then"
        )


def trained_of(made: Replay, base: Model, mesh: Any) -> Trainable:
    """The tree that the stage trained: all parameters, adapters, or leaves by name and block.

    Raises:
        UserError: the model does not have these leaves.
    """
    header = made.header
    adapters, select = (
        None if name not in header else cli.from_json(kind, header[name], name)
        for name, kind in (("lora", LoraConfig), ("select", SelectConfig))
    )
    row, _ = objectives.resolve("nll")
    found = trainable_of(
        base.params,
        row,
        adapters,
        select,
        seed=header.get("lora_seed", 0),
        dtype=base.learner.dtype,
        mesh=mesh,
    )
    shapes = digests.tree_shapes(found.start)
    if shapes != header["leaves"]:
        odd = sorted(
            n for n in {*shapes, *header["leaves"]} if shapes.get(n) != header["leaves"].get(n)
        )
        raise UserError(
            f"--model.path: leaf {odd[0]} is {shapes.get(odd[0])}, in the run it was "
            f"{header['leaves'].get(odd[0])}; give the model that the run started from"
        )
    return found


def differs(
    made: Replay, mark: Milestone, before: int, found: float, tolerance: float | None
) -> UserError:
    """The error for parameters that differ from those of the run.

    Args:
        made: the file.
        mark: the first milestone whose parameters differ.
        before: the step of the milestone before it, which passed; 0: the start.
        found: the distance of the parameters by norm.
        tolerance: the largest distance that passes; None: no bit may differ.
    """
    here, there = surroundings(), made.header
    same = all(there.get(name) == here[name] for name in ("jax", "platform", "made_by"))
    todo = "replay it on the kind of processor that it was written on"
    if not same:
        todo = (
            f"use what it was written by: {there.get('made_by')} with jax {there['jax']} on "
            f"{there['platform']} (here are {here['made_by']}, {here['jax']}, {here['platform']})"
        )
    size, passed = f"by {found:.1e} of their norm", "were the same"
    if not found:
        size = "by less than a sketch of them shows"
    if tolerance is not None:
        size, passed = f"{size}, more than --tolerance {tolerance:g}", "passed"
    elif found <= LAST_BITS:
        todo += f", or give --tolerance {LAST_BITS:g} to compare by norm"
    since = f"those after step {before}" if before else "those at the start"
    return UserError(
        f"the parameters after step {mark.step} differ from the run's {size} ({since} {passed}, "
        f"between the two none were compared); {todo}"
    )


def replay(
    made: Replay,
    optimizer: Options,
    start: Any,
    rules: Any,
    mesh: Any,
    tolerance: float | None = None,
    checkpoints: Path | None = None,
    seconds: float = SAVE_SECONDS,
    steps: int | None = None,
) -> tuple[Any, Checked]:
    """The trained tree after the steps, compared at every milestone on the way.

    Args:
        made: the file.
        optimizer: the optimizer of its header.
        start: the trained tree at the start.
        rules: the rules by which it is laid out on a mesh.
        mesh: the devices.
        tolerance: the largest distance by norm that passes; None: no bit may differ.
        checkpoints: the folder of checkpoints to continue from; None: nothing is written.
        seconds: the least time between two checkpoints.
        steps: the number of steps to take; None: all.

    Raises:
        UserError: a milestone differs.
        Preempted: asked to stop.
    """
    header = made.header
    end = header["steps"] if steps is None else steps
    tx, _, _ = build(optimizer, header["steps"])
    params = residency.fresh(start, sharding.param_shardings(start, mesh, rules))
    state, shardings = init_state(params, tx, mesh)
    everywhere, dtype = shardings.step, jax.numpy.result_type(float)

    def put(value: Any, dtype: Any) -> jax.Array:
        return arrays.put(np.asarray(value, dtype), everywhere)

    schedule = {name: put(value, dtype) for name, value in header["schedule"].items()}
    seed = put(header["seed"] % 2**32, np.uint32)
    opt_state = coefficients.with_state(state.opt_state, seed=seed)
    where = coefficients.state_of(opt_state).coeffs
    if where.shape != made.coeffs.shape[1:]:
        raise UserError(
            f"the file has {made.coeffs.shape[1]} coefficients a step, optimizer {optimizer.name} "
            f"takes {where.size}; use the version that wrote it"
        )
    first, now = 0, (state.params, opt_state)
    apply = compiled(coefficients.compile_apply(optimizer, shardings).lower(*now, schedule, where))
    worst, bitwise = 0.0, True
    if checkpoints is not None:
        found = checkpointing.load_latest(checkpoints, now, say)
        if found is not None:
            first, now = found
            last = checkpoints / str(first)
            manifest = distributed.of_first(lambda: checkpointing.read_manifest(last)) or {}
            # Checkpoints of earlier versions lack it: with a tolerance, equality is not known.
            worst, bitwise = manifest.get("checked", (0.0, tolerance is None))
            say(f"continuing at step {first} of {end}")
    marks = {mark.step: mark for mark in made.milestones if mark.step <= end}
    before = max((step for step in marks if step <= first), default=0)
    saved_at = time.monotonic()

    def compare(step: int) -> None:
        nonlocal worst, before, bitwise
        mark = marks[step]
        if digests.params_sha256(now[0]) != mark.sha256:
            found = digests.apart(digests.sketch(now[0]), mark.sketch)
            if tolerance is None or not found <= tolerance:
                raise differs(made, mark, before, found, tolerance)
            worst, bitwise = max(worst, found), False
        before = step

    def due() -> bool:
        return distributed.of_first(lambda: time.monotonic() - saved_at > seconds)

    with progress("replay", end, first) as advance:
        for step in range(first, end):
            if step in marks and step > first:
                compare(step)
            stop = distributed.asked_to_stop()
            late = due()
            if checkpoints is not None and step > first and (stop or late):
                checkpointing.save_step(checkpoints, step, now, {"checked": [worst, bitwise]})
                distributed.unsaved(False)
                saved_at = time.monotonic()
            if stop:
                raise distributed.Preempted
            distributed.unsaved(checkpoints is not None)
            params, opt_state, metrics = apply(*now, schedule, put(made.coeffs[step], where.dtype))
            now = (params, opt_state)
            jax.block_until_ready(metrics)
            advance(1)
        if end in marks:
            compare(end)
    return now[0], Checked(worst, len(marks), bitwise and bool(marks))
