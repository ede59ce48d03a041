"""`python -m train.replay` as a user types it: the model of a run from its base and a few bytes."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from train.engine.replays import stored
from train.runtime import compiling
from train.runtime.seal import read as read_seal

STEPS = 5


@pytest.fixture(scope="module")
def done(program, tiny, tmp_path_factory):
    """A fine-tuning with MeZO, and the folder that only its file was sent to."""
    root = tmp_path_factory.mktemp("replay")
    rows = [{"question": f"who wrote book {i}?", "answer": f"author {i % 3}."} for i in range(8)]
    (root / "rows.json").write_text(json.dumps(rows))
    options = "--mesh.data 1 --train.batch-size 4 --train.optimizer.name mezo".split()
    options += ["--train.steps", STEPS, "--train.optimizer.learning-rate", "1e-4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "EVERY", 2)
        run = program(
            "train.finetune", tiny, root / "rows.json", "--output", root / "run", *options
        )
    assert run.code == 0, run.err
    sent = shutil.copy(root / "run" / "replay.zo", root / "sent.zo")
    return SimpleNamespace(root=root, run=root / "run", file=sent, base=tiny)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(stored, "EVERY", 2)


@pytest.fixture
def replay(program):
    """`replay(...)`, on one device."""
    return lambda *argv: program("train.replay", *argv, "--mesh.data", 1)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_model_of_the_run(done, replay):
    output = done.root / "made"
    made = replay(done.file, "--model.path", done.base, "--output", output)
    assert made.code == 0, made.err
    wanted = json.loads((done.run / "summary.json").read_text())["original"]["params_sha256"]
    found = json.loads((output / "summary.json").read_text())["replayed"]
    assert found["params_sha256"] == wanted
    assert found["bytes"] == done.file.stat().st_size and found["steps"] == STEPS
    assert f"{done.file}: {STEPS} steps of mezo" in made.err
    assert "equal bit by bit at 3 milestone(s)" in made.err and wanted in made.err
    weights = "export/model.safetensors"
    assert (output / weights).read_bytes() == (done.run / weights).read_bytes()
    assert read_seal(output / "export")[0].startswith(wanted)
    # The same command finds it, and another file does not go into the same folder.
    again = replay(done.file, "--model.path", done.base, "--output", output)
    assert again.code == 0 and "found, made from the same inputs" in again.err
    assert json.loads((output / "summary.json").read_text())["replayed"] == found
    assert found["bitwise"] and found["apart"] == 0 and found["seconds"] > 0
    other = replay(done.file, "--model.path", done.base, "--output", done.run)
    assert other.code == 2 and "holds another run's config" in other.err


def test_check_writes_nothing(done, replay):
    before = files_of(done.root)
    made = replay(done.run, "--model.path", done.base, "--check")
    assert made.code == 0 and "equal bit by bit at 3 milestone(s)" in made.err, made.err
    assert files_of(done.root) == before


@pytest.mark.parametrize("effort", ["quickly", "fully"])
def test_programs_are_compiled_as_those_of_the_run(effort, done, replay, monkeypatch):
    made = stored.read(done.file)
    assert made.header["compiled"] == compiling.effort()  # of the tests
    other = made._replace(header=made.header | {"compiled": effort})
    monkeypatch.setattr(stored, "read", lambda path: other)
    calls = []
    monkeypatch.setattr(compiling, "compile_quickly", lambda: calls.append("quickly"))
    found = replay(done.file, "--model.path", done.base, "--check")
    assert found.code == 0, found.err
    assert calls == ([effort] if effort == "quickly" else [])


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--smoke",), ()])
def test_a_run_of_its_own_process_is_replayed_by_another(words, done, tmp_path):
    """Without the settings of the tests, under which everything is compiled quickly."""
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    options = "--train.batch-size 4 --train.optimizer.name mezo --train.steps 7".split()
    tune = ["train.finetune", done.base, done.root / "rows.json", "--output", tmp_path / "run"]
    again = ["train.replay", tmp_path / "run", "--model.path", done.base, "--check"]
    for command in ([*tune, *options, *words], again):
        made = subprocess.run(
            [sys.executable, "-m", *map(str, command)], env=env, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
    assert "equal bit by bit at 1 milestone(s)" in made.stderr


@pytest.mark.parametrize(
    ("steps", "words", "bitwise"),
    [
        (1, ", not compared after step 0 (the next milestone is beyond --steps)", None),
        (3, "equal bit by bit at 1 milestone(s), not compared after step 2 (the next", True),
        (4, "equal bit by bit at 2 milestone(s)\n", True),
    ],
)
def test_the_model_on_the_way(steps, words, bitwise, done, replay, tmp_path):
    argv = done.file, "--model.path", done.base, "--steps", steps
    made = replay(*argv, "--output", tmp_path / "on-the-way")
    assert made.code == 0 and words in made.err, made.err
    found = json.loads((tmp_path / "on-the-way" / "summary.json").read_text())["replayed"]
    assert (found["steps"], found["bitwise"]) == (steps, bitwise)
    file = stored.read(done.file)
    wanted = {mark.step: mark.sha256 for mark in file.milestones}
    assert found["params_sha256"] == wanted.get(steps, found["params_sha256"])
    # Another point of the run does not go into the folder of this one.
    made = replay(*argv[:-1], steps + 1, "--output", tmp_path / "on-the-way")
    assert made.code == 2 and "holds another run's config" in made.err


def refusals(done):
    """Arguments, and what the one line says."""
    damaged = bytearray(done.file.read_bytes())
    damaged[damaged.index(b"\n") + 1 + 4 * 2 + 52 + 4] ^= (
        8  # in the second step of the second block
    )
    (done.root / "damaged.zo").write_bytes(damaged)
    (done.root / "cut.zo").write_bytes(done.file.read_bytes()[:-20])
    (done.root / "other").mkdir(exist_ok=True)
    folders = {}
    for name in ("adamw", "hybrid"):
        folders[name] = done.root / name
        folders[name].mkdir(exist_ok=True)
        config = {"optimizer": {"name": name}}
        if name == "adamw":
            config = {"train": config}
        (folders[name] / "config.json").write_text(json.dumps(config))
    folders["several"] = shutil.copytree(
        folders["adamw"], done.root / "several", dirs_exist_ok=True
    )
    (folders["several"] / "replay-oracle.zo").touch()
    base = ("--model.path", done.base)
    return [
        ((done.root / "damaged.zo", *base, "--check"), "coefficients of step 3 has flipped"),
        ((done.root / "cut.zo", *base, "--check"), "holds 5 of 5 steps"),
        ((done.root / "none", *base, "--check"), "none does not exist"),
        ((done.root / "other", *base, "--check"), "other has no replay.zo: its stage has not"),
        ((folders["several"], *base, "--check"), "no replay.zo, but replay-oracle.zo: give"),
        ((folders["adamw"], *base, "--check"), "a step of optimizer adamw needs more than"),
        ((folders["hybrid"], *base, "--check"), "a step of optimizer hybrid needs more than"),
        ((done.file, "--check"), "--model.path is missing"),
        ((done.file, *base), "either --output DIR, or --check"),
        ((done.file, *base, "--check", "--output", done.root / "x"), "either --output DIR"),
        ((done.file, "--model.path", done.root / "nothing", "--check"), "nothing"),
        ((done.file, "--model.path", done.run / "export", "--check"), "is not the model that"),
        ((done.file, *base, "--check", "--tolerance", "-1"), "--tolerance"),
        ((done.file, *base, "--check", "--steps", STEPS + 1), "has 5; give at most these"),
        ((done.file, *base, "--check", "--steps", 0), "--steps"),
        ((done.file, *base, "--chek"), "did you mean --check?"),
        (("--check", *base), "the first argument is a run folder"),
    ]


def test_what_is_refused(done, replay):
    before = {path for path in files_of(done.root) if path.startswith("x")}
    for argv, words in refusals(done):
        made = replay(*argv)
        assert made.code == 2, (argv, made.err)
        assert words in made.err and made.err.startswith("error: "), (argv, made.err)
        assert made.err.count("\n") == 1, (argv, made.err)
    assert {path for path in files_of(done.root) if path.startswith("x")} == before


def test_help(replay):
    assert "replay.zo" in replay("--help").out
