"""The stage of train.pretrain against what is known: an entropy rate, kills, devices, Muon."""

import itertools
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from models import Decoder, DecoderConfig
from train.data.streams import batches_of
from train.data.token_file import Tokens, sha_of
from train.data.token_rows import TokenRows
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.evaluators.evaluation import Model
from train.evaluators.token_loss import mean_loss, row_losses
from train.options.config import TrainConfig
from train.options.optimizers import options_of
from train.runtime import distributed
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker

STATES, CONTEXT = 12, 32


def chain(seed, documents, length):
    """Documents drawn from one 2-gram chain, and its entropy rate in nats a token."""
    matrix = np.random.default_rng(7).dirichlet(np.full(STATES, 0.4), STATES)
    stationary = np.linalg.matrix_power(matrix, 200)[0]
    rate = -float(stationary @ (matrix * np.log(np.maximum(matrix, 1e-300))).sum(1))
    draw = np.random.default_rng(seed)
    cumulative = matrix.cumsum(1)
    states = np.zeros((documents, length), int)
    states[:, 0] = draw.choice(STATES, documents, p=stationary)
    for t in range(1, length):
        states[:, t] = (draw.random(documents)[:, None] > cumulative[states[:, t - 1]]).sum(1)
    tokens = np.minimum(states, STATES - 1).reshape(-1).astype(np.uint16)
    starts = np.arange(0, tokens.size, length, dtype="<i8")
    return TokenRows(Tokens(tokens, starts, sha_of(tokens, starts)), CONTEXT), rate


LEARNER = Decoder(DecoderConfig(64, 32, 64, 2, 2, 2, 16, max_position_embeddings=CONTEXT))


def base() -> Any:
    return Model(LEARNER, LEARNER.init(jax.random.key(0)), None, "random weights")


def train(folder, rows, optimizer, *, steps, batch=16, sizes=(1, 1, 1), accumulate=1, save=120.0):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    run = Run(folder, mesh, 0, Tracker(folder))
    stage = TrainConfig(
        steps=steps, batch_size=batch, accumulate=accumulate, optimizer=optimizer,
        checkpoint_seconds=save,
    )  # fmt: skip
    objective = objectives.resolve("nll")
    trained = runs.train(run, "pretrained", base(), objective, {"train": rows},
                         Recipe(stage, optimizer))  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trained, lines, mesh


ADAMW = options_of("adamw", learning_rate=1e-2, schedule="linear", warmup=0.05, b2=0.95)


def test_a_chain_is_learnt_to_its_entropy_rate(tmp_path):
    """Held-out documents cost what they must: less would be cheating, more is not learnt."""
    rows, rate = chain(0, 400, 75)  # documents end inside rows
    held_out, _ = chain(1, 80, 75)
    trained, lines, mesh = train(tmp_path, rows, ADAMW, steps=240)
    assert len(rows) < 240 * 16  # several epochs
    loss = mean_loss(row_losses(trained, held_out, np.arange(len(held_out)), mesh, 4096))
    assert abs(loss - rate) < 0.03, (loss, rate)
    assert lines[0]["loss"] > rate + 1 and lines[0]["train_loss"] == lines[0]["loss"]


SHORT = chain(2, 20, 40)[0]  # 25 rows
FEW = options_of("adamw", learning_rate=1e-2, schedule="hold", warmup=0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), SHORT, FEW, steps=9, batch=4, save=0.0)


def test_five_kills_change_nothing_and_every_row_is_seen_once(undisturbed, tmp_path, monkeypatch):
    trained, lines, _ = undisturbed
    checkpoints = 0
    for stop in (1, 2, 2, 1, 2):  # steps taken before each
        asked = itertools.count(0)
        with monkeypatch.context() as patch, pytest.raises(distributed.Preempted):
            patch.setattr(distributed, "asked_to_stop", lambda a=asked, s=stop: next(a) == s)
            train(tmp_path, SHORT, FEW, steps=9, batch=4, save=0.0)
        checkpoints += len(list((tmp_path / "checkpoints").rglob("manifest.json")))
    assert checkpoints >= 5
    again, found, _ = train(tmp_path, SHORT, FEW, steps=9, batch=4, save=0.0)
    assert again.sha == trained.sha and found == lines
    assert [line["step"] for line in found] == list(range(9))
    load = batches_of({"train": SHORT}, "train", runs.seed_of(0, "pretrained"), 4)
    rows = np.concatenate([load(step)["train"]["row_id"] for step in range(9)])
    assert sorted(rows[:25].tolist()) == list(range(25)) and len(set(rows[25:].tolist())) == 11


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "accumulate"), [((2, 1, 1), 2), ((2, 2, 1), 1)])
def test_the_numbers_do_not_depend_on_devices_or_micro_batches(
    undisturbed, tmp_path, sizes, accumulate
):
    _, lines, _ = undisturbed
    _, found, _ = train(tmp_path, SHORT, FEW, steps=3, batch=4, sizes=sizes, accumulate=accumulate)
    for line, want in zip(found[:1], lines, strict=False):
        np.testing.assert_allclose(line["loss"], want["loss"], rtol=1e-6)
        np.testing.assert_allclose(line["grad_norm"], want["grad_norm"], rtol=1e-5)


def test_teon_of_one_block_is_muon_bit_by_bit(tmp_path):
    same = {
        "learning_rate": 2e-2, "adam_learning_rate": 1e-2, "shape_scale": "spectral",
        "orthogonalize": "polar_express", "nesterov": False, "weight_decay": 0.1,
    }  # fmt: skip
    found = {}
    for name, own in (("muon", {}), ("teon", {"group_size": 1})):
        folder = tmp_path / name
        folder.mkdir()
        trained, lines, _ = train(folder, SHORT, options_of(name, **same, **own), steps=3, batch=4)
        found[name] = trained.sha, lines
    assert found["muon"] == found["teon"]
