"""The frame of every job: one start, one judge, one export, one end.

A job is a file: its `Job` has the checks, readers and fits that precede all computing, and its
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
from train.options.config import JobConfig, identity, run_folder
from train.options.roles import Roles, roles_of
from train.reporting import ending
from train.runtime import compiling, distributed, files, folder, remote, reporters, sharding
from train.runtime.stages import json_stage, write_atomic
from train.runtime.tracking import Timed, say


class Fitted(NamedTuple):
    """The result of `Job.fit`, which precedes the run folder.

    Args:
        parts: the inputs of the job's stages.
        words: the size of the run in words, for the line said at its start.
        notes: remarks about the data and the model, for the report.
        evaluators: the names of the evaluators.
        subject: the forgotten data in words, for the title of the page.
    """

    parts: Any
    words: str
    notes: list[str]
    evaluators: Sequence[str]
    subject: str = ""


class Job(NamedTuple):
    """The differences between jobs; the functions raise `UserError` for all errors of users.

    Args:
        program: the name of its program, such as `train.unlearn`.
        roles: the roles of its models.
        check: `check(config, mesh)` checks all that is known before rows and model are read.
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
    """A run that has passed all checks; its folder is not made yet.

    Args:
        config: the configuration.
        mesh: the devices.
        rows: the rows that `load` read.
        model: the model to start from.
        fitted: the result of `fit` on both.
    """

    config: Any
    mesh: Any
    rows: Any
    model: Any
    fitted: Fitted


class Started(NamedTuple):
    """A run at its start.

    Args:
        run: the run, whose folder is held.
        config: the configuration.
        rows: the rows that `load` read.
        model: the model to start from, in host memory.
        parts: the inputs of the stages that `fit` made of both.
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


def check(job: Job, config: JobConfig) -> Any:
    """Check everything that is known before rows and model are read; returns the mesh.

    Raises:
        UserError: a number is out of range, a name is unknown, or the mesh does not fit.
    """
    checks.check_config(config)
    mesh = sharding.make_mesh(config.mesh)
    job.check(config, mesh)
    return mesh


def place_of(config: JobConfig) -> folder.Place:
    """The run folder of a configuration, to be claimed and entered."""
    return folder.run_place(run_folder(config), identity(config))


def prepare(job: Job, config: JobConfig, held: contextlib.ExitStack | None = None) -> Prepared:
    """Run all checks before the run folder exists.

    With `held`, a run folder that exists is locked: another run in it is noticed first.

    Raises:
        UserError: the configuration, the rows, the model or the folder is unusable.
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
def start(job: Job, config: JobConfig, command: str = "") -> Iterator[Started]:
    """Prepare a run, then make or enter its folder, and hold it.

    Args:
        job: the job of the run.
        config: the configuration.
        command: the command line that repeats the run, for its page.

    Raises:
        UserError: the configuration, the rows, the model or the folder is unusable.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        if config.smoke:
            compiling.compile_quickly()
        config, mesh, rows, model, fitted = prepare(job, config, held)
        model = model.to_host()  # models wait there: a step has the device to itself
        root = folder.enter(place_of(config), held)
        logs_to = reporters.chosen(config.report_to, getattr(config, "tensorboard", False))
        about = {"roles": job.roles._asdict(), "evaluators": [*fitted.evaluators]}
        about |= {"program": job.program, "command": command, "subject": fitted.subject}
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
    """Judge all models alike; each is compared with the model that its role names.

    Args:
        run: the run that stores the logs, `evals/NAME.json`; logs in its cache are reused.
        models: the models by name, in host memory.
        inputs: `inputs(model, name)`: the inputs of its log, as JSON values.
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
    """Write `summary.json`, the page and its pictures, and show verdict and table.

    Args:
        run: the run.
        summary: the metrics by model, as they are stored.
        tracked: the metrics that trackers receive; None: the same.
        notes: the lines below the table.
        shown: whether there are metrics, and with them a page and a table.

    Returns:
        The run folder.
    """

    def write() -> None:
        write_atomic(run.folder / "summary.json", text := json.dumps(summary, indent=1))
        write_atomic(run.folder / "summary.key", files.key_text(text))
        log = run.folder / "metrics.jsonl"
        if log.is_file() and not files.key_of(log).exists():
            write_atomic(files.key_of(log), files.key_text(log.read_text()))
        if shown:
            ending.show(run.folder)
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
