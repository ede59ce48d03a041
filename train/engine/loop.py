"""The training loop: steps that resume, stop on a non-finite loss, and are logged one by one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn.objectives import Objective
from models import arrays
from models.learner import Learner
from train.engine.hyper import hyper_of, static_of, traced_step
from train.engine.observed import Observations
from train.engine.replays import coefficients
from train.engine.replays.recording import Recording, recorder_of
from train.engine.step import ALL, Binding, TrainState, compile_step, init_state, objective_state
from train.options.optimizers import OPTIMIZERS, Options, build
from train.runtime import checkpointing, compiling, distributed, remote, residency, sharding
from train.runtime.errors import TrainingError
from train.runtime.tracking import Tracker, progress, say

HostBatches = Mapping[str, Mapping[str, np.ndarray]]


def step_bytes(compiled: Any) -> int | None:
    """Bytes a compiled program needs on one device: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(parts) - memory.alias_size_in_bytes


class Watch(NamedTuple):
    """An evaluation during training: `look(params) -> scalars`, before each of `steps`."""

    look: Callable[[Any], dict[str, float]]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        name: the name of the stage: `original`, `oracle`, `unlearned`.
        steps: the number of optimizer steps.
        batches: `step -> batches`: this process's rows by stream, a pure function of the step.
        objective: the row whose loss is minimised, with `options` as resolved from its
            configuration.
        optimizer: the optimizer and its options.
        combine: the rule that makes one gradient of those of the two sides.
        accumulate: the number of micro-batches per step.
        watch: the evaluations during training.
        checkpoints: the folder for this stage's checkpoints.
        checkpoint_seconds: the least time between two of them.
        binding: the functions that form models of the trained tree
            (`train.engine.trainable.Trainable`).
        batch_size: the rows of a global batch; None: `batches` makes all of them.
        profile: the folder for a trace of a few steps.
        seed: the seed of the objective's draws and of the directions of zeroth-order steps.
        epoch_steps: the number of steps in which its first stream is read once; None: all of them.
        recording: the file of its coefficients, where `coefficients.replays(optimizer)`; None: none
            is written.
    """

    name: str
    steps: int
    batches: Callable[[int], HostBatches]
    objective: Objective
    options: Any
    optimizer: Options
    accumulate: int
    checkpoints: Path
    checkpoint_seconds: float
    watch: tuple[Watch, ...] = ()
    combine: str = "sum"
    binding: Binding = ALL
    batch_size: int | None = None
    profile: Path | None = None
    seed: int = 0
    recording: Recording | None = None
    epoch_steps: float | None = None


PROFILED = 3  # traced steps, after two for compilation and warm-up


@contextlib.contextmanager
def traced(folder: Path | None, first: int) -> Iterator[Callable[[int, Any], None]]:
    """Yield a function to call as `(step, state)` before each step; it traces a few of them.

    Args:
        folder: the folder of the trace; None: there is no trace.
        first: the first step of this process.

    Returns:
        A context manager; leaving it, also by an exception, ends a running trace.
    """
    begun, running = False, False

    def look(step: int, state: Any) -> None:
        nonlocal begun, running
        if folder is not None and step == first + 2:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
            begun = running = True
        elif running and step == first + 2 + PROFILED:
            jax.block_until_ready(state)  # otherwise the last steps would be missing
            end()

    def end() -> None:
        nonlocal running
        running = False
        jax.profiler.stop_trace()
        say(f"trace of a few steps: {folder} (tensorboard --logdir {folder})")

    try:
        yield look
    finally:
        if running:
            end()
    if folder is not None and not begun:
        say(f"--profile {folder}: nothing traced, the stage had no third step left to take")


def curve_steps(steps: int, points: int) -> tuple[int, ...]:
    """`points + 1` evenly spaced steps from 0 to `steps` (none when `points` is 0)."""
    return tuple(sorted({round(steps * i / points) for i in range(points + 1)})) if points else ()


_COMPILED: dict[Any, dict[Any, tuple[Any, dict[str, float]]]] = {}
KEPT = 4  # kinds of steps whose programs are kept for later stages of this process


def _programs(stage: Stage, learner: Learner, mesh: Any) -> dict[Any, Any]:
    """Compiled steps of stages that differ in numbers alone, by the shapes of their arguments."""
    if stage.binding.key is None:
        return {}
    row = stage.objective
    key = (
        learner,
        (row.loss, row.sides, row.advance, row.weigh, row.estimators),
        tuple(row.reference.items()),
        tuple(row.asks.items()),
        static_of(stage.options, stage.optimizer),
        stage.combine,
        stage.accumulate,
        stage.binding.key,
        mesh,
    )
    found = _COMPILED.pop(key, {})
    _COMPILED[key] = found
    while len(_COMPILED) > KEPT:
        del _COMPILED[next(iter(_COMPILED))]
    return found


def run(
    stage: Stage, learner: Learner, params: Any, frozen: Any, mesh: Any, tracker: Tracker
) -> Any:
    """Train from `params`, which stay where and as they are, and return the final parameters.

    Metrics are read one step late, so the host prepares the next batch while the device works. A
    checkpoint is written only when all losses before it are known to be finite, every
    `checkpoint_seconds` and when the run is asked to stop.

    Raises:
        TrainingError: a loss is not finite.
        Preempted: the run was asked to stop.
    """
    axis = sharding.query_axis(mesh)
    tx, _, _ = build(stage.optimizer, stage.steps, stage.combine, axis)
    params = residency.fresh(params, sharding.param_shardings(params, mesh, learner.rules))
    memory = objective_state(learner, stage.objective, stage.options, stage.seed)
    state, shardings = init_state(params, tx, mesh, memory)
    draws = np.asarray(coefficients.seed_of_draws(stage.seed), np.uint32)
    opt_state = coefficients.with_state(state.opt_state, seed=arrays.put(draws, shardings.step))
    state = state._replace(opt_state=opt_state)
    numbers = hyper_of(stage.options, stage.optimizer, stage.steps, stage.seed, stage.epoch_steps)
    hyper = jax.tree.map(lambda x: arrays.put(x, shardings.step), numbers)
    parts = (learner, stage.objective, stage.options, stage.optimizer)
    how = (axis, stage.accumulate, stage.binding)
    compiled = _programs(stage, learner, mesh)
    start = 0
    found = checkpointing.load_latest(stage.checkpoints, state, say)
    if found is not None:
        start, state = found
        say(f"{stage.name}: continuing at step {start} of {stage.steps}")
    tracker.resume(stage.name, start)
    recorder = recorder_of(stage.recording, state.opt_state, start, stage.checkpoints)
    observe = OPTIMIZERS[stage.optimizer.name].observe
    seen_at = tracker.folder / f"observed-{stage.name}"
    observations = Observations(observe, seen_at, start, shardings.step)

    # The step in flight: its number, its metrics, the evaluations before it, its observation.
    pending: tuple[int, dict[str, jax.Array], dict[str, float], Any] | None = None
    saved_at = time.monotonic()

    def settle() -> float:
        """Log the step in flight; stop when its loss is not finite."""
        nonlocal pending
        if pending is None:
            return math.nan
        step, metrics, look, seen = pending
        pending = None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        tracker.write(stage.name, step, values | look)
        observations.write(step, seen)
        odd = {k: v for k, v in values.items() if not math.isfinite(v)}
        if odd:
            # A checkpoint of this very step holds the parameters that gave this loss.
            checkpointing.remove(stage.checkpoints / str(step))
            good = max(checkpointing.steps_in(stage.checkpoints), default=None)
            where = "none was written yet" if good is None else f"{stage.checkpoints / str(good)}"
            first = "loss" if "loss" in odd else next(iter(odd))
            # The terms that were not finite, and beside them the numbers that may explain them.
            shown = odd | {k: values[k] for k in ("loss", "grad_norm", "lr") if k in values}
            raise TrainingError(
                f"{stage.name}: {first.replace('_', ' ')} is not finite at step {step} "
                f"({', '.join(f'{k} {v:.6g}' for k, v in shown.items())}); last good checkpoint: "
                f"{where}; lower the learning rate"
            )
        if recorder is not None:
            recorder.add(state.opt_state)
        return values["loss"]

    if coefficients.replays(stage.optimizer):
        compile_for = coefficients.compiler(*parts, *how, shardings, mesh)
    else:
        step_fn = compile_step(traced_step(*parts, stage.combine, *how), shardings, mesh)

        def compile_for(*args):
            made = compiling.compiled(step_fn.lower(*args))
            return made, (made,)

    fixed = tuple((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves((state, frozen)))
    spent: list[float] = []  # seconds of the compilations since progress was last shown

    def program(state, batches):
        """The step for batches of these shapes, compiled once, and its MiB on a device."""
        shapes = (fixed, *((n, k, x.shape) for n, b in batches.items() for k, x in b.items()))
        if shapes not in compiled:
            if not compiled:
                say(f"{stage.name}: compiling the step")
            began = time.monotonic()
            made, programs = compile_for(state, hyper, frozen, batches)
            spent.append(time.monotonic() - began)
            sizes = [size for each in programs if (size := step_bytes(each)) is not None]
            look = {"step_mib": round(max(sizes) / 2**20, 3)} if sizes else {}
            compiled[shapes] = made, look
        return compiled[shapes]

    def looked(step: int, state: TrainState) -> dict[str, float]:
        """The scalars of all evaluations due before `step`."""
        found: dict[str, float] = {}
        for watch in stage.watch:
            if step in watch.steps:
                found |= watch.look(state.params)
        return found

    def save(step: int) -> None:
        """Write a checkpoint of the state before `step`."""
        nonlocal saved_at
        more = {} if recorder is None else recorder.checkpoint()
        observations.save()
        checkpointing.save_step(stage.checkpoints, step, state, more)
        distributed.unsaved(False)
        remote.send(tracker.folder)
        saved_at = time.monotonic()

    def due() -> bool:
        """Whether the next checkpoint is due, by the clock of the first process."""
        return distributed.of_first(lambda: time.monotonic() - saved_at > stage.checkpoint_seconds)

    with (
        progress(stage.name, stage.steps, start) as advance,
        traced(stage.profile, start) as look_at,
    ):
        for step in range(start, stage.steps):
            look_at(step, state)
            batches = {
                name: sharding.put_batch(rows, mesh, stage.batch_size)
                for name, rows in stage.batches(step).items()
            }
            loss = settle()
            if recorder is not None and step > start:
                recorder.mark(step, state.params)
            stop = distributed.asked_to_stop()
            if step > start and (stop or due()):
                save(step)
            if stop:
                say(f"{stage.name}: stopped before step {step} of {stage.steps}")
                raise distributed.Preempted
            run_step, look = program(state, batches)
            look = look | looked(step, state)
            distributed.unsaved(True)
            state, metrics = run_step(state, hyper, frozen, batches)
            pending = (step, metrics, look, observations.look(state.opt_state))
            advance(1, f"loss {loss:.4f}" if math.isfinite(loss) else "", sum(spent))
            spent.clear()
        loss = settle()
        observations.save()
        if recorder is not None:
            recorder.mark(stage.steps, state.params)
            # The result is stored next and the checkpoints go: the file must be whole by then.
            recorder.checkpoint()
    if last := looked(stage.steps, state):
        # One line more than steps: the evaluation after the last one, beside its loss.
        tracker.write(stage.name, stage.steps, {"loss": loss} | last)
    return state.params


__all__ = ["Stage", "TrainState", "curve_steps", "run"]
