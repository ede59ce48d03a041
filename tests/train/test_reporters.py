"""`--report-to`: other loggers get the numbers, none is imported unasked, no secret is sent."""

import json
import sys
import types

import pytest

from jaxlib_unlearn.errors import UserError
from train.runtime import reporters
from train.runtime.tracking import Tracker

KEY = "0123456789abcdefghij-secret"


class Fake:
    """A stand-in for the packages `wandb` and `trackio` that records what a run passes to them."""

    def __init__(self, name, mode="offline", logged_in=True):
        self.module = types.ModuleType(name)
        self.module.__spec__ = types.SimpleNamespace(name=name)
        self.started, self.rows, self.summary, self.metrics = {}, [], {}, {}
        self.finished = 0
        self.module.Settings = lambda **options: options
        self.module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
        self.module.login = lambda prompt: logged_in
        self.module.init = self.init

    def init(self, **options):
        print("a banner of the package")
        self.started = options
        return self

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, numbers):
        self.rows.append(numbers)

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    def install(name, **options):
        made = Fake(name, **options)
        monkeypatch.setitem(sys.modules, name, made.module)
        return made

    return install


def test_names():
    assert reporters.chosen("") == reporters.chosen("none") == ()
    assert reporters.chosen("", tensorboard=True) == ("tensorboard",)
    assert reporters.chosen("trackio,wandb,trackio") == ("trackio", "wandb")
    with pytest.raises(UserError, match="--report-to 'wand' is unknown; did you mean 'wandb'"):
        reporters.chosen("wand")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_and_configuration_arrive(fake, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    package = fake(name)
    reporters.check((name,))
    config = {"seed": 3, "data": {"path": f"https://me:{KEY}@host/data"}, "notes": [KEY, "fine"]}
    tracker = Tracker(tmp_path, (name,), config)
    tracker.write("oracle", 4, {"loss": 1.5})
    tracker.write("unlearned", 0, {"loss": 2.5, "forget_probability": 0.5})
    tracker.close({"unlearned": {"forget_rouge": 0.25, "params_sha256": "text"}})
    assert package.rows[:2] == [
        {"oracle/step": 4, "oracle/loss": 1.5},
        {"unlearned/step": 0, "unlearned/loss": 2.5, "unlearned/forget_probability": 0.5},
    ]
    last = package.summary or package.rows[-1]
    assert last == {"unlearned/forget_rouge": 0.25} and package.finished == 1
    assert package.started["name"] == tmp_path.name
    assert package.started["project"] == ("mine" if name == "wandb" else reporters.PROJECT)
    assert package.started["config"]["seed"] == 3
    assert package.started["config"]["notes"] == ["***", "fine"]
    assert KEY not in json.dumps(package.started, default=str)
    # stdout is for a run's own table.
    shown = capsys.readouterr()
    assert shown.out == "" and "banner" in shown.err
    if name == "wandb":
        assert package.metrics["unlearned/*"] == "unlearned/step"
        settings = package.started["settings"]
        assert settings["console"] == "off" and settings["disable_git"]
        assert settings["x_disable_meta"] and not settings["x_save_requirements"]


def test_a_stage_of_any_name_has_its_own_step_counter(fake, tmp_path):
    package, known = fake("wandb"), []
    package.log = lambda numbers: known.append(dict(package.metrics))
    tracker = Tracker(tmp_path, ("wandb",))
    for stage, step in (("original", 0), ("original", 1), ("attacked:relearn", 0)):
        tracker.write(stage, step, {"loss": 1.0})
    one = {"original/*": "original/step"}  # defined before the first numbers of the stage
    assert known == [one, one, one | {"attacked:relearn/*": "attacked:relearn/step"}]


def test_secrets_are_found_by_form():
    for text in ("hf_" + "a" * 20, "ghp_" + "b" * 30, "https://h/x?token=abc", "gs://u:p@bucket"):
        hidden = reporters.public({"a": [text]})["a"][0]
        assert "***" in hidden and not any(part in hidden for part in ("aaa", "bbb", "abc", "u:p"))
    # Digests and ordinary words are kept.
    plain = {
        "revision": "0123456789abcdef" * 2,
        "sha256": "f" * 64,
        "path": "runs/hf_folder",
        "n": 1,
    }
    assert reporters.public(plain) == plain


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = Tracker(tmp_path, ("tensorboard",))
    tracker.write("oracle", 0, {"loss": 1.0})
    tracker.write("attacked:relearn", 0, {"loss": 2.0})
    tracker.close({})
    events = [p.read_bytes() for p in (tmp_path / "tensorboard").iterdir()]
    assert len(events) == 1 and b"oracle/loss" in events[0]
    assert b"attacked_relearn/loss" in events[0]  # its tags have no colons


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = Tracker(tmp_path, ("wandb",), {"seed": 7})
    tracker.write("oracle", 0, {"loss": 1.0})
    tracker.write("attacked:relearn", 0, {"loss": 2.0})
    tracker.close({"unlearned": {"forget_rouge": 0.25}})
    (log,) = tmp_path.rglob("run-*.wandb")
    written = log.read_bytes()
    assert all(name in written for name in (b"oracle/loss", b"forget_rouge", b"seed"))
    assert b"machine_info" not in written and sys.executable.encode() not in written


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    tracker = Tracker(tmp_path / "run", ("trackio",), {"seed": 7})
    tracker.write("oracle", 0, {"loss": 1.0})
    tracker.close({"unlearned": {"forget_rouge": 0.25}})
    found = trackio.Api().runs(reporters.PROJECT)
    assert [run.name for run in found] == ["run"]
    assert [*(tmp_path / "store").rglob("*.db")]


def test_a_log_that_fails_does_not_stop_the_run(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", KEY)
    first, second = fake("wandb"), fake("trackio")

    def log(numbers):
        raise ConnectionError(f"no route for {KEY}")

    first.log = log
    tracker = Tracker(tmp_path, ("wandb", "trackio"))
    for step in range(3):
        tracker.write("unlearned", step, {"loss": 1.0})
    tracker.close({})
    shown = capsys.readouterr().err
    assert shown.count("warning: wandb takes no numbers any more (ConnectionError: no route") == 1
    assert KEY not in shown and str(tmp_path / "metrics.jsonl") in shown
    assert len(second.rows) == 3 and second.finished == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_missing_and_logged_out_are_one_line(fake, monkeypatch, tmp_path):
    for name, (package, _) in reporters.REPORTERS.items():
        monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
        with pytest.raises(UserError, match=f"--report-to {name} needs {package}.*pip install"):
            reporters.check((name,))
    monkeypatch.undo()
    fake("wandb", mode="online", logged_in=False)
    with pytest.raises(UserError, match="nobody is logged in; wandb login, or WANDB_MODE=offline"):
        reporters.check(("wandb",))
    broken = fake("trackio")
    broken.module.init = lambda **options: 1 / 0
    with pytest.raises(UserError, match="--report-to trackio: ZeroDivisionError: .*leave trackio"):
        Tracker(tmp_path, ("trackio",))


@pytest.mark.parametrize("option", [["--report-to", "wandb"], ["--tensorboard"]])
def test_a_run_refuses_before_compute(program, small, tmp_path, monkeypatch, option):
    monkeypatch.setattr("train.engine.loop.run", None)
    known = reporters.importlib.util.find_spec
    monkeypatch.setattr(
        reporters.importlib.util,
        "find_spec",
        lambda name, *more: None if name in ("wandb", "tensorboardX") else known(name, *more),
    )
    folder = tmp_path / "run"
    done = program("train.unlearn", "quickstart", *small, *option, "--output", folder)
    assert done.code == 2 and done.err.count("\n") == 1 and "is not installed" in done.err
    assert not folder.exists()


def test_where_a_run_reports_is_no_part_of_what_it_is():
    import dataclasses

    from train.options.config import RunConfig
    from train.options.config import identity as _identity
    from train.reporting.labels import INCIDENTAL

    config = RunConfig()
    assert _identity(config) == _identity(dataclasses.replace(config, report_to="wandb"))
    assert "report_to" in INCIDENTAL  # seeds that report elsewhere are averaged
