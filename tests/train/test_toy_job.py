"""A job in the files that CONTRIBUTING names: its own, a preset, a reader's row, a program."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from train.engine.run import compute, phase
from train.evaluators import EVALUATORS
from train.evaluators.base import Evaluator, Metric
from train.jobs import job
from train.jobs.job import Fitted, Job, Started
from train.options.config import ProgramConfig
from train.options.roles import Roles
from train.presets import arguments
from train.runtime.stages import digest

# train/jobs/toy.py: its options, what it reads, its stage, and its walk.


@dataclasses.dataclass(frozen=True)
class ToyRun(ProgramConfig):
    """A mean that is learned."""

    rows: int = option(8, "This many numbers are drawn.", low=2)
    shrink: float = option(1.0, "The mean is multiplied by this factor.", low=0)


class ToyRows(NamedTuple):
    numbers: list[float]

    def digest(self) -> str:
        return digest(self.numbers)


class ToyModel(NamedTuple):
    params: Any
    sha: str

    def to_host(self) -> "ToyModel":
        return self

    def identity(self) -> dict[str, Any]:
        return {"params": self.sha}


def model_of(mean: float) -> ToyModel:
    return ToyModel({"mean": np.float32(mean)}, digest(mean))


def learn(work: Any, numbers: list[float], shrink: float) -> float:
    """The stage: a function of a module, found again by what it is made from."""
    return shrink * float(np.mean(numbers))


def check(config: ToyRun, mesh: Any) -> None:
    if config.shrink == 0:
        raise UserError("--shrink 0 leaves nothing; give a larger factor")


def load(config: ToyRun) -> ToyRows:
    return ToyRows(np.random.default_rng(config.seed).normal(1, 1, config.rows).tolist())


def fit(config: ToyRun, rows: ToyRows, model: ToyModel, mesh: Any) -> Fitted:
    return Fitted(rows, f"{config.rows} numbers", ["They were drawn."], ["toy"])


ROLES = Roles("base", "oracle", "learned", against={"attacked": "attacked oracle"})
JOB = Job("train.toy", ROLES, check, load, lambda config, rows, mesh: model_of(0.0), fit)


def run(config: ToyRun, command: str = "") -> Path:
    with job.start(JOB, config, command) as started:
        models = {"base": started.model, "learned": learned(started, config.shrink)}
        models |= {"oracle": model_of(1.0), "attacked oracle": model_of(2.0)}
        models["attacked"] = model_of(2.5)
        judged = job.judge(started.run, models, lambda model, name: model.identity(), log)
        job.export(started.run, lambda folder: folder.mkdir(exist_ok=True))
        return job.end(started.run, judged.summary)


def learned(started: Started, shrink: float) -> ToyModel:
    with phase(started.run, "learned"):
        numbers = started.rows.numbers
        mean = compute(
            started.run, "mean", learn, kind="mean", version=1, numbers=numbers, shrink=shrink
        )
    return model_of(mean)


def log(model: ToyModel, name: str) -> dict[str, Any]:
    return {"toy_mean": {"agg_value": float(model.params["mean"]), "value_by_index": {}}}


def over(log: Any, other: Any) -> dict[str, Any]:
    """The mean, and how far it is above that of the model that it is held to."""
    mean = log["toy_mean"]["agg_value"]
    return {"toy_mean": mean} | (
        {} if other is None else {"toy_gap": mean - over(other, None)["toy_mean"]}
    )


# train/presets/toy.py, and the row of train/presets/arguments.py.

PRESET = SimpleNamespace(PRESET=ToyRun(preset="toy"), SUMMARY="a mean", SMOKE={"rows": 4})
READER = arguments.Reader(ToyRun, {"toy": PRESET})


# train/toy.py.


def main(argv: list[str]) -> Path:
    config = arguments.read_arguments("train.toy", argv)
    return run(config, arguments.command("train.toy", config))


@pytest.fixture
def toy(monkeypatch):
    metrics = (Metric("toy_mean", "Mean", "the mean."), Metric("toy_gap", "Gap", "the gap."))
    row = Evaluator("toy", lambda *args: {}, metrics, summarize=over)
    rows = {name: row for name, row in EVALUATORS.items() if name == "perplexity"} | {"toy": row}
    monkeypatch.setattr("train.evaluators.evaluation.EVALUATORS", rows)
    monkeypatch.setitem(EVALUATORS, "toy", row)
    monkeypatch.setitem(arguments.READERS, "train.toy", READER)


def test_a_job_runs_from_its_command_line_to_its_page(toy, tmp_path, capsys):
    cache, argv = tmp_path / "cache", ["toy", "--smoke", "--rows", "6", "--mesh.data", "1"]
    roots = [
        main([*argv, "--stage.cache", str(cache), "--output", str(tmp_path / n)]) for n in "ab"
    ]
    summaries = [json.loads((root / "summary.json").read_text()) for root in roots]
    assert summaries[0] == summaries[1]
    mean = float(np.float32(np.mean(np.random.default_rng(0).normal(1, 1, 6))))
    found = summaries[0]
    assert found["learned"]["toy_mean"] == mean
    # Each is held to the model that the roles name.
    assert found["learned"]["toy_gap"] == mean - 1 and found["attacked"]["toy_gap"] == 0.5
    about = json.loads((roots[0] / "run.json").read_text())
    assert about["program"] == "train.toy" and about["roles"]["against"] == ROLES.against
    assert about["notes"] == ["They were drawn."] and "6 numbers, seed 0" in capsys.readouterr().err
    assert "python -m train.toy toy" in (roots[0] / "report.html").read_text()
    assert {path.parent.name for path in cache.rglob("*.json")} == {"computed", "evals"}


def test_a_job_refuses_before_it_makes_a_folder(toy, tmp_path):
    for words, options in {
        "--shrink 0 leaves": ["--shrink", "0"],
        "--rows is 1; it must be at least 2": ["--rows", "1"],
        "option --row is unknown; did you mean --rows": ["--row", "3"],
    }.items():
        with pytest.raises(UserError, match=words):
            main(["toy", *options, "--output", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())
