"""A run that was stopped, by an error or by SIGKILL, ends with the bits of one that was not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from train.engine import base_models, loop
from train.engine.run import Run
from train.jobs import unlearning_stages
from train.options import cli
from train.options.config import RunConfig
from train.presets import PRESETS
from train.runtime import checkpointing, errors, sharding
from train.runtime.tracking import Tracker
from train.tasks import load_task

STEPS = 8


class Stopped(Exception):
    """Raised to interrupt a stage."""


class Setting(NamedTuple):
    """A small job: its configuration, task, start and mesh, and a method that runs one stage."""

    config: RunConfig
    task: Any
    base: Any
    mesh: Any

    def run(self, name: str, root: Path) -> Any:
        root.mkdir(exist_ok=True)
        run = Run(root, self.mesh, self.config.seed, Tracker(root))
        if name == "unlearned":
            return unlearning_stages.unlearn(run, self.config, self.base, self.task)
        return unlearning_stages.finetune(run, self.config, name, self.base, self.task.retain)


@pytest.fixture(scope="module")
def setting(small):
    options = [
        *small,
        *f"--finetune.steps {STEPS} --unlearn.steps {STEPS} --unlearn.curve-points 2".split(),
        *"--finetune.checkpoint-seconds 0 --unlearn.checkpoint-seconds 0".split(),
        *"--unlearn.accumulate 2 --optimizer.name muon".split(),
    ]
    config = cli.parse(RunConfig, PRESETS["quickstart"].PRESET, options, "tests", "")
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    return Setting(config, task, base_models.base_model(config, task, mesh), mesh)


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    """Result and metrics of the stages without interruption."""
    results = {}
    for name in ("original", "unlearned"):
        root = tmp_path_factory.mktemp(name)
        results[name] = (setting.run(name, root).sha, metrics(root))
    return results


def metrics(root: Path) -> str:
    return (root / "metrics.jsonl").read_text()


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the logging of a step fail once."""
    real = Tracker.write

    def write(self, stage, at, scalars):
        if at == step:
            raise Stopped
        real(self, stage, at, scalars)

    patch.setattr(Tracker, "write", write)


def newest(root: Path) -> Path:
    (folder,) = (root / "checkpoints").iterdir()
    return folder / str(checkpointing.steps_in(folder)[-1])


@pytest.mark.parametrize(
    ("name", "step"),
    [("original", 5), pytest.param("unlearned", 1, marks=pytest.mark.slow), ("unlearned", 6)],
)
def test_interrupted_and_continued_is_bit_equal(
    setting, undisturbed, tmp_path, monkeypatch, capsys, name, step
):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        setting.run(name, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "' + name)  # a truncated line
    sha, rows = undisturbed[name]
    assert setting.run(name, tmp_path).sha == sha
    assert f"{name}: continuing at step {step} of {STEPS}" in capsys.readouterr().err
    assert metrics(tmp_path) == rows
    steps = [json.loads(row)["step"] for row in rows.splitlines()]
    assert steps == list(range(STEPS + (name == "unlearned")))


def test_a_flipped_bit_costs_one_checkpoint(setting, undisturbed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 5)
        setting.run("original", tmp_path)
    folder = newest(tmp_path)
    assert folder.name == "5"
    files = [p for p in (folder / "arrays").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 16
    victim.write_bytes(bytes(data))
    sha, rows = undisturbed["original"]
    assert setting.run("original", tmp_path).sha == sha and metrics(tmp_path) == rows
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and str(folder) in said[0] and "using step 4" in said[0]


def test_stopped_in_the_middle_of_a_checkpoint(setting, undisturbed, tmp_path, monkeypatch):
    real = os.replace

    def replace(source, target):
        if Path(target).name == "4":
            raise Stopped
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(os, "replace", replace)
        setting.run("original", tmp_path)
    assert newest(tmp_path).name == "3" and list(newest(tmp_path).parent.glob("4.*.part"))
    sha, rows = undisturbed["original"]
    assert setting.run("original", tmp_path).sha == sha and metrics(tmp_path) == rows


def poison(patch: pytest.MonkeyPatch, step: int) -> None:
    """Report a loss of NaN at one step; the program is the same."""
    real = loop.compile_step

    def compile_step(*args):
        jitted = real(*args)

        def compiled(*args):
            made = jitted.lower(*args).compile()

            def call(state, *rest):
                here = int(state.step) == step
                after, values = made(state, *rest)
                return after, values | ({"loss": jnp.asarray(jnp.nan)} if here else {})

            call.memory_analysis = made.memory_analysis
            return call

        return SimpleNamespace(
            lower=lambda *args: SimpleNamespace(compile=lambda **options: compiled(*args))
        )

    patch.setattr(loop, "compile_step", compile_step)
    patch.setattr(loop, "_COMPILED", {})


def test_a_loss_that_is_not_finite(setting, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(errors.TrainingError) as error:
        poison(patch, 5)
        setting.run("original", tmp_path)
    message = str(error.value)
    assert "\n" not in message and "original: loss is not finite at step 5 (loss nan, " in message
    # The checkpoint of step 5 holds the parameters that gave the NaN, so it is not a good one.
    good = newest(tmp_path)
    assert good.name == "4" and f"last good checkpoint: {good}" in message
    assert not list((tmp_path / "stages").glob("*"))
    # Once the cause is removed the same run continues from there.
    sha, rows = undisturbed["original"]
    assert setting.run("original", tmp_path).sha == sha and metrics(tmp_path) == rows


def test_a_loss_that_is_not_finite_before_any_checkpoint(setting, tmp_path, monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(errors.TrainingError, match="none was written"),
    ):
        poison(patch, 0)
        setting.run("original", tmp_path)


def test_a_diverging_run_exits_with_code_1(program, tiny, tofu_folder, tmp_path):
    options = (
        "--mesh.data 1 --train.steps 6 --train.batch-size 4 --max-length 96 "
        "--train.optimizer.learning-rate 1e30"
    ).split()
    root = tmp_path / "run"
    argv = [tiny, tofu_folder / "retain99.json", *options, "--output", root]
    done = program("train.finetune", *argv)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("stopped: original: update norm is not finite at step 0 (update_norm ")
    assert re.search(r"\(update_norm (inf|nan), loss [0-9.]+, grad_norm [0-9.]+, lr ", last)
    assert "learning rate" in last and "Traceback" not in done.err
    assert not (root / "export").exists() and not (root / "summary.json").exists()


# SIGTERM, as a cloud sends it before it takes the machine away.


def terminate_at(
    patch: pytest.MonkeyPatch, owner: Any, name: str, ready, number: int = signal.SIGTERM
) -> None:
    """Send this process a signal the first time `ready(*args)` holds as `owner.name` is called."""
    real = getattr(owner, name)
    sent = []

    def call(*args, **options):
        if not sent and ready(*args):
            sent.append(True)
            os.kill(os.getpid(), number)
        return real(*args, **options)

    patch.setattr(owner, name, call)


def stopped(done, word: str = "SIGTERM", code: int = 0) -> None:
    """It ended well, and its last line says how to resume."""
    assert done.code == code, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith(f"stopped by {word}, finished work is stored; resume with: python ")
    assert "Traceback" not in done.err and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_sigterm_in_training_saves_at_the_next_step(
    program, tiny, tofu_folder, tmp_path, monkeypatch
):
    options = "--mesh.data 1 --train.steps 8 --train.batch-size 4 --max-length 96 --output".split()
    argv = [tiny, tofu_folder / "retain99.json", *options]
    one, two = tmp_path / "one", tmp_path / "two"
    assert program("train.finetune", *argv, one).code == 0
    for number, step, word, code in (
        (signal.SIGHUP, 1, "SIGHUP", 129),
        (signal.SIGINT, 3, "Ctrl-C", 130),
        (signal.SIGTERM, 4, "SIGTERM", 0),
    ):
        with monkeypatch.context() as patch:
            ready = lambda tracker, stage, at, values, step=step: at == step  # noqa: E731
            terminate_at(patch, Tracker, "write", ready, number)
            done = program("train.finetune", *argv, two)
        stopped(done, word, code)
        assert f"original: stopped before step {step + 1} of 8" in done.err
        assert str(two) in done.err and newest(two).name == str(step + 1)
        assert not (two / "summary.json").exists() and not (two / "run.lock").exists()
    done = program("train.finetune", *argv, two)
    assert done.code == 0 and "original: continuing at step 5 of 8" in done.err
    assert metrics(one) == metrics(two)
    names = ("summary.json", "export/model.safetensors")
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_sigterm_in_an_evaluation_ends_at_once(program, tiny, tofu_folder, tmp_path, monkeypatch):
    from train.evaluators import evaluation

    options = "--evaluate.leak-samples 0 --evaluate.max-new-tokens 4 --mesh.data 1 --output".split()
    argv = [tiny, "--data.path", tofu_folder, *options, tmp_path / "judged"]
    with monkeypatch.context() as patch:
        terminate_at(patch, evaluation, "answer_rows", lambda *args: "retain" in args[-1])
        done = program("train.evaluate", *argv)
    stopped(done)
    assert not (tmp_path / "judged" / "summary.json").exists()
    assert program("train.evaluate", *argv).code == 0


@pytest.mark.slow
def test_sigterm_outside_training_ends_at_once(program, small, tmp_path, monkeypatch):
    """During compilation, while a result is stored, and during the evaluation."""
    from train.evaluators import evaluation
    from train.runtime import stages

    options = "--finetune.steps 6 --unlearn.steps 4 --unlearn.curve-points 0 --no-oracle".split()
    more = "--evaluate.judge base --evaluate.leak-samples 0 --output".split()
    argv = ["quickstart", *small, *options, *more]
    one, two = tmp_path / "one", tmp_path / "two"
    done = program("train.unlearn", *argv, one)
    assert done.code == 0, done.err
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_COMPILED", {})
        terminate_at(patch, loop, "compile_step", lambda *args: True)
        done = program("train.unlearn", *argv, two)
    stopped(done)
    assert "original: stopped before step 0 of 6" in done.err and not lines(two, "original")
    with monkeypatch.context() as patch:
        save = lambda folder, *args: "stages" in str(folder)  # noqa: E731
        terminate_at(patch, stages.checkpointing, "save_tree", save)
        done = program("train.unlearn", *argv, two)
    stopped(done)
    assert list((two / "stages").glob("original-*/manifest.json"))  # finished first
    assert not list((two / "checkpoints").glob("*"))
    with monkeypatch.context() as patch:
        terminate_at(patch, evaluation, "answer_rows", lambda *args: "unlearned" in args[-1])
        done = program("train.unlearn", *argv, two)
    stopped(done)
    assert "original: found, made from the same inputs" in done.err
    assert (two / "evals" / "original.json").exists()
    assert not (two / "evals" / "unlearned.json").exists()
    done = program("train.unlearn", *argv, two)
    assert done.code == 0 and "unlearned: found, made from the same inputs" in done.err
    assert metrics(one) == metrics(two)
    ours, theirs = (json.loads((root / "summary.json").read_text()) for root in (one, two))
    assert ours == theirs


# SIGKILL, as `kill -9` sends it, on a real process.


class Process:
    """A program of the toolkit in a separate process."""

    def __init__(self, repo: Path, environment: dict[str, str]):
        self.repo = repo
        self.env = os.environ | environment | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}

    def start(self, argv: list[Any], log: Path) -> subprocess.Popen:
        with log.open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *map(str, argv)],
                cwd=self.repo, env=self.env, stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip

    def finish(self, argv: list[Any], log: Path) -> str:
        code = self.start(argv, log).wait(timeout=600)
        text = log.read_text()
        assert code == 0, text
        return text

    def kill_when(self, argv: list[Any], log: Path, ready) -> None:
        """Start, wait until `ready()`, send SIGKILL."""
        process = self.start(argv, log)
        deadline = time.monotonic() + 600
        while not ready():
            assert process.poll() is None, f"ended before it could be killed: {log.read_text()}"
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def process(repo, quick_environment):
    return Process(repo, quick_environment)


def lines(root: Path, stage: str) -> int:
    path = root / "metrics.jsonl"
    return path.read_text().count(f'"stage": "{stage}"') if path.exists() else 0


def test_kill_9_of_a_finetuning(process, tiny, tofu_folder, tmp_path):
    """The fast one: no evaluation around the stage."""
    options = (
        "--train.steps 24 --train.batch-size 4 --max-length 96 --train.checkpoint-seconds 0 "
        "--train.optimizer.learning-rate 1e-3"
    ).split()
    argv = ["train.finetune", tiny, tofu_folder / "retain99.json", *options, "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    process.finish([*argv, one], tmp_path / "one.log")
    log = tmp_path / "two.log"
    process.kill_when([*argv, two], log, lambda: lines(two, "original") >= 8)
    assert not (two / "summary.json").exists()
    said = process.finish([*argv, two], log)
    assert "original: continuing at step" in said
    assert metrics(one) == metrics(two)
    ours, theirs = (json.loads((root / "summary.json").read_text()) for root in (one, two))
    assert ours == theirs and len(ours["original"]["params_sha256"]) == 64


@pytest.mark.slow
def test_kill_9_of_the_quickstart(process, small, tmp_path):
    """Killed in every stage, in the evaluation and in the export; then one start to the end."""
    options = (
        "--finetune.steps 40 --unlearn.steps 20 --finetune.checkpoint-seconds 0 "
        "--unlearn.checkpoint-seconds 0"
    ).split()
    argv = ["train.unlearn", "quickstart", *small, *options, "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    process.finish([*argv, one], tmp_path / "one.log")

    def stored(stage: str) -> list[tuple[str, int]]:
        found = (two / "stages").glob(f"{stage}-*/manifest.json")
        return [(str(p), p.stat().st_mtime_ns) for p in found]

    moments = [
        lambda: (two / "config.json").exists(),
        lambda: lines(two, "original") >= 3,
        lambda: lines(two, "original") >= 25,
        lambda: lines(two, "oracle") >= 10,
        lambda: bool(list((two / "caches").glob("*"))),
        lambda: lines(two, "unlearned") >= 8,
        lambda: (two / "evals" / "original.json").exists(),
        lambda: (two / "export").exists() or bool(list(two.glob(".export*"))),
    ]
    finished: list[tuple[str, int]] = []
    for number, ready in enumerate(moments):
        process.kill_when([*argv, two], tmp_path / f"kill{number}.log", ready)
        # Stored results are never stored again, so they were not computed again either.
        assert set(finished) <= {
            entry for stage in ("original", "oracle") for entry in stored(stage)
        }
        finished = [entry for stage in ("original", "oracle") for entry in stored(stage)]
    assert len(finished) == 2
    said = process.finish([*argv, two], tmp_path / "last.log")
    for stage in ("original", "oracle", "unlearned"):
        assert f"{stage}: found, made from the same inputs" in said
    assert metrics(one) == metrics(two)
    ours, theirs = (json.loads((root / "summary.json").read_text()) for root in (one, two))
    assert ours == theirs
    weights = [(root / "export" / "model.safetensors").read_bytes() for root in (one, two)]
    assert weights[0] == weights[1]
    assert not [p.name for p in two.iterdir() if p.name.startswith(".")]


KILLS = 20


@pytest.mark.slow
def test_twenty_kills_at_random_moments(process, tmp_path):
    """A run of the quickstart's model and data: killed 20 times, it ends with the same bits.

    The moments are drawn from everything that is visible on the disk: every step, every third of
    them in the middle of the checkpoint that follows it, and in between the ends of stages, caches,
    evaluations and the export.
    """
    options = (
        "--finetune.steps 80 --unlearn.steps 40 --finetune.checkpoint-seconds 0 "
        "--unlearn.checkpoint-seconds 0 --unlearn.curve-points 2 --evaluate.leak-samples 2 "
        "--evaluate.max-new-tokens 16 --mesh.data 1 --output"
    ).split()
    argv = ["train.unlearn", "quickstart", *options]
    one, two = tmp_path / "one", tmp_path / "two"
    process.finish([*argv, one], tmp_path / "one.log")
    total = {stage: lines(one, stage) for stage in ("original", "oracle", "unlearned")}
    rng = random.Random(2026)

    def saving() -> bool:
        return any(two.glob("checkpoints/*/*.part")) or any(two.glob("stages/*.part"))

    def after_step(stage: str, step: int, middle: bool):
        return lambda: lines(two, stage) >= step and (not middle or saving())

    moments = []
    for stage, count in (("original", 6), ("oracle", 4), ("unlearned", 6)):
        for number, step in enumerate(sorted(rng.sample(range(1, total[stage] - 1), count))):
            moments.append(after_step(stage, step, number % 3 == 1))
        if stage == "oracle":
            moments.append(lambda: bool(list((two / "caches").glob("*"))))
    for name in ("original", "oracle"):
        moments.append(lambda name=name: (two / "evals" / f"{name}.json").exists())
    moments.append(lambda: bool(list(two.glob(".export*"))) or (two / "export").exists())
    assert len(moments) == KILLS
    torn = 0
    for number, ready in enumerate(moments):
        process.kill_when([*argv, two], tmp_path / f"kill{number}.log", ready)
        torn += saving()
    assert torn >= 4  # killed in the middle of a save, whose files are then visible
    process.finish([*argv, two], tmp_path / "last.log")
    assert metrics(one) == metrics(two)
    ours, theirs = (json.loads((root / "summary.json").read_text()) for root in (one, two))
    assert ours == theirs
    for name in ("export/model.safetensors", "export/config.json", "evals/unlearned.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
