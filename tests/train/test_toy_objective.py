"""A new objective in the files that CONTRIBUTING names: its file, and its module in `table.py`.

The row below stands for the file; the table is patched in the place of the line in `table.py`.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlib_unlearn import losses, objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives.base import Objective, named, no_loss
from jaxlib_unlearn.objectives.retain import Sided, retain_terms
from jaxlib_unlearn.options import option
from train import tasks
from train.engine import base_models
from train.engine.run import Run
from train.jobs import job, unlearning, unlearning_stages
from train.options.config import replace
from train.presets import arguments
from train.runtime import sharding
from train.runtime.tracking import Tracker


@dataclasses.dataclass(frozen=True)
class Toy(Sided):
    """Options of the toy objective."""

    name: str = named("toy")
    aim: float = option(2.0, "NLL that forget answers should have, nats per token.", above=0)


def toy(context, batches, options):
    """``L = f (NLL(forget) - aim)^2 per token + r NLL(retain)``."""
    batch = batches["forget"]
    errors = (-context.model.log_probs(batch) - options.aim) ** 2
    forget = losses.masked_sum(errors, batch["target_mask"])
    return {"forget": forget} | retain_terms(context, batches, options)


QA = ("question", "answer")
ROW = Objective(
    name="toy",
    loss=toy,
    streams=("forget", "retain"),
    columns={"forget": QA, "retain": QA},
    reference={},
    forward={},
    additive=True,
    paper="-",
    options=Toy,
    summary="bring the NLL of forget answers to an aim",
)
ARGV = "quickstart --objective.name toy".split()


def read_arguments(argv):
    return arguments.read_arguments(arguments.UNLEARN, argv)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "toy", ROW)


def test_it_is_on_the_command_line():
    assert read_arguments([*ARGV, "--objective.aim", "1.5"]).objective == Toy(aim=1.5)
    for options, words in (
        ("--objective.aim 0", "aim is 0.0; it must be greater than 0"),
        ("--objective.beta 1", "objective 'toy' does not use beta"),
        ("--objective.retain kk", "'kk' for argument '--objective.retain'"),
    ):
        with pytest.raises(UserError, match=words):
            job.check(unlearning.JOB, read_arguments([*ARGV, *options.split()]))
    assert ROW.summary in "\n".join(objectives.list_objectives())


def test_sides_are_listed_by_their_names():
    row = dataclasses.replace(ROW, sides=("erase", "keep"))
    assert objectives.list_objectives({"toy": row})[0].endswith("(sides erase and keep)")
    assert "  sides      erase and keep" in objectives.describe(row)
    assert "sides" not in objectives.describe(ROW)


def test_it_trains(small, tmp_path):
    """Through the stage that all share: kept, found again, and other options are another stage."""
    smaller = "--unlearn.steps 3 --unlearn.curve-points 0 --optimizer.learning-rate 0.01".split()
    config = read_arguments([*ARGV, *small, *smaller])
    task, mesh = tasks.load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    trained = unlearning_stages.unlearn(run, config, base, task)
    assert trained.sha == unlearning_stages.unlearn(run, config, base, task).sha != base.sha
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    errors = [step["forget_loss"] for step in logged]
    assert len(errors) == 3 and errors[2] < errors[0]
    other = replace(config, **{"objective.aim": 1.0})
    assert unlearning_stages.unlearn(run, other, base, task).sha != trained.sha


def merged(work, *, options, original, base):
    """The mean of the original and the base model."""
    return jax.tree.map(lambda x, y: x + 0.5 * (y - x), original.params, base.params)


def test_a_method_without_training_is_a_row_too(small, tmp_path, monkeypatch):
    row = dataclasses.replace(
        ROW, loss=no_loss, streams=(), columns={}, trains=False, compute=merged
    )
    monkeypatch.setitem(objectives.OBJECTIVES, "toy", row)
    config = read_arguments([*ARGV, *small])
    job.check(unlearning.JOB, config)
    task, mesh = tasks.load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    twice = base._replace(params=jax.tree.map(lambda x: 2 * x, base.params), sha="twice")
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    found = unlearning_stages.unlearn(run, config, twice, task, base)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 1.5 * y), found.params, base.params)
