"""`--profile DIR`: a trace of a few steps, and a message when there is none."""

import contextlib
import dataclasses

import pytest

from jaxlib_unlearn.errors import UserError
from train.engine import base_models
from train.engine.run import Run
from train.jobs import job, unlearning, unlearning_stages
from train.options import cli
from train.options.config import RunConfig
from train.options.config import identity as _identity
from train.presets import PRESETS
from train.runtime import sharding
from train.runtime.tracking import Tracker
from train.tasks import load_task


@pytest.fixture(scope="module")
def start(small):
    options = [*small, *"--unlearn.steps 6 --unlearn.curve-points 0".split()]
    config = cli.parse(RunConfig, PRESETS["quickstart"].PRESET, options, "tests", "")
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    return config, base_models.base_model(config, task, mesh), task, mesh


def unlearn(start, root, **changes):
    config, base, task, mesh = start
    root.mkdir(exist_ok=True)
    config = dataclasses.replace(config, **changes)
    return unlearning_stages.unlearn(
        Run(root, mesh, config.seed, Tracker(root)), config, base, task
    )


def test_a_trace_and_the_same_model(start, tmp_path, capsys):
    plain = unlearn(start, tmp_path / "plain")
    traced = unlearn(start, tmp_path / "traced", profile=tmp_path / "trace")
    assert traced.sha == plain.sha
    assert [p for p in (tmp_path / "trace").rglob("*.xplane.pb") if p.stat().st_size > 0]
    assert "trace of a few steps" in capsys.readouterr().err
    # Finished already: nothing runs, which is reported.
    unlearn(start, tmp_path / "traced", profile=tmp_path / "again")
    assert "nothing traced, stage unlearned was done already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_too_few_steps(start, tmp_path, capsys):
    config = start[0]
    few = dataclasses.replace(config.unlearn, steps=2)
    unlearn(start, tmp_path / "run", unlearn=few, profile=tmp_path / "trace")
    assert "nothing traced, the stage had no third step" in capsys.readouterr().err


def test_progress_hears_of_compilations(start, tmp_path, monkeypatch):
    """Otherwise a program compiled on the way would count as slow steps in the ETA."""
    heard = []

    @contextlib.contextmanager
    def progress(label, total, done=0):
        yield lambda n, note, compiling: heard.append(compiling)

    monkeypatch.setattr("train.engine.loop.progress", progress)
    unlearn(start, tmp_path / "run")
    assert len(heard) == 6 and heard[0] > 0 and min(heard) == 0.0


def test_it_is_no_part_of_the_run(start, tmp_path):
    config = start[0]
    assert _identity(config) == _identity(dataclasses.replace(config, profile=tmp_path))


def test_a_folder_that_cannot_be(start, tmp_path):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(start[0], profile=tmp_path / "file")
    with pytest.raises(UserError, match="--profile .*file cannot be written: .*another folder"):
        job.check(unlearning.JOB, config)
