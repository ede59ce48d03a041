"""The record of a running program, and the two ways in which it makes results.

A `Run` is a record; functions do the work. `train` makes parameters by training, `compute` makes
all other results: traces, merges, closed-form edits, attacks. Both are memoised: a result made from
the same inputs is found, a killed run continues, and nothing is made twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective
from models.bounds import check_positions
from train.data.packing import shapes_within
from train.data.references import cached_streams, settled, with_references
from train.data.stream import Positioned, Stream
from train.data.streams import batches_of, pack_streams
from train.engine import loop
from train.engine.keys import stage_inputs
from train.engine.replays import coefficients, stored
from train.engine.replays.recording import recording
from train.engine.step import shaped
from train.engine.trainable import trainable_of
from train.evaluators.evaluation import Model
from train.options import checks
from train.options.config import to_json
from train.options.optimizers import OPTIMIZERS, in_micro_batches, over_rows
from train.options.recipe import Recipe, num_steps
from train.runtime import checkpointing, distributed, remote, sharding
from train.runtime.folder import write_about
from train.runtime.stages import digest, folder_of, json_stage, params_stage
from train.runtime.tracking import Tracker, say


class Clock:
    """Minutes that each phase of a run has taken, those of earlier starts of it included."""

    def __init__(self, minutes: dict[str, float], started: float):
        self.minutes, self.started = minutes, started
        self.earlier = minutes.get("all", 0.0)

    def add(self, phase: str, since: float) -> None:
        """Count a phase that began at `since` (seconds of `time.monotonic`) and ends now."""
        now = time.monotonic()
        self.minutes[phase] = self.minutes.get(phase, 0.0) + (now - since) / 60
        self.minutes["all"] = self.earlier + (now - self.started) / 60


@dataclass(frozen=True)
class Run:
    """A held run folder, and everything that its stages need.

    Args:
        folder: the folder of the first process's files: the run folder, or its local mirror.
        mesh: the devices.
        seed: the seed from which all randomness follows.
        tracker: the log of steps.
        cache: the folder that runs share, where results are found and stored; None: there is none.
        notes: remarks about the data and the model, for the report.
        about: further entries of `run.json`: the roles of the models, and how they are judged.
        clock: the minutes of each phase; None: they are not measured.
    """

    folder: Path
    mesh: Any
    seed: int
    tracker: Tracker
    cache: Path | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: Clock | None = None


@contextlib.contextmanager
def phase(run: Run, name: str) -> Iterator[None]:
    """A part of a run whose minutes are in `run.json`; the run may be stopped after it."""
    since = time.monotonic()
    yield
    if run.clock is None:
        return
    clock = run.clock
    clock.add(name, since)
    distributed.of_first(lambda: write_about(run.folder, clock.minutes, run.notes, run.about))
    distributed.stop_point()


def seed_of(seed: int, purpose: str) -> int:
    """The seed of one purpose in a run: two stages of one seed see different orders and draws.

    Example:
        >>> seed_of(1, "oracle") - seed_of(0, "oracle") == 2**32
        True
    """
    return seed * 2**32 + zlib.crc32(purpose.encode())


class Watch(NamedTuple):
    """A look at the model while it trains: `look(model) -> numbers`, at `points` + 1 steps."""

    look: Callable[[Model], dict[str, float]]
    points: int


def train(
    run: Run,
    name: str,
    start: Model,
    objective: tuple[Objective, Any],
    streams: Mapping[str, Stream],
    recipe: Recipe,
    *,
    reference: Model | None = None,
    purpose: str | None = None,
    watch: Sequence[Watch] = (),
    keep: Callable[[Any], None] | None = None,
    record: str | None = None,
    only: Sequence[str] = (),
) -> Model:
    """A stage of training: found by the digest of its inputs, or computed.

    Args:
        run: the run that makes and stores the result.
        name: the name of the stage, in logs and file names.
        start: the model that it starts from.
        objective: a row and its complete options (`objectives.resolve`).
        streams: the streams that the row names.
        recipe: the steps, the optimizer and the other options of the training.
        reference: the frozen model that the row asks; None: `start`.
        purpose: the word that keys its randomness; None: the name. Stages of one purpose see the
            same batches.
        watch: evaluations during training; they change nothing.
        keep: a function of the trained tree that is called before it becomes plain parameters. The
            files that it writes are the run's own, so the stage is not taken from the run's cache.
        record: the name of the file in the run folder that holds the coefficients of its steps, for
            optimizers whose updates need nothing else; it makes the stage the run's own. None: the
            file is `replay-NAME.zo`, with the stage's name, where the stage is not found.
        only: the parts of the tree that are stored, where no other is trained; (): all.

    Raises:
        UserError: some of the parts do not go together.
    """
    row, options = objective
    stage, adapters, mesh = recipe.stage, recipe.adapters, run.mesh
    optimizer = over_rows(recipe.optimizer, stage.batch_size)
    frozen = start if reference is None else reference
    if frozen.sha != start.sha and "fork" in row.reference.values():
        raise UserError(
            f"objective {row.name!r} asks a frozen model that shares the start's parameters, so no "
            "other reference can be given"
        )
    checks.check_recipe(recipe, objective, mesh, name, main=False)
    checks.check_model(recipe, objective, start.learner, start.params)
    if frozen.sha == start.sha:
        first = checks.train_from(start.params, recipe.select)
        row = settled(row, options, first, start.learner.sizes.get("hidden", 0), streams)
    for key, stream in streams.items():
        if isinstance(stream, Positioned):
            learned = start.learner.sizes.get("positions")
            check_positions(learned, stream.longest, f"{name}, rows of {key}")
    # Examples that share a row of tokens are in one part of the batch.
    parts = optimizer.queries if OPTIMIZERS[optimizer.name].parts else 1
    alone = stage.batch_size // (sharding.batch_ways(mesh) * stage.accumulate)
    divides = math.gcd(alone, stage.batch_size // parts)
    row_tokens = recipe.row_tokens if row.packable else 0
    main = row.streams[0]
    steps = num_steps(stage, len(streams[main]), optimizer)
    shapes = shapes_within(steps)
    streams = pack_streams(streams, stage.batch_size, divides, row_tokens, shapes)
    seed = seed_of(run.seed, purpose or name)
    inputs = stage_inputs(
        start.sha,
        start.learner.identity(),
        streams,
        objective=options,
        optimizer=optimizer,
        combine=recipe.combine,
        steps=steps,
        batch_size=stage.batch_size,
        seed=seed,
        adapters=adapters,
        select=recipe.select,
        accumulate=stage.accumulate if row.per_micro_batch else None,
    )
    if frozen.sha != start.sha:
        inputs["reference"] = frozen.sha
    if only:
        inputs["only"] = list(only)
    computed: list[str] = []
    records = coefficients.replays(optimizer)
    own = keep is not None or (records and record is not None)
    cache = None if own else run.cache

    def make(checkpoints: Path) -> Any:
        computed.append(name)
        ready = streams
        if cached_streams(row):
            with distributed.interruptible():
                ready = with_references(
                    streams, row, options, frozen.decoder, frozen.params, frozen.sha, mesh,
                    run.folder if run.cache is None else remote.located(run.cache),
                )  # fmt: skip
        training = trainable_of(
            start.params,
            row,
            adapters,
            recipe.select,
            seed=run.seed,
            dtype=start.learner.dtype,
            mesh=mesh,
        )
        here = sharding.rows_here(mesh, stage.batch_size)
        recorded = None
        if records:
            recorded = recording(
                run.folder / (record or stored.named(name)), name, start.sha, training.start,
                optimizer, steps, adapters, recipe.select, run.seed, getattr(start, "names", None),
            )  # fmt: skip
        plan = loop.Stage(
            name=name,
            steps=steps,
            batches=batches_of(ready, main, seed, stage.batch_size, here),
            batch_size=stage.batch_size,
            objective=row,
            options=options,
            optimizer=in_micro_batches(optimizer, stage.accumulate),
            accumulate=stage.accumulate,
            checkpoints=checkpoints,
            checkpoint_seconds=stage.checkpoint_seconds,
            watch=tuple(
                loop.Watch(
                    lambda tree, look=look: look(start._replace(params=training.view(tree))),
                    loop.curve_steps(steps, points),
                )
                for look, points in watch
            ),
            combine=recipe.combine,
            binding=training.binding,
            profile=recipe.profile,
            seed=seed,
            recording=recorded,
            epoch_steps=len(streams[main]) / stage.batch_size,
        )
        trained = loop.run(plan, start.learner, training.start, training.frozen, mesh, run.tracker)
        if keep is not None:
            keep(trained)
        return parts_of(training.finish(trained))

    def parts_of(tree: Any) -> Any:
        return {name: tree[name] for name in only} if only else tree

    rules = start.learner.rules
    like = shaped(start.params, sharding.param_shardings(start.params, mesh, rules))
    params, sha = params_stage(run.folder, name, inputs, parts_of(like), make, cache)
    if only:
        params, sha = {**start.params, **params}, digest([start.sha, sha])
    if recipe.profile is not None and not computed:
        say(f"--profile {recipe.profile}: nothing traced, stage {name} was done already")
    return start._replace(params=params, sha=sha)


def edit(
    run: Run,
    name: str,
    original: Model,
    objective: tuple[Objective, Any],
    streams: Mapping[str, Stream],
    **models: Model,
) -> Model:
    """A stage of a row that does not train: its `compute`, memoised as every other result.

    Args:
        run: the run that makes and stores the result.
        name: the name of the stage.
        original: the model that knows the facts; the result has its structure.
        objective: a row with `trains=False`, and its options.
        streams: the streams that the row names.
        models: further models, such as `base`.

    Returns:
        The model whose parameters `compute(work, options=, original=, **models, **streams)` gave.
    """
    row, options = objective
    if row.compute is None:
        raise TypeError(f"{name}: objective {row.name!r} trains; give it to `train`")
    inputs: dict[str, Any] = {**models, **{stream: streams[stream] for stream in row.streams}}
    return compute(
        run, name, row.compute, kind=row.name, version=row.version, like=original,
        options=options, original=original, **inputs,
    )  # fmt: skip


@runtime_checkable
class Held(Protocol):
    """A model of any kind as runs hold it: its learner, its parameters, and their sha256."""

    @property
    def learner(self) -> Any: ...
    @property
    def params(self) -> Any: ...
    @property
    def sha(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """The inputs that its answers depend on, as JSON values."""
        ...


class Work(NamedTuple):
    """The things that a function of `compute` is given beside its inputs.

    Args:
        folder: a folder for files that it needs on the way, removed when the result is stored.
        mesh: the devices.
        key: a key of `jax.random` for its randomness.
        stop: a function to call at points where the work may be interrupted.
    """

    folder: Path
    mesh: Any
    key: jax.Array
    stop: Callable[[], None]


def compute(
    run: Run,
    name: str,
    make: Callable[..., Any],
    *,
    kind: str,
    version: int,
    like: Model | None = None,
    purpose: str | None = None,
    **inputs: Any,
) -> Any:
    """A result without training: found by the digest of its inputs, or computed.

    The key is `kind`, `version`, the seed of `purpose` and the digests of `inputs`. A test should
    pin a small result of each kind: it fails where the function changes and `version` does not.

    Args:
        run: the run that makes and stores the result.
        name: the name of the result, in logs and file names.
        make: a function of a module, `make(work, **inputs)`. All that it depends on is in its
            inputs, so no closure, partial or method is taken.
        kind: the kind of work, a word of the key.
        version: the version of the function; raise it when the same inputs may give another result.
        like: the model that gives the result's structure, where the result is parameters and a
            model is returned; None: the result is JSON values.
        purpose: the word that keys its randomness; None: the name.
        inputs: models, streams, rows, dataclasses and plain values.

    Raises:
        TypeError: `make` is no function of a module, or an input has no digest.

    Example:
        ``compute(run, "merged", merge, kind="merge", version=1, like=a, a=a, b=b, weight=0.5)``
    """
    module = inspect.getmodule(make)
    if not inspect.isfunction(make) or getattr(module, make.__name__, None) is not make:
        raise TypeError(
            f"{name}: make must be a function of a module, got {make!r}; what it depends on goes "
            "into inputs"
        )
    whose = purpose or name
    key = {
        "kind": kind,
        "version": version,
        "seed": seed_of(run.seed, whose),
        "inputs": {label: identity(value, f"{name}: {label}") for label, value in inputs.items()},
    }
    if like is not None:
        key["like"] = digest([[str(x.shape), str(x.dtype)] for x in jax.tree.leaves(like.params)])

    def call(folder: Path) -> Any:
        # Folded in: a key's seed has 32 bits where 64-bit numbers are off.
        random = jax.random.fold_in(jax.random.key(run.seed), zlib.crc32(whose.encode()))
        return make(Work(folder, run.mesh, random, distributed.stop_point), **inputs)

    if like is not None:
        rules = like.learner.rules
        shapes = shaped(like.params, sharding.param_shardings(like.params, run.mesh, rules))
        params, sha = params_stage(run.folder, name, key, shapes, call, run.cache)
        return like._replace(params=params, sha=sha)
    folder = folder_of(remote.home(run.folder), name, key)
    place = remote.home(run.folder) / "checkpoints" / folder.name

    def value() -> Any:
        found = call(place)
        checkpointing.remove(place)
        return found

    return json_stage(run.folder / "computed" / f"{name}.json", key, value, run.cache)


PLAIN = {bool, int, float, str, type(None)}


def identity(value: Any, where: str = "input") -> Any:
    """A JSON value that identifies a value: equal for equal values, different for different ones.

    Raises:
        TypeError: the value is of a type that has no identity.

    Example:
        >>> identity({"rows": [{"question": "Who?"}], "weight": 0.5})
        {'rows': [{'question': 'Who?'}], 'weight': 0.5}
    """
    if isinstance(value, Held):
        return value.identity()
    if isinstance(value, Stream):
        return {"stream": value.identity()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: to_json(value)}
    if isinstance(value, Mapping):
        return {str(k): identity(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        if PLAIN.issuperset(map(type, value)):  # token ids come in thousands
            return list(value)
        return [identity(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}, which has no digest; give models, streams, rows, "
        "dataclasses and plain values"
    )
