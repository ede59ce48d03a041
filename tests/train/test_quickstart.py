"""What the quickstart must achieve, on seeds that its defaults were not chosen on (slow)."""

import json
from pathlib import Path

import pytest

from jaxlib_unlearn.metrics import tofu
from train import unlearn
from train.engine import base_models
from train.engine.run import Run
from train.evaluators.evaluation import evaluate_model
from train.jobs import unlearning_stages
from train.options import config_files
from train.options.config import replace
from train.presets import PRESETS
from train.runtime import sharding
from train.runtime.tracking import Tracker
from train.tasks import load_task

pytestmark = pytest.mark.optimised

SEEDS = (3, 4, 5, 6, 7, 8)  # the defaults were chosen on 0, 1, 2


@pytest.fixture(scope="module", params=SEEDS)
def run(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quickstart") / f"seed{request.param}"
    config = replace(
        PRESETS["quickstart"].PRESET, seed=request.param, output=root, **{"mesh.data": 1}
    )
    return unlearn.run(config)


@pytest.mark.slow
def test_forgets_keeps_and_stays_readable(run):
    summary = json.loads((run / "summary.json").read_text())
    original, oracle, mine = (summary[name] for name in ("original", "oracle", "unlearned"))
    assert original["forget_rouge"] >= 0.95
    assert original["forget_quality"] < 0.01
    found = {
        "forget quality above 0.05": (mine["forget_quality"], mine["forget_quality"] > 0.05),
        "unreadable at most 0.1": (mine["forget_unreadable"], mine["forget_unreadable"] <= 0.1),
        "retain ROUGE at least 0.95": (mine["retain_rouge"], mine["retain_rouge"] >= 0.95),
        "forget ROUGE at most 1.2 of the oracle's": (
            mine["forget_rouge"],
            mine["forget_rouge"] <= 1.2 * oracle["forget_rouge"],
        ),
        "privleak within 25 of 0": (mine["privleak"], abs(mine["privleak"]) <= 25),
        "repeated bigrams at most 0.05": (
            mine["repeated_bigram_rate"],
            mine["repeated_bigram_rate"] <= 0.05,
        ),
    }
    print(run.name, {name: round(value, 4) for name, (value, _) in found.items()})
    assert [name for name, (_, held) in found.items() if not held] == []


@pytest.mark.slow
def test_oracle_cannot_be_told_from_a_reseeded_oracle(run):
    config = config_files.read_config(unlearn.RunConfig, run / "config.json")
    other = replace(config, seed=config.seed + 1000, **{"data.seed": config.seed})
    mesh = sharding.make_mesh(other.mesh)
    task = load_task(other)
    root = run / "reseeded"
    root.mkdir()
    base = base_models.base_model(other, task, mesh)
    model = unlearning_stages.finetune(
        Run(root, mesh, other.seed, Tracker(root)), other, "oracle", base, task.retain
    )
    only = task._replace(evaluation={"forget": task.evaluation["forget"]})
    log = evaluate_model(
        model,
        only,
        replace(other.evaluate, leak_samples=0),
        system_prompt=None,
        max_length=other.data.max_length,
        mesh=mesh,
        seed=0,
        name="reseeded",
    )
    assert tofu.forget_quality(log, tofu.load_log(run / "evals" / "oracle.json")).p_value > 0.1
