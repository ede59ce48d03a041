"""The frame of every job: one start, one judge, one export, one end.

A job is a file: its `Job` says what it checks, reads and fits before anything is computed, and its
`run` is the list of its stages. The folder, its lock, the mesh, the processes, the trackers and the
notes are touched here alone::

    def run(config, command=""):
        with job.start(JOB, config, command) as started:
            trained = train(started)
            judged = job.judge(started.run, {"trained": trained}, inputs, log)
            job.export(started.run, lambda folder: write(trained, folder))
            return job.end(started.run, judged.summary)
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.engine.run import Clock, Run, phase
from train.evaluators.judging import compare_logs, summarize
from train.options import checks
from train.options.config import ProgramConfig, identity, run_folder
from train.options.roles import Roles, roles_of
from train.reporting import page, tables
from train.runtime import compiling, distributed, files, folder, remote, reporters, sharding
from train.runtime.stages import json_stage, write_atomic
from train.runtime.tracking import Timed, say


class Fitted(NamedTuple):
    """What `Job.fit` found before the run folder is made.

    Args:
        parts: whatever the job's stages take.
        words: the size of the run in words, for the line said at its start.
        notes: what was noticed about the data and the model, for the report.
        evaluators: names of the evaluators.
    """

    parts: Any
    words: str
    notes: list[str]
    evaluators: Sequence[str]


class Job(NamedTuple):
    """The differences between jobs. Its functions raise `UserError` for whatever is wrong.

    Args:
        program: its program, such as `train.unlearn`.
        roles: which of its models is which.
        check: `check(config, mesh)`, for what is known before rows and model are read.
        load: `load(config) -> rows`, which have a `digest()`.
        model: `model(config, rows, mesh)`: the model to start from.
        fit: `fit(config, rows, model, mesh) -> Fitted`: the rows as the model reads them.
        settle: `settle(config) -> (config, rows)`, in the place of `load` where `config.json` holds
            a digest of the rows.
    """

    program: str
    roles: Roles
    check: Callable[[Any, Any], None]
    load: Callable[[Any], Any] | None
    model: Callable[[Any, Any, Any], Any]
    fit: Callable[[Any, Any, Any, Any], Fitted]
    settle: Callable[[Any], tuple[Any, Any]] | None = None


class Prepared(NamedTuple):
    """A run of which everything that can be wrong is found; its folder is not made yet.

    Args:
        config: its configuration.
        mesh: the devices.
        rows: what `load` read.
        model: what it starts from.
        fitted: what `fit` made of both.
    """

    config: Any
    mesh: Any
    rows: Any
    model: Any
    fitted: Fitted


class Started(NamedTuple):
    """A run at its start.

    Args:
        run: its folder, which is held.
        config: its configuration.
        rows: what `load` read.
        model: what it starts from, in host memory.
        parts: what `fit` made of both.
    """

    run: Run
    config: Any
    rows: Any
    model: Any
    parts: Any


class Judged(NamedTuple):
    """The per-item logs of a run's models, and their metrics."""

    logs: dict[str, Any]
    summary: dict[str, Any]


def check(job: Job, config: ProgramConfig) -> Any:
    """Everything that is known before rows and model are read; returns the mesh.

    Raises:
        UserError: a number out of range, an unknown name, a mesh that does not fit.
    """
    checks.check_config(config)
    mesh = sharding.make_mesh(config.mesh)
    job.check(config, mesh)
    return mesh


def place_of(config: ProgramConfig) -> folder.Place:
    """The run folder of a configuration, to be claimed and entered."""
    return folder.run_place(run_folder(config), identity(config))


def prepare(job: Job, config: ProgramConfig, held: contextlib.ExitStack | None = None) -> Prepared:
    """Find everything that can be wrong, before the run folder exists.

    With `held`, a run folder that exists is locked: another run in it is noticed first.

    Raises:
        UserError: anything about the configuration, the rows, the model or the folder.
    """
    rows: Any = None
    distributed.check_same(identity(config))
    with distributed.together():
        mesh = check(job, config)
        if job.settle is not None:
            config, rows = job.settle(config)
        folder.claim(place_of(config), held)
        if job.load is not None:
            rows = job.load(config)
    distributed.check_same({"data": rows.digest()})
    model = job.model(config, rows, mesh)
    with distributed.together():
        fitted = job.fit(config, rows, model, mesh)
    return Prepared(config, mesh, rows, model, fitted)


@contextlib.contextmanager
def start(job: Job, config: ProgramConfig, command: str = "") -> Iterator[Started]:
    """Prepare a run, then make or enter its folder, and hold it.

    Args:
        job: what the run does.
        config: its configuration.
        command: the command line that repeats it, for its page.

    Raises:
        UserError: anything about the configuration, the rows, the model or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        if config.smoke:
            compiling.compile_quickly()
        config, mesh, rows, model, fitted = prepare(job, config, held)
        model = model.to_host()  # as every model while it waits: a step has the device to itself
        root = folder.enter(place_of(config), held)
        logs_to = reporters.chosen(config.report_to, getattr(config, "tensorboard", False))
        about = {"roles": job.roles._asdict(), "evaluators": [*fitted.evaluators]}
        about |= {"program": job.program, "command": command}
        run = Run(
            root,
            mesh,
            config.seed,
            Timed(root, logs_to, identity(config)),
            config.stage.cache,
            fitted.notes,
            about,
            Clock(folder.read_minutes(root), since),
        )
        name = config.preset or job.program
        say(f"{name}: {fitted.words}, seed {config.seed}, run folder {remote.home(root)}")
        for note in fitted.notes:
            say(f"  {note}")
        yield Started(run, config, rows, model, fitted.parts)


def judge(
    run: Run,
    models: Mapping[str, Any],
    inputs: Callable[[Any, str], Mapping[str, Any]],
    log: Callable[[Any, str], Mapping[str, Any]],
    retain_log: Any = None,
) -> Judged:
    """Judge all models alike; each is compared with the one that the run's roles hold it to.

    Args:
        run: where the logs go, `evals/NAME.json`; what another run in its cache judged is found.
        models: by name, in host memory.
        inputs: `inputs(model, name)`: everything that its log depends on, as JSON values.
        log: `log(model, name)`: its per-item log.
        retain_log: the log of a model in the place of the reference.
    """
    logs = {}
    for name, model in models.items():
        path = run.folder / "evals" / f"{name}.json"
        with phase(run, f"evaluate {name}"):
            logs[name] = json_stage(
                path,
                {**inputs(model, name)},
                lambda model=model, name=name: log(model, name),
                run.cache,
            )
    roles = roles_of(run.about.get("roles"))
    summary = summarize(logs, models, retain_log, roles)
    distributed.of_first(lambda: compare_logs(run.folder, logs, retain_log, roles))
    return Judged(logs, summary)


def export(run: Run, write: Callable[[Path], None], name: str = "export") -> None:
    """Write a model into a folder of the run; `write(folder)` is called in every process."""
    with phase(run, "export"):
        write(run.folder / name)


def end(
    run: Run,
    summary: Mapping[str, Any],
    tracked: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    shown: bool = True,
) -> Path:
    """`summary.json`, the page and its pictures, and the table on the terminal.

    Args:
        run: the run.
        summary: metrics by model, as they are stored.
        tracked: those that trackers receive; None: the same.
        notes: lines below the table.
        shown: False for a run without metrics, which has no page and no table.

    Returns:
        The run folder.
    """

    def write() -> None:
        write_atomic(run.folder / "summary.json", text := json.dumps(summary, indent=1))
        write_atomic(run.folder / "summary.key", files.key_text(text))
        if shown:
            page.build(run.folder)
            tables.show(tables.columns([tables.load_run(run.folder)]))
        remote.send(run.folder)

    distributed.of_first(write)
    run.tracker.close(summary if tracked is None else tracked)
    for note in notes:
        say(note)
    where = remote.home(run.folder)
    minutes = 0.0 if run.clock is None else run.clock.minutes["all"]
    parts = [f"report: {where / 'report.html'}"] if shown else []
    parts += [f"model: {where / 'export'}"] if (run.folder / "export").is_dir() else []
    say("   ".join([*parts, f"{minutes:.1f} minutes"]))
    return run.folder
