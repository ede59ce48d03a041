"""The run folder: one run at a time, and any flipped bit is repaired or named, no run is lost."""

import contextlib
import fcntl
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train import evaluate
from train.data import references
from train.engine import base_models, exports
from train.jobs import job, trace_files
from train.options import config_files
from train.options.config import RunConfig, identity
from train.presets import arguments
from train.reporting import tables
from train.runtime import files, folder, seal, sharding, steplog
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import Tracker


def flip(path: Path, rng: random.Random) -> bytes:
    """Flip one bit of a file; returns its previous bytes."""
    before = path.read_bytes()
    data = bytearray(before)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return before


# One run at a time.

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 4711 on \\x1b[31melsewhere\\n")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_says_who_holds_the_folder(program, small, tmp_path):
    root = tmp_path / "run"
    argv = ["quickstart", *small, "--output", str(root)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    judge = [str(tmp_path / "model"), "--output", str(tmp_path / "judged")]
    folder.enter(job.place_of(arguments.read_arguments(arguments.UNLEARN, argv)))
    folder.enter(job.place_of(evaluate.read_arguments(judge)))
    command = [sys.executable, "-c", HOLD, str(root / folder.LOCK)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = sorted(p.name for p in root.iterdir())
        for module, first in (
            ("train.unlearn", argv),
            ("train.evaluate", judge),
        ):
            if module == "train.evaluate":
                (tmp_path / "judged" / folder.LOCK).hardlink_to(root / folder.LOCK)
            done = program(module, *first)
            assert done.code == 2 and done.err.count("\n") == 1, done.err
            assert "is in use by process 4711 on \\x1b[31melsewhere; wait" in done.err
        assert sorted(p.name for p in root.iterdir()) == before
        other.kill()  # kill -9: the file remains, the lock is released
    assert (root / folder.LOCK).exists()
    with folder.locked(root), folder.locked(root):  # a process does not lock itself out
        assert f"process {folder.os.getpid()} on " in (root / folder.LOCK).read_text()
    assert not (root / folder.LOCK).exists()


def test_a_folder_is_claimed_among_the_checks_and_entered_after_them(tmp_path):
    def check(root):
        if (root / "cat.txt").exists():
            raise UserError("somebody's photos")
        return root.exists()

    root = tmp_path / "run"
    place = folder.Place(root, check, lambda where: (where / "made").write_text(""))

    def there():
        return sorted(p.name for p in root.iterdir())

    with contextlib.ExitStack() as held:
        folder.claim(place, held)
        assert not root.exists()  # nothing is written before everything is known to be right
        assert folder.enter(place, held) == root
        assert there() == ["made", folder.LOCK]
    assert there() == ["made"]
    with contextlib.ExitStack() as held:
        folder.claim(place)
        assert there() == ["made"]
        folder.claim(place, held)
        assert there() == ["made", folder.LOCK]  # what exists is locked at once
        folder.enter(place, held)
    (root / "cat.txt").write_text("a cat")
    with contextlib.ExitStack() as held, pytest.raises(UserError, match="photos"):
        folder.claim(place, held)
    assert there() == ["cat.txt", "made"]


def test_the_lock_of_a_run_that_has_just_ended(tmp_path, monkeypatch):
    """It was opened before its holder removed it: the file locked then is no longer in use."""
    real = fcntl.flock
    gone = []

    def flock(file, how):
        real(file, how)
        if not gone:
            gone.append((tmp_path / folder.LOCK).unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.locked(tmp_path):
        assert gone and (tmp_path / folder.LOCK).exists()


def test_the_lock_of_a_run_that_has_just_ended_on_nfs(tmp_path, monkeypatch):
    """A file that is removed while it is open keeps a name there, so links do not tell."""
    real = fcntl.flock
    gone = []

    def flock(file, how):
        real(file, how)
        if not gone:
            (tmp_path / ".nfs0001").hardlink_to(tmp_path / folder.LOCK)
            gone.append((tmp_path / folder.LOCK).unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.locked(tmp_path), (tmp_path / folder.LOCK).open("a") as other:
        with pytest.raises(BlockingIOError):
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(folder.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.locked(tmp_path):
        pass
    assert "no locks on this file system (No locks available)" in capsys.readouterr().err


def test_unfinished_files_are_of_one_process_and_swept(tmp_path):
    names = {files.part_of(tmp_path / "config.json").name}
    code = "from pathlib import Path; from train.runtime import files; "
    code += "print(files.part_of(Path('x')).name)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        names.add(done.stdout.strip().replace("x.", "config.json.", 1))
    assert len(names) == 3 and all(name.endswith(".part") for name in names)
    left = ["config.json.9-ab.part", "caches/a.npz.9-ab.part", "checkpoints/o-1/8.9-ab.part/x"]
    left += ["stages/original-1.9-ab.part/arrays/x", ".export.k3/model.safetensors", "evals/a.part"]
    kept = ["mine.txt", "stages/original-1/manifest.json", "export/model.safetensors"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with folder.locked(tmp_path):
        found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {*kept, folder.LOCK}


# The configuration.


@pytest.fixture
def entered(small, tmp_path):
    """A run folder that was entered once, the run's identity and another run's."""
    config = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", *small, "--output", str(tmp_path / "run")]
    )
    root = folder.enter(job.place_of(config))
    mine = identity(config)
    return root, mine, mine | {"seed": 5}


def test_a_flipped_config_is_set_right_or_named(entered, capsys):
    root, mine, other = entered
    path, rng = root / "config.json", random.Random(0)
    sound = path.read_bytes(), (root / "config.key").read_bytes()
    for trial in range(30):
        flip(root / ("config.json" if trial % 3 else "config.key"), rng)
        with pytest.raises(UserError) as error:
            folder.check_folder(root, other)
        message = str(error.value)
        assert "\n" not in message and "give" in message and "delete the folder" not in message
        if trial % 3:
            for read in (
                lambda: config_files.read_config(RunConfig, path),
                lambda: tables.load_run(root),
            ):
                (root / "summary.json").write_text("{}")
                with pytest.raises(UserError, match=r"config.json is not what the run wrote"):
                    read()
        folder.enter_folder(root, mine)
        assert (path.read_bytes(), (root / "config.key").read_bytes()) == sound
    assert capsys.readouterr().err.count("written again from the options given\n") == 30
    # On another mesh it is the same run.
    assert folder.check_folder(root, mine | {"mesh": {"data": 8}})


@pytest.mark.parametrize("how", ["gone", "cut", "of an earlier version"])
def test_a_config_that_is_gone_or_cut(entered, how, capsys):
    root, mine, other = entered
    path = root / "config.json"
    if how == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:80])
    if how == "of an earlier version":
        (root / "config.key").unlink()
        for identity in (mine, other):
            with pytest.raises(UserError, match="does not read; .* delete this one file: then"):
                folder.check_folder(root, identity)
        path.unlink()  # as that line advises
        (root / "stages" / "original-1").mkdir(parents=True)
        (root / "stages" / "original-1" / "manifest.json").write_text("{}")
        (root / "metrics.jsonl").write_text("")
    else:
        with pytest.raises(UserError, match="these are not the options .* keep what is stored"):
            folder.check_folder(root, other)
    folder.enter_folder(root, mine)
    assert json.loads(path.read_text()) == mine and not files.damaged(path)


def test_a_run_folder_of_an_earlier_version_is_entered(entered):
    root, mine, other = entered
    (root / "config.key").unlink()
    with pytest.raises(UserError, match="holds another run's config .seed: 0 there, 5 here"):
        folder.check_folder(root, other)
    before = (root / "config.json").read_bytes()
    folder.enter_folder(root, mine | {"mesh": {"data": 8}})
    assert (root / "config.json").read_bytes() == before and (root / "config.key").exists()


def test_a_run_that_an_earlier_version_began_is_refused(entered):
    """It wrote the options of all rows; what it had finished is not found under today's keys."""
    root, mine, _ = entered
    (root / "config.key").unlink()
    mine = mine | {"objective": {"name": "npo", "beta": 0.1}, "mesh": None}
    flat = {**mine, "objective": {"name": "npo", "beta": None, "temperature": None}}
    (root / "config.json").write_text(json.dumps(flat))
    with pytest.raises(UserError, match="begun by another version.*give another --output") as error:
        folder.check_folder(root, mine)
    assert "\n" not in str(error.value)
    nested = {"finetune": {"optimizer": {"name": "adamw", "b1": 0.9}}}
    (root / "config.json").write_text(json.dumps({"finetune": {"optimizer": {"name": "adamw"}}}))
    with pytest.raises(UserError, match="begun by another version"):
        folder.check_folder(root, nested)
    (root / "config.json").write_text(json.dumps({**flat, "objective": {"name": "asu"}}))
    with pytest.raises(UserError, match="another run's config"):
        folder.check_folder(root, mine)


# Logs and caches.


def test_a_damaged_log_never_keeps_a_run_from_going_on(tmp_path, capsys):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.bad"
    tracker = Tracker(tmp_path)
    for step in range(6):
        tracker.write("original", step, {"loss": 6.25 / (step + 1), "lr": float("nan")})
    sound = path.read_bytes()
    lines = sound.splitlines()
    rng = random.Random(1)
    for _ in range(60):
        path.write_bytes(sound)
        aside.unlink(missing_ok=True)
        flip(path, rng)
        capsys.readouterr()
        # The page of a finished run leaves the line out; a run that continues sets it aside.
        assert len(steplog.read_steps(path)) >= 4
        Tracker(tmp_path)
        said = capsys.readouterr()
        assert said.err.count("\n") <= 1 and said.err.count("damaged line(s) moved") == bool(
            said.err
        )
        kept = path.read_bytes().splitlines()
        assert aside.exists() == bool(said.err)
        for line in kept:  # every number read is one that was written
            row = steplog.parse_step(line)
            assert row is not None
            written = steplog.parse_step(lines[row["step"]])
            assert written is not None and row["loss"] == written["loss"]
        Tracker(tmp_path).resume("original", 3)
        assert len(path.read_bytes().splitlines()) <= 3
    for text in ("[1]\n", '{"stage": 1, "step": 2}\n', '{"stage": "a"}\n', "[" * 10**5 + "\n"):
        path.write_text(text)
        Tracker(tmp_path)
        assert path.read_bytes() == b""


def test_damage_to_the_checksum_of_a_step_hides_no_other(tmp_path):
    """In a log with checksums a line that has lost its own is damaged, whatever else it holds."""
    path = tmp_path / "metrics.jsonl"
    Tracker(tmp_path).write("original", 0, {"loss": 0.5})
    Tracker(tmp_path).write("original", 1, {"loss": 0.25})
    sound = path.read_bytes()
    bare = b'{"stage": "original", "step": 0, "loss": 0.5}\n'
    for before, after in ((b"0.5", b"0.9"), (b"loss", b"lost")):
        path.write_bytes(sound.replace(before, after, 1).replace(b'"crc"', b'"brc"', 1))
        steps, bad = steplog.split_steps(path)
        assert [row["step"] for _, row in steps] == [1] and [number for number, _ in bad] == [1]
    path.write_bytes(bare)  # of a version without checksums
    assert steplog.split_steps(path) == ([(bare[:-1], json.loads(bare))], [])


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ([0, 1, 2, 3, 4, 5], ""),
        ([1, 2, 3, 4, 5], "1 step(s) of b are missing"),
        ([0, 2, 5, 4], "2 step(s) of b are missing"),
        ([0, 1, 1, 2, 3, 3, 4, 5], "2 line(s) of b stand there twice"),
        ([0, 1, 3, 4, 5, 5], "1 step(s) of b are missing, 1 line(s) of b stand there twice"),
        ([0, 1, 2], "3 step(s) of b are missing"),
        ([], "6 step(s) of b are missing"),
    ],
)
def test_steps_that_are_lost_or_repeated_are_said(tmp_path, capsys, keep, words):
    path = tmp_path / "metrics.jsonl"
    for stage in ("a", "b"):
        for step in range(6):
            Tracker(tmp_path).write(stage, step, {"loss": 1.0})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6], *(lines[6 + step] for step in keep)]))
    Tracker(tmp_path)
    assert (words in capsys.readouterr().err) == (not words or max(keep, default=0) == 5)
    files.key_of(path).write_text(files.key_text(b"".join(lines).decode()))  # the run had ended
    said: list[str] = []
    assert len(steplog.read_steps(path, said.append)) == 6 + len(set(keep))
    assert len(said) == bool(words) and str(path) in (said or [str(path)])[0]
    Tracker(tmp_path).resume("b", 6)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(words) * (2 if max(keep, default=0) == 5 else 1)
    assert not words or f"{path}: {words}; the run goes on" in said[-1]
    assert path.read_bytes().splitlines(keepends=True) == [
        *lines[:6],
        *(lines[6 + step] for step in dict.fromkeys(keep)),
    ]


def test_a_damaged_trace_is_made_again(tmp_path, capsys):
    path = tmp_path / "traces.jsonl"
    trace_files.add(path, 0, ["one", "two", "th\u2028ree"])
    sound = path.read_bytes()
    assert trace_files.kept(path) == ["one", "two", "th\u2028ree"] and path.read_bytes() == sound
    rng = random.Random(3)
    for _ in range(200):
        flip(path, rng)
        found = trace_files.kept(path)
        assert found == ["one", "two", "th\u2028ree"][: len(found)] and len(found) < 3
        path.write_bytes(sound)
    assert "line 2 is damaged" in capsys.readouterr().err
    path.write_text('{"row": 0, "trace": "old"}\n{"row": 1, "tra')  # of an earlier version
    assert trace_files.kept(path) == ["old"] and b"crc" in path.read_bytes()


def test_a_damaged_run_json_is_noticed(tmp_path):
    folder.write_about(tmp_path, {"all": 2.0}, [], {"roles": {"judged": "merged"}})
    path = tmp_path / "run.json"
    assert folder.read_minutes(tmp_path) == {"all": 2.0}
    sound = path.read_bytes()
    for before, after in ((b"2.0", b"3.0"), (b"merged", b"mergee"), (b"judged", b"judgee")):
        path.write_bytes(sound.replace(before, after))
        assert folder.read_minutes(tmp_path) == {}
        about, (note,) = tables._about(path)
        assert about == {} and "run.json is damaged" in note
    files.key_of(path).unlink()  # of an earlier version
    assert tables._about(path)[0]["roles"] == {"judgee": "merged"}


def test_a_damaged_cache_is_computed_again(tmp_path, capsys):
    rng = random.Random(2)
    values = [np.random.default_rng(i).normal(size=(i + 1, 3)).astype(np.float32) for i in (0, 1)]
    path = tmp_path / "forget-hidden-1.npz"
    references._write(path, values)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    noticed = 0
    for _ in range(200):
        before = flip(path, rng)
        found = references._read(path, 2)
        noticed += found is None
        if found is not None:
            assert all(a.tobytes() == b.tobytes() for a, b in zip(found, values, strict=True))
        path.write_bytes(before)
    assert noticed > 100
    said = capsys.readouterr().err.splitlines()
    assert said == [f"cache {path} is damaged; computing it again"] * noticed
    path.write_bytes(path.read_bytes()[:100])
    assert references._read(path, 2) is None and references._read(tmp_path / "none.npz", 2) is None


# The exported model.


def test_a_damaged_export_is_noticed_and_written_again(
    tiny, tmp_path, program, capsys, tofu_folder
):
    mesh = sharding.make_mesh(MeshConfig(1))
    model = base_models.load_model(str(tiny), "none", mesh)
    export = tmp_path / "run" / "export"

    def times():
        return {p.name: p.stat().st_mtime_ns for p in export.iterdir()}

    exports.export_model(model, export, "float32")
    whole, first = files.sums(export), times()
    exports.export_model(model, export, "float32")
    assert times() == first and seal.damage(export) == []
    rng = random.Random(3)
    for name in ("model.safetensors", "config.json", "tokenizer.json", seal.NAME):
        flip(export / name, rng)
        done = program("train.evaluate", export, "--data.path", tofu_folder, "--mesh.data", "1")
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert str(export) in done.err and "export it again" in done.err
        done = program("train.export", export, tmp_path / "copy")
        assert done.code == 2 and not (tmp_path / "copy").exists()
        exports.export_model(model, export, "float32")
        assert files.sums(export) == whole
    (export / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is not what was exported"):
        base_models.load_model(str(export), "none", mesh)
    # Edited on purpose: without the seal it is a model like any other.
    exports.export_model(model, export, "float32")
    (export / seal.NAME).unlink()
    config = json.loads((export / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (export / "config.json").write_text(json.dumps(config))
    assert base_models.load_model(str(export), "none", mesh).decoder.config.norm_eps == 0.5


# What is shown.

NAMES = ("a\x1b[31mred\x07", "[red]x[/red] [/nope]", "b\nc\u202ed", "50% & $x_1$ {y}")


def test_control_bytes_and_markup_in_names_are_text(tmp_path, capsys):
    from train import report

    for i, name in enumerate(NAMES):
        root = tmp_path / f"run{i}"
        root.mkdir()
        config = {"preset": name, "seed": name, "objective": {"name": name}}
        (root / "config.json").write_text(json.dumps(config))
        scores = {"forget_rouge": 0.5, name: 0.25, "retain_rouge": 0.75}
        (root / "summary.json").write_text(json.dumps({"unlearned": scores, name: scores}))
    roots = [str(tmp_path / f"run{i}") for i in range(len(NAMES))]
    table, tex = tmp_path / "t.csv", tmp_path / "t.tex"
    argv = [*roots, "--all", "--csv", str(table), "--latex", str(tex)]
    assert report.main(argv) == 0
    assert report.main(roots[:1]) == 0
    out = capsys.readouterr()
    for text in (out.out, out.err, table.read_text(), tex.read_text()):
        odd = {c for c in text if not c.isprintable() and c != "\n"}
        assert not odd and "\u202e" not in text
    assert "[red]x[/red] [/nope]" in out.out and "a\\x1b[31mred\\x07" in out.out
    assert report.main([str(tmp_path / "no\x1b[2Jrun")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no run folder {tmp_path}/no\\x1b[2Jrun")


def test_control_bytes_of_an_argument_do_not_reach_the_terminal(program):
    done = program("train.unlearn", "quick\x1b[31m\x9bstart\u202e")
    assert done.code == 2 and "\x1b" not in done.err and "\x9b" not in done.err
    assert "\\x1b" in done.err and "\u202e" not in done.err
