"""`--stage.cache`: runs that start from the same original and oracle train and judge them once."""

import dataclasses
import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from jaxlib_unlearn.errors import UserError
from train.engine import base_models
from train.engine.run import Run
from train.jobs import job, unlearning, unlearning_stages
from train.options import cli
from train.options.config import RunConfig, StageConfig, identity, replace
from train.presets import PRESETS
from train.runtime import sharding, stages
from train.runtime.tracking import Tracker
from train.tasks import load_task


@pytest.fixture(scope="module")
def config(small) -> RunConfig:
    options = [*small, *"--finetune.steps 2 --unlearn.steps 2 --unlearn.curve-points 0".split()]
    return cli.parse(RunConfig, PRESETS["quickstart"].PRESET, options, "tests", "")


def files(root: Path) -> set[str]:
    return {p.relative_to(root).parts[0] for p in root.rglob("*") if p.is_file()}


def test_a_second_run_takes_the_original_from_the_cache(config, tmp_path, capsys):
    config = replace(config, **{"stage.cache": tmp_path / "cache"})
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)

    def original(root: Path, config: RunConfig = config) -> str:
        root.mkdir()
        run = Run(root, mesh, config.seed, Tracker(root), config.stage.cache)
        return unlearning_stages.finetune(run, config, "original", base, task.retain).sha

    first = original(tmp_path / "one")
    assert "found" not in capsys.readouterr().err
    assert original(tmp_path / "two") == first
    assert "original: found, made from the same inputs" in capsys.readouterr().err
    assert files(tmp_path / "two") == set()
    other = replace(config, **{"finetune.optimizer.learning_rate": 1e-5})
    assert original(tmp_path / "three", other) != first
    assert "found" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "shared"),
    [
        ({}, True),
        ({"objective.name": "npo"}, True),  # with a cache of the reference
        ({"lora.rank": 2}, False),  # its adapters are the run's own
        ({"optimizer.name": "mezo"}, False),  # and so are the coefficients of its steps
    ],
    ids=["ascent", "reference", "adapters", "coefficients"],
)
def test_a_second_run_takes_the_unlearned_model_too(config, tmp_path, capsys, more, shared):
    config = replace(config, **{"stage.cache": tmp_path / "cache", **more})
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    models = []
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        run = Run(root, mesh, config.seed, Tracker(root), config.stage.cache)
        models.append(unlearning_stages.unlearn(run, config, base, task).sha)
    assert models[0] == models[1]
    assert ("unlearned: found" in capsys.readouterr().err) == shared
    assert ("stages" in files(tmp_path / "two")) == (not shared)
    caches = [*(tmp_path / "cache").glob("caches/*.npz")]
    assert bool(caches) == (config.objective.name == "npo")
    assert not [*tmp_path.glob("*/caches/*.npz")] or caches


def test_all_models_are_judged_in_the_cache(tmp_path, monkeypatch):
    """Whoever they are: their logs are found by what they are made from."""
    monkeypatch.setattr(job, "summarize", lambda logs, models, retain_log, roles: {})
    monkeypatch.setattr(job, "compare_logs", lambda root, logs, retain_log, roles: None)
    asked = []
    models = {name: name for name in ("original", "oracle", "unlearned", "attacked:relearn")}
    for name in ("one", "two"):
        run = Run(tmp_path / name, None, 0, Tracker(tmp_path), tmp_path / "cache")
        judged = job.judge(
            run,
            models,
            lambda model, name: {"params": model},
            lambda model, name: asked.append(name) or {"entry": {"agg_value": len(name)}},
        )
        assert {name: log["entry"]["agg_value"] for name, log in judged.logs.items()} == {
            name: len(name) for name in models
        }
    assert asked == [*models]


def test_an_evaluation_is_computed_once_for_two_runs(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"agg_value": 0.5}

    cache = tmp_path / "cache"
    for run in ("one", "two"):
        path = tmp_path / run / "evals" / "oracle.json"
        assert stages.json_stage(path, {"params": "a"}, compute, cache) == {"agg_value": 0.5}
        assert path.exists() and len(calls) == 1
    (kept,) = (cache / "evals").glob("oracle-*.json")
    kept.write_text('{"agg_value": 1.0}')  # not what was computed
    path = tmp_path / "three" / "evals" / "oracle.json"
    assert stages.json_stage(path, {"params": "a"}, compute, cache) == {"agg_value": 0.5}
    stages.json_stage(path, {"params": "b"}, compute, cache)
    assert len(calls) == 3


def test_of_two_runs_that_want_a_stage_one_waits(tmp_path, monkeypatch):
    waiting, order = threading.Event(), []
    monkeypatch.setattr(stages, "say", lambda line: (order.append(line), waiting.set()))

    def second():
        with stages.alone(tmp_path / "stages" / "original-1", "original"):
            order.append("second")

    thread = threading.Thread(target=second)
    with stages.alone(tmp_path / "stages" / "original-1", "original"):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["original: another run is computing it; waiting", "first", "second"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with stages.alone(tmp_path / "stages" / "original-1", "original"):
        assert (tmp_path / "stages").is_dir()


def test_the_cache_is_no_part_of_what_a_run_is(config, tmp_path):
    cached = dataclasses.replace(config, stage=StageConfig(cache=tmp_path))
    assert identity(cached) == identity(config)


def test_a_cache_that_cannot_be_written_is_refused(config, tmp_path, monkeypatch):
    job.check(unlearning.JOB, replace(config, **{"stage.cache": tmp_path / "a" / "b"}))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to; give another folder"):
        job.check(unlearning.JOB, replace(config, **{"stage.cache": tmp_path / "a" / "b"}))


def test_a_cache_that_is_a_file_is_refused(config, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    for given in (path, path / "a" / "b"):
        with pytest.raises(UserError, match=f"--stage.cache: {path} is not a folder"):
            job.check(unlearning.JOB, replace(config, **{"stage.cache": given}))
    with pytest.raises(UserError, match="give another --stage.cache"), stages.alone(path / "a", ""):
        pass
