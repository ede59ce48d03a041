"""Numbers that are arguments of the compiled step: the same steps, one program, several at once."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import objectives
from models.decoder.labels import head_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.engine import base_models, loop
from train.engine.hyper import hyper_of, static_of, traced_fields, traced_step
from train.engine.run import Run
from train.engine.step import init_state, make_step, objective_state
from train.engine.trainable import trainable_of
from train.jobs import unlearning_stages
from train.options.optimizers import OPTIMIZERS, build, over_rows
from train.options.optimizers import options_of as optimizer_of
from train.presets import arguments
from train.runtime.sharding import MeshConfig, make_mesh, put_batch, put_params
from train.runtime.tracking import Tracker
from train.tasks import load_task

CONFIG = DecoderConfig(31, 8, 16, 2, 2, 1, 4)
LEARNER = DecoderLearner(Decoder(CONFIG))
STEPS = 40


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def params(mesh):
    return put_params(LEARNER.decoder.init(jax.random.key(0)), mesh)


def batch(seed, rows=4, length=8, width=4):
    draw = np.random.default_rng(seed)
    index = np.tile(np.arange(length - width, length), (rows, 1))
    return {
        "tokens": draw.integers(2, 31, (rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "label_index": index.astype(np.int32) - 1,
        "targets": draw.integers(2, 31, (rows, width), np.int32),
        "target_mask": np.ones((rows, width), np.float32),
        "row_id": np.arange(rows, dtype=np.int32),
        "ref_log_probs": -3 * draw.random((rows, width), np.float32),
        "ref_hidden": draw.standard_normal((rows, width, 8), np.float32),
        "ref_plain_hidden": draw.standard_normal((rows, width, 8), np.float32),
    }


def problem(mesh, params, name, **options: Any):
    row, settings = objectives.resolve(name, **options)
    training = trainable_of(params, row)
    frozen = head_of(params) if training.frozen is None else training.frozen
    batches = {s: put_batch(batch(i), mesh) for i, s in enumerate(row.streams)}
    return row, settings, frozen, training.binding, batches


def start(mesh, params, tx, row, settings):
    memory = objective_state(LEARNER, row, settings, 3)
    return init_state(jax.tree.map(jnp.array, params), tx, mesh, memory)[0]


def check_same(mesh, params, objective, optimizer, **options):
    """The first step with numbers as arguments is that with numbers in the program."""
    row, settings, frozen, binding, batches = problem(mesh, params, objective, **options)
    tx, schedule, needs = build(optimizer, STEPS)
    state = start(mesh, params, tx, row, settings)
    plain = make_step(LEARNER, row, settings, tx, schedule, needs=needs, binding=binding)
    after, metrics = jax.jit(plain)(state, frozen, batches)
    step = traced_step(LEARNER, row, settings, optimizer, binding=binding)
    got, found = jax.jit(step)(state, hyper_of(settings, optimizer, STEPS), frozen, batches)
    assert set(found) == set(metrics)
    for key in metrics:
        np.testing.assert_allclose(found[key], metrics[key], rtol=2e-6, atol=1e-9, err_msg=key)
    apart = optax.tree.norm(optax.tree.sub(got.params, after.params))
    moved = optax.tree.norm(optax.tree.sub(after.params, state.params))
    assert 0 < moved and apart <= 1e-5 * moved


ROWS = {name: {} for name in objectives.OBJECTIVES if name != "nll"} | {
    "asu": {"push": 0.5, "contrast": 2.0},
    "rmu": {"layer": 1},
    "r2mu": {"block": 1},
}


def few(names, quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", few(ROWS, ("npo", "asu", "alternate", "rmu")))
def test_every_objective(mesh, params, name):
    adamw = optimizer_of("adamw", learning_rate=1e-3, warmup=0.25, eps=1e-2)
    check_same(mesh, params, name, adamw, **ROWS[name])


@pytest.mark.parametrize("name", few(OPTIMIZERS, ("muon", "hybrid")))
def test_every_optimizer(mesh, params, name):
    more = {"group_size": 2} if name == "teon" else {}
    options = optimizer_of(name, learning_rate=1e-3, **more)
    check_same(mesh, params, "npo", over_rows(options, 4))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_schedules_are_those_of_optax(schedule, warmup):
    options = optimizer_of("adamw", learning_rate=3e-4, schedule=schedule, warmup=warmup)
    warm = round(warmup * STEPS)
    after = {
        "constant": optax.constant_schedule(3e-4),
        "linear": optax.linear_schedule(3e-4, 0.0, STEPS - warm),
        "cosine": optax.cosine_decay_schedule(3e-4, STEPS - warm),
    }[schedule]
    rise = optax.linear_schedule(3e-4 / max(warm, 1), 3e-4, max(warm, 1))
    want = optax.join_schedules([rise, after], [warm]) if warm else after
    counts = np.arange(STEPS + 3)
    schedule = build(options, STEPS)[1]
    got = [schedule(i) for i in counts]
    np.testing.assert_allclose(got, [want(i) for i in counts], rtol=1e-5, atol=1e-11)


def test_what_is_an_argument_and_what_is_not():
    _, asu = objectives.resolve("asu")
    assert "push" not in traced_fields(asu) and "temperature" in traced_fields(asu)
    _, pushed = objectives.resolve("asu", push=1.0)
    adamw = optimizer_of("adamw")
    assert static_of(asu, adamw) != static_of(pushed, adamw)
    _, stronger = objectives.resolve("asu", push=2.0, forget_weight=0.3)
    faster = dataclasses.replace(adamw, learning_rate=1.0, warmup=0.5)
    assert static_of(pushed, adamw) == static_of(stronger, faster)
    assert hash(static_of(pushed, adamw)) == hash(static_of(stronger, faster))
    for other in ({"schedule": "cosine"}, {"b1": 0.5}, {"weight_decay": 0.1}):
        assert static_of(pushed, adamw) != static_of(pushed, dataclasses.replace(adamw, **other))


def run_stage(mesh, params, folder, **changes):
    folder.mkdir()
    row, settings = objectives.resolve("simnpo", beta=changes.pop("beta", 2.5), retain="nll")
    host = {s: batch(i) for i, s in enumerate(row.streams)}
    stage = loop.Stage(
        name="x", steps=changes.pop("steps", 3), batches=lambda step: host, objective=row,
        options=settings, optimizer=optimizer_of("adamw", **changes), accumulate=1,
        checkpoints=folder / "checkpoints", checkpoint_seconds=1e9,
    )  # fmt: skip
    return loop.run(stage, LEARNER, params, None, mesh, Tracker(folder))


def test_stages_that_differ_in_numbers_share_a_program(mesh, params, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_COMPILED", {})
    first = run_stage(mesh, params, tmp_path / "a", learning_rate=1e-3)
    found = loop._COMPILED
    assert [len(programs) for programs in found.values()] == [1]
    program = next(iter(next(iter(found.values())).values()))
    other = run_stage(mesh, params, tmp_path / "b", learning_rate=1e-2, beta=4.0, steps=2)
    assert [list(programs.values()) for programs in found.values()] == [[program]]
    assert optax.tree.norm(optax.tree.sub(first, other)) > 0
    run_stage(mesh, params, tmp_path / "c", learning_rate=1e-3, b1=0.5, steps=1)
    assert [len(programs) for programs in found.values()] == [1, 1]
    # and the numbers are those of a program of its own
    monkeypatch.setattr(loop, "_COMPILED", {})
    alone = run_stage(mesh, params, tmp_path / "d", learning_rate=1e-2, beta=4.0, steps=2)
    jax.tree.map(np.testing.assert_array_equal, other, alone)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_several_members_at_once(mesh, params, name):
    """`vmap` over state and numbers gives each member's own steps."""
    rates, betas = (1e-3, 3e-3, 1e-2), (0.1, 0.5, 1.0)
    members = []
    for rate, beta in zip(rates, betas, strict=True):
        row, settings, frozen, binding, batches = problem(mesh, params, "npo", beta=beta)
        optimizer = optimizer_of(name, learning_rate=rate)
        state = start(mesh, params, build(optimizer, STEPS)[0], row, settings)
        step = traced_step(LEARNER, row, settings, optimizer, binding=binding)
        members.append((state, hyper_of(settings, optimizer, STEPS)))
    one = jax.jit(step)
    alone = [one(state, hyper, frozen, batches)[0].params for state, hyper in members]
    states, hypers = (
        jax.tree.map(lambda *xs: jnp.stack(xs), *part) for part in zip(*members, strict=True)
    )
    together, _ = jax.jit(jax.vmap(step, (0, 0, None, None)))(states, hypers, frozen, batches)
    for i, want in enumerate(alone):
        jax.tree.map(
            lambda got, w, i=i: np.testing.assert_allclose(got[i], w, rtol=1e-5, atol=1e-7),
            together.params,
            want,
        )
    assert optax.tree.norm(optax.tree.sub(alone[0], alone[2])) > 0


def test_original_and_oracle_share_their_programs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_COMPILED", {})
    config = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", *small, "--finetune.steps", "4"]
    )
    task, mesh = load_task(config), make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    knows = task.forget + task.retain
    unlearning_stages.finetune(run, config, "original", base, knows)
    (programs,) = loop._COMPILED.values()
    before = dict(programs)
    unlearning_stages.finetune(run, config, "oracle", base, task.retain, knows)
    assert list(loop._COMPILED.values()) == [programs]
    assert set(before) <= set(programs) and len(programs) < 2 * len(before)
    used = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len({line["stage"] for line in used}) == 2
