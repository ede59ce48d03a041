"""The same numbers on any mesh and for any number of micro-batches; the cost of a step.

Objectives are compared at the gradient, optimizers on a fixed gradient, one stage as a whole.
"""

import functools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import OBJECTIVES
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder.labels import head_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from models.learner import Frozen
from train.costs.hlo_flops import device_flops
from train.data.examples import Example
from train.data.references import with_references
from train.data.streams import Examples, batches_of, make_stream, pack_streams
from train.engine import loop
from train.engine.replays import coefficients
from train.engine.run import Recipe, Run, train
from train.engine.step import (
    Losses,
    compile_step,
    init_state,
    make_step,
    objective_state,
    split_batch,
)
from train.engine.trainable import trainable_of
from train.evaluators.evaluation import Model
from train.options import optimizers
from train.options.config import UnlearnConfig
from train.options.optimizers import OPTIMIZERS, build
from train.runtime import sharding
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker

DECODER = Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4))
LEARNER = DecoderLearner(DECODER)
STEPS, ROWS, SEED = 6, 16, 3
ALTERNATES = 3  # answers per forget question
ADAMW = optimizers.options_of("adamw", learning_rate=2e-3)


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


@pytest.fixture(scope="module")
def start():
    """Parameters with which every block and token matters and predictions are far from uniform."""
    draw = np.random.default_rng(0)

    def one(path, leaf):
        noise = draw.standard_normal(leaf.shape, np.float32)
        if sharding.path_str(path).endswith("scale"):
            return 1 + 0.1 * noise
        return noise * np.float32(0.4 if leaf.shape[0] == 64 else leaf.shape[-2] ** -0.5)

    return jax.tree_util.tree_map_with_path(one, DECODER.shapes())


@pytest.fixture(scope="module")
def plain():
    """Streams of unequal rows: any split into micro-batches has unequal numbers of labels."""
    draw = np.random.default_rng(0)

    def stream(count):
        sizes = [(int(draw.integers(3, 8)), int(draw.integers(1, 9))) for _ in range(count)]
        rows = [Example(draw.integers(2, 64, p + a).tolist(), p) for p, a in sizes]
        return make_stream(rows, 0, buckets=1)

    forget = stream(20)
    # Each refusal answers the question of its forget row.
    refusals = [
        Example(e.tokens[: e.num_prompt] + draw.integers(2, 64, 4).tolist(), e.num_prompt)
        for e in forget.examples
    ]
    streams = {
        "forget": forget,
        "retain": stream(30),
        "idk": make_stream(refusals, 0, buckets=1, follows="forget"),
        "train": stream(40),
    }
    alternates = [
        Example(e.tokens[: e.num_prompt] + draw.integers(2, 64, 3 + k).tolist(), e.num_prompt)
        for e in forget.examples
        for k in range(ALTERNATES)
    ]
    streams["alternate"] = make_stream(alternates, 0, buckets=1, follows="forget")
    streams["traces"] = replace(stream(20), follows="forget")
    return streams | {"cot": stream(30)}


def distance(a, b):
    """``||a - b|| / ||b||`` over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    off = sum(np.sum(np.square(np.float64(x) - np.float64(y))) for x, y in pairs)
    return float(np.sqrt(off / sum(np.sum(np.square(np.float64(y))) for _, y in pairs)))


# One stage as a whole.


class Seen(NamedTuple):
    """Record of a stage: row ids by step and stream, losses, first gradient, last parameters."""

    rows: list
    losses: list
    gradient: dict
    params: dict


def run_stage(name, sizes, accumulate, start, plain, folder):
    """Six steps through the pieces of the program; the first gradient is AdamW's first moment."""
    mesh = mesh_of(*sizes)
    row, options = objectives.resolve(objective_of(name))
    params = sharding.put_params(start, mesh)
    streams = {stream: plain[stream] for stream in row.streams}
    ready = with_references(streams, row, options, DECODER, params, "start", mesh, folder)
    tx, schedule, _ = build(ADAMW, STEPS)
    batches = batches_of(ready, row.streams[0], SEED, ROWS)
    seen = {"rows": [], "gradient": None}

    def watched(step, shardings, mesh):
        jitted = compile_step(step, shardings, mesh)

        def compiled(*args):
            assert not programs  # one shape: one compilation
            programs.append(jitted.lower(*args).compile())
            call.memory_analysis = programs[0].memory_analysis
            return call

        programs = []

        def call(state, hyper, frozen, batches):
            seen["rows"].append({n: np.asarray(b["row_id"]).tolist() for n, b in batches.items()})
            state, metrics = programs[0](state, hyper, frozen, batches)
            if seen["gradient"] is None:
                mu = optax.tree.get(state.opt_state, "mu")
                seen["gradient"] = jax.tree.map(lambda x: np.array(x) / (1 - ADAMW.b1), mu)
            return state, metrics

        return SimpleNamespace(
            lower=lambda *args: SimpleNamespace(compile=lambda **options: compiled(*args))
        )

    stage = loop.Stage(
        name, STEPS, batches, row, options, ADAMW, accumulate, folder / "checkpoints", 1e9
    )
    frozen = head_of(params) if "hidden" in row.reference.values() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", watched)
        patch.setattr(loop, "_COMPILED", {})
        params = loop.run(stage, LEARNER, params, frozen, mesh, Tracker(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    return Seen(seen["rows"], [x["loss"] for x in lines], seen["gradient"], jax.device_get(params))


@pytest.fixture(scope="module")
def one_device(start, plain, tmp_path_factory):
    """The stages on one device without micro-batches."""
    return {
        name: run_stage(name, (1, 1, 1), 1, start, plain, tmp_path_factory.mktemp(name))
        for name in ("asu", "npo")
    }


@pytest.mark.parametrize(
    ("name", "sizes", "accumulate"),
    [
        pytest.param("asu", (1, 1, 1), 4, marks=pytest.mark.slow),  # as four on a mesh, below
        pytest.param("asu", (1, 1, 2), 2, marks=pytest.mark.slow),
        ("asu", (1, 2, 2), 4),
        ("asu", (2, 2, 2), 1),
        pytest.param("npo", (2, 2, 1), 2, marks=pytest.mark.slow),
        ("npo", (1, 8, 1), 2),
        ("npo", (8, 1, 1), 1),
    ],
)
def test_stage_gives_the_same_numbers(name, sizes, accumulate, one_device, start, plain, tmp_path):
    seen = run_stage(name, sizes, accumulate, start, plain, tmp_path)
    expected = one_device[name]
    assert seen.rows == expected.rows
    assert distance(seen.gradient, expected.gradient) <= 1e-6
    np.testing.assert_allclose(seen.losses, expected.losses, rtol=1e-5)
    assert distance(seen.params, expected.params) <= 1e-4


def test_stage_walks_an_epoch_and_learns(one_device, plain):
    """The comparison above is not trivial: rows differ by step, the loss falls, gradients exist."""
    for name, seen in one_device.items():
        assert len({tuple(rows["forget"]) for rows in seen.rows}) == STEPS, name
        walked = [row for rows in seen.rows for row in rows["forget"]]
        assert sorted(walked[:20]) == list(range(20))  # a whole epoch before any row comes again
        assert {i for rows in seen.rows for i in rows["retain"]} <= set(range(30))
        assert seen.losses[-1] < seen.losses[0]
        assert all(np.any(leaf) for leaf in jax.tree.leaves(seen.gradient))


def test_refusals_follow_their_questions(plain):
    """Row b of `idk` answers the question in row b of `forget`, at every step and across epochs."""
    streams = {name: plain[name] for name in ("forget", "idk", "retain")}
    batches = batches_of(streams, "forget", SEED, ROWS)
    for step in range(3):
        batch = batches(step)
        assert np.array_equal(batch["idk"]["row_id"], batch["forget"]["row_id"])
        assert not np.array_equal(batch["retain"]["row_id"], batch["forget"]["row_id"])
        again = batches_of(streams, "forget", SEED, ROWS)(step)  # no state is carried over
        assert all(np.array_equal(again[n][c], batch[n][c]) for n in batch for c in batch[n])
    alone = batches_of({"idk": plain["idk"], "retain": plain["retain"]}, "idk", SEED, ROWS)(0)
    assert sorted(alone["idk"]["row_id"])[0] >= 0 and len(set(alone["idk"]["row_id"])) == ROWS


def test_alternates_of_a_question_take_turns(plain):
    """At every step a forget row is paired with one of its alternates, all of them in turn."""
    batches = batches_of({n: plain[n] for n in ("forget", "alternate")}, "forget", SEED, ROWS)
    turns = set()
    for step in range(2 * ALTERNATES):
        batch = batches(step)
        asked, turn = np.divmod(batch["alternate"]["row_id"], ALTERNATES)
        assert np.array_equal(asked, batch["forget"]["row_id"]) and len(set(turn)) == 1
        turns.add(int(turn[0]))
    assert turns == set(range(ALTERNATES))


# Objectives at the gradient.


def configured(name, **options):
    """A row's options, of blocks that the model has."""
    return objective_of(name, **options, **({"block": 1} if name in ("rmu", "r2mu") else {}))


CONFIGS = [
    *(configured(name) for name in OBJECTIVES),
    objective_of("graddiff", retain="kl", forget_weight=0.3, retain_weight=2.0),
    objective_of("idk", compat="tofu_concat"),
    objective_of("asu", push=1.0, contrast=1.0),
]


def label(config):
    more = "contrast" if getattr(config, "contrast", 0) else None
    parts = (config.name, config.compat, getattr(config, "retain", None), more)
    return "-".join(x for x in parts if x)


def gradient_of(config, sizes, accumulate, start, plain, together=1):
    """Metrics and gradient of the first batch, with made-up references (the same in both runs)."""
    row, options = objectives.resolve(config)
    mesh = mesh_of(*sizes)
    draw = np.random.default_rng(1)
    streams = {}
    for name in row.streams:
        labels = [len(e.tokens) - e.num_prompt for e in plain[name].examples]
        columns = {
            "ref_log_probs": [-2 * draw.random(n, np.float32) for n in labels],
            "ref_hidden": [draw.standard_normal((n, 16), np.float32) for n in labels],
            "ref_plain_hidden": [draw.standard_normal((n, 16), np.float32) for n in labels],
        }
        streams[name] = replace(plain[name], references=columns)
    if together > 1 and row.packable:
        streams = pack_streams(streams, ROWS, together, length=10**6)
        assert all(stream.packing.together == together for stream in streams.values())
    host = batches_of(streams, row.streams[0], SEED, ROWS)(0)
    batches = {name: sharding.put_batch(batch, mesh) for name, batch in host.items()}
    params = sharding.put_params(start, mesh)
    training = trainable_of(params, row)
    memory = objective_state(LEARNER, row, options, SEED)

    @jax.jit
    def run(params, frozen, batches):
        losses = Losses(
            LEARNER, row, options, params, frozen, batches, accumulate, training.binding,
            state=memory,
        )  # fmt: skip
        return losses.gradients(params)

    args = (params, head_of(params) if training.frozen is None else training.frozen, batches)
    return jax.device_get(run.lower(*args).compile()(*args))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_every_objective_has_the_same_gradient(config, start, plain):
    """One device and batch, one row each, against eight, two micro-batches, two examples per row.

    `asu`: also with devices and micro-batches separately.
    """
    metrics, gradient = gradient_of(config, (1, 1, 1), 1, start, plain)
    assert all(np.isfinite(value) for value in metrics.values())
    alone = [((1, 1, 1), 2, 1), ((2, 2, 2), 1, 1)] if config == objective_of("asu") else []
    for sizes, accumulate, together in [((2, 2, 2), 2, 2), *alone]:
        other, grads = gradient_of(config, sizes, accumulate, start, plain, together)
        assert distance(grads, gradient) <= 1e-6, (sizes, accumulate, together)
        assert metrics.keys() == other.keys()
        for key, value in metrics.items():
            assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, sizes, accumulate)


# Forms whose value depends on the split or on the padding, against loops in float64.


@jax.jit
def logits_of(params, tokens, positions, segment_ids):
    hidden, _ = DECODER.forward(params, tokens, positions=positions, segment_ids=segment_ids)
    return DECODER.unembed(params, hidden)


def label_values(batch, params, ref=None):
    """Per example: (NLL of its labels, KL(ref || params) at every slot of its padded row)."""
    segments = np.where(batch["segment_ids"] == 0, -1, batch["segment_ids"])
    slots = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)

    def log_probs(tree):
        logits = np.asarray(logits_of(tree, batch["tokens"], slots, segments), np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    mine, other = log_probs(params), None if ref is None else log_probs(ref)
    for b in range(len(segments)):
        labels = int(batch["target_mask"][b].sum())
        places, targets = batch["label_index"][b][:labels], batch["targets"][b][:labels]
        nll = -mine[b][places, targets]
        kl = None if other is None else (np.exp(other[b]) * (other[b] - mine[b])).sum(-1)
        yield nll, kl


MEAN_OF_MEANS = objective_of("graddiff", retain_weight=2.0, compat="mean_of_means")


@pytest.fixture(scope="module")
def micro_batches(start, plain):
    """Losses of four micro-batches, of one, and the mean of the gradients of four steps."""
    row, _ = objectives.resolve(MEAN_OF_MEANS)
    host = batches_of({n: plain[n] for n in row.streams}, "forget", SEED, ROWS)(0)

    def mean_of_means(name, params):
        values = [nll for nll, _ in label_values(host[name], params)]
        parts = [np.concatenate(values[a::4]) for a in range(4)]  # rows are dealt in turn
        return np.mean([part.mean() for part in parts]), np.concatenate(values).mean()

    # The gradient is that of the mean of four steps' losses.
    parts = split_batch({n: jax.tree.map(jnp.asarray, b) for n, b in host.items()}, 4)
    ordinary = objectives.resolve(replace(MEAN_OF_MEANS, compat=None))

    @jax.jit
    def gradient(params, batches):
        return Losses(LEARNER, *ordinary, params, None, batches, 1).grad(params)

    grads = [gradient(start, jax.tree.map(lambda x, a=a: x[a], parts)) for a in range(4)]
    mean = jax.tree.map(lambda *g: sum(g) / 4, *jax.device_get(grads))
    whole, _ = gradient_of(MEAN_OF_MEANS, (1, 1, 1), 1, start, plain)
    return mean_of_means("forget", start), mean_of_means("retain", start), mean, whole


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1)])
def test_mean_of_means_is_that_of_the_micro_batches(sizes, micro_batches, start, plain):
    """GradDiff: the mean over four micro-batches of each one's token means, on any mesh."""
    metrics, gradient = gradient_of(MEAN_OF_MEANS, sizes, 4, start, plain)
    (forget, _), (retain, plain_mean), mean, whole = micro_batches
    assert abs(retain - plain_mean) > 1e-3  # unequal numbers of labels: it is another number
    assert metrics["forget_loss"] == pytest.approx(-forget, rel=1e-5)
    assert metrics["retain_loss"] == pytest.approx(retain, rel=1e-5)
    assert metrics["loss"] == pytest.approx(2 * retain - forget, rel=1e-5)
    assert distance(mean, gradient[0]) <= 1e-5
    # One micro-batch is the ordinary mean.
    assert whole["retain_loss"] == pytest.approx(plain_mean, rel=1e-5)


def test_retain_kl_over_all_positions_in_training(start, plain, tmp_path):
    """References are cached at every slot; the mean is over B x T, padding too."""
    row, options = objectives.resolve(objective_of("graddiff", compat="kl_all_positions"))
    mesh = mesh_of(2, 2, 1)
    other = jax.tree.map(lambda x: 0.9 * x, start)
    streams = {name: plain[name] for name in row.streams}
    assert row.reference == {"retain": "hidden_all"} and not row.packable
    ready = with_references(streams, row, options, DECODER, start, "start", mesh, tmp_path)
    again = with_references(streams, row, options, DECODER, None, "start", mesh, tmp_path)
    host = batches_of(ready, "forget", SEED, ROWS)(0)
    same = batches_of(again, "forget", SEED, ROWS)(0)
    np.testing.assert_array_equal(host["retain"]["ref_hidden"], same["retain"]["ref_hidden"])
    assert host["retain"]["ref_hidden"].shape == (*host["retain"]["tokens"].shape, 16)
    assert (host["retain"]["segment_ids"] == 0).any()  # there is padding to count
    batches = {name: sharding.put_batch(batch, mesh) for name, batch in host.items()}

    @jax.jit
    def run(params, frozen, batches):
        return Losses(LEARNER, row, options, params, frozen, batches, 1).gradients(params)

    args = (sharding.put_params(other, mesh), head_of(sharding.put_params(start, mesh)), batches)
    metrics, _ = run.lower(*args).compile()(*args)
    want = np.mean([kl for _, kl in label_values(host["retain"], other, start)])
    assert float(metrics["retain_loss"]) == pytest.approx(want, rel=1e-4)


def test_one_forward_pass_for_all_streams(start, plain):
    """All sides together take one pass through the blocks and back; apart, each its own."""
    row, options = objectives.resolve(objective_of("npo", retain="nll"))
    host = batches_of({n: plain[n] for n in row.streams}, "forget", SEED, ROWS)(0)
    for batch in host.values():
        batch["ref_log_probs"] = np.zeros_like(batch["target_mask"])
    losses = Losses(LEARNER, row, options, start, None, host, 1)

    def layers(*sides):
        """Number of passes over the blocks in the gradient's jaxpr: forwards, backwards."""
        found = str(jax.make_jaxpr(lambda p: losses.gradients(p, sides))(start))
        return len(re.findall(r"= scan\[", found))

    assert layers(None) == 2
    assert layers("forget", "retain") >= 4
    joint, (total,) = jax.jit(losses.gradients)(start)
    apart, (forget, retain) = jax.jit(lambda p: losses.gradients(p, ("forget", "retain")))(start)
    assert distance(jax.tree.map(np.add, forget, retain), total) <= 1e-6
    for name, value in joint.items():
        assert float(apart[name]) == pytest.approx(float(value), rel=1e-6), name


def test_micro_batches_deal_rows_in_turn():
    batch = {"forget": {"row_id": jnp.arange(8), "tokens": jnp.arange(16).reshape(8, 2)}}
    parts = split_batch(batch, 2)
    assert parts["forget"]["row_id"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert parts["forget"]["tokens"][1].tolist() == [[2, 3], [6, 7], [10, 11], [14, 15]]
    packed = {"forget": {"row_id": jnp.arange(8), "tokens": jnp.arange(8).reshape(4, 2)}}
    parts = split_batch(packed, 2)  # examples that share a row stay together
    assert parts["forget"]["row_id"].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert parts["forget"]["tokens"].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    "config",
    [
        configured(name, compat=compat)
        for name, row in OBJECTIVES.items()
        for compat, form in row.compat.items()
        if not form.additive
    ],
    ids=label,
)
def test_accumulation_refuses_what_does_not_add_up(config, start, plain, tmp_path):
    def stage(accumulate):
        return train(
            Run(tmp_path, mesh_of(3, 1, 1), 0, Tracker(tmp_path)),
            "unlearned",
            Model(DECODER, start, None, "start"),
            objectives.resolve(config),
            {name: plain[name] for name in ("forget", "retain")},
            Recipe(UnlearnConfig(batch_size=4, accumulate=accumulate, steps=1), ADAMW),
        )

    with pytest.raises(UserError, match="cannot be split into 2 micro-batches") as error:
        stage(2)
    assert config.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not divide over data x fsdp = 3"):
        stage(1)  # past that check, into the next
    assert not list(tmp_path.iterdir())


# Optimizers on a fixed gradient.


@pytest.fixture(scope="module")
def fixed():
    """Three gradients of a model's size, some elements exactly 0 as those of unseen tokens."""
    shapes = DECODER.shapes()

    def draw(step):
        def one(path, leaf):
            rng = np.random.default_rng([step, *sharding.path_str(path).encode()])
            value = 0.01 * rng.standard_normal(leaf.shape, np.float32)
            value[..., :3] = 0.0
            return value

        return jax.tree_util.tree_map_with_path(one, shapes)

    return [draw(step) for step in range(3)]


def optimizer_of(name):
    """A row over three steps; hybrid alternates at every step."""
    gradients = OPTIMIZERS[name].needs in ("joint", "split")
    more = {"clip_norm": 1.0} if gradients else {"period": 1} if name == "hybrid" else {}
    options = optimizers.options_of(name, learning_rate=1e-2, weight_decay=0.1, **more)
    return build(optimizers.over_rows(options, 4), 3)[0]


def handed(name, grads, step):
    """The gradient and the extra arguments of a step; zeroth order gets fixed coefficients."""
    needs = OPTIMIZERS[name].needs
    if needs == "joint":
        return grads[step], {}
    if needs == "split":
        return grads[step], {"constraint_grads": grads[(step + 1) % len(grads)]}
    count = optimizers.over_rows(OPTIMIZERS[name].options(), 4).queries
    coeffs = jnp.linspace(-1.0, 2.0, count + step)[:count]
    return grads[step] if needs == "lazy" else None, {"coeffs": coeffs}


def updates_of(name, sizes, start, fixed):
    """Updates of three steps on a mesh, and the state after them."""
    mesh = mesh_of(*sizes)
    tx = optimizer_of(name)
    params = sharding.put_params(start, mesh)
    state, shardings = init_state(params, tx, mesh)
    where = shardings.opt_state
    opt_state, found = state.opt_state, []
    grads = [sharding.put_params(one, mesh) for one in fixed]

    def one_step(one, opt_state, params, extra):
        if OPTIMIZERS[name].needs == "lazy":
            extra = extra | {"value_fn": lambda params: jnp.zeros(())}
        return tx.update(one, opt_state, params, **extra)

    update = jax.jit(one_step, out_shardings=(shardings.params, where), donate_argnums=(1,))
    first, extra = handed(name, grads, 0)
    update = update.lower(first, opt_state, params, extra).compile()
    for step in range(3):
        one, extra = handed(name, grads, step)
        updates, opt_state = update(one, opt_state, params, extra)
        found.append(jax.device_get(updates))
    return found, opt_state, params


@pytest.fixture(scope="module")
def updates(start, fixed):
    """`updates_of`, computed once for a row and a mesh."""
    return functools.cache(lambda name, *sizes: updates_of(name, sizes, start, fixed))


# Rows that only draw other directions than these run where there is time: each compiles thrice.
ALIKE = ("sparse-mezo", "hizoo", "lozo", "subzero", "subspace-mezo", "fzoo", "rowwise")
EVERY = [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in OPTIMIZERS]


@pytest.mark.parametrize("name", EVERY)
def test_optimizers_on_a_fixed_gradient(name, updates):
    expected, _, _ = updates(name, 1, 1, 1)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    for sizes in ((2, 2, 2), (1, 8, 1)):
        found, _, _ = updates(name, *sizes)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "jobs"), [("mezo", 8), pytest.param("zo-muon", 4, marks=pytest.mark.slow)]
)
def test_devices_share_the_evaluations_of_queries(name, jobs, start, plain):
    """`--mesh.query 2`: the same step; each group evaluates half of four queries."""
    batch = plain["train"].batch(range(4))

    def one_step(*sizes, counted=True):
        mesh = mesh_of(*sizes)
        config = optimizers.options_of(name, learning_rate=1e-2, queries=4, perturbation=1e-2)
        tx, schedule, needs = build(config, 2, "sum", sharding.query_axis(mesh))
        step = make_step(LEARNER, *objectives.resolve("nll"), tx, schedule, 1, needs)
        state, shardings = init_state(sharding.put_params(start, mesh), tx, mesh)
        args = (state, None, {"train": sharding.put_batch(batch, mesh)})
        program = compile_step(step, shardings, mesh).lower(*args).compile()
        flops = 0
        if counted:
            # Every device takes the whole of a low-rank update.
            numbers = jax.tree.map(jnp.float32, optimizers.schedule_numbers(config, 2))
            coeffs = coefficients.state_of(state.opt_state).coeffs
            update = coefficients.compile_apply(config, shardings)
            update = update.lower(state.params, state.opt_state, numbers, coeffs).compile()
            flops = device_flops(program).flops - device_flops(update).flops
        state, metrics = program(*args)
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), start)
        return flops, moved, float(metrics["loss"])

    _, expected, loss = one_step(1, 1, 1, 1, counted=False)
    alone, *_ = one_step(1, 2, 1, 1)
    shared, moved, found = one_step(1, 2, 1, 2)
    assert abs(found - loss) < 1e-5
    assert distance(moved, expected) < 1e-3  # losses agree to 1e-6, which 1 / eps magnifies
    # Every group also evaluates the loss for the log.
    wanted = (1 + jobs / 2) / (1 + jobs)
    assert shared < (wanted + 0.05) * alone


@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if row.needs == "value"])
def test_the_axis_of_queries_reaches_every_row(name, start):
    """A mesh without the axis is refused by its name; the optimizers' tests hold the sharing."""
    config = optimizers.over_rows(optimizers.options_of(name, learning_rate=1e-2), 4)
    tx, *_ = build(config, 2, "sum", "nowhere")
    params = sharding.put_params(start, mesh_of(1, 2, 1))
    with pytest.raises(ValueError, match="query_axis='nowhere'"):
        jax.eval_shape(
            lambda p: tx.update(None, tx.init(p), p, value_fn=lambda p: jnp.zeros(())), params
        )


@pytest.mark.parametrize("name", EVERY)
def test_optimizer_state_is_split_like_its_parameters(name, start, updates):
    """After `init` and after updates: every moment is sharded like its parameter."""
    mesh = mesh_of(2, 2, 2)
    tx = optimizer_of(name)
    params = sharding.put_params(start, mesh)
    state, shardings = init_state(params, tx, mesh)
    known = {
        sharding.path_str(path): (x.shape, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert sum(not where.is_fully_replicated for _, where in known.values()) >= 8
    tx_state = updates(name, 2, 2, 2)[1]
    for opt_state in (state.opt_state, tx_state):
        found = dict.fromkeys(known, 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
            assert len(leaf.sharding.device_set) == 8
            end = [k for k in known if sharding.path_str(path).endswith("/" + k)]
            if end and leaf.shape == known[end[0]][0]:
                assert leaf.sharding.is_equivalent_to(known[end[0]][1], leaf.ndim)
                found[end[0]] += 1
            else:  # counts, diagnostics of a matrix, bases of a subspace
                assert leaf.sharding.is_fully_replicated
                if leaf.shape == (3,) and name == "optax-muon":
                    continue  # it keeps its coefficients in its state
                if name == "normuon" and leaf.ndim and leaf.shape[-2] == 1:
                    continue  # a number for every output neuron
                assert leaf.ndim <= {"joint": 0, "lazy": 1}.get(OPTIMIZERS[name].needs, leaf.ndim)
        assert OPTIMIZERS[name].needs == "value" or min(found.values()) >= 1, found
    assert shardings.params["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tp")


# The cost of a step, and what it keeps.


def test_weights_first_costs_no_forward(start, plain):
    """The compiled step costs no more than `value_and_grad` of the loss, which has one forward."""
    row, options = objectives.resolve(objective_of("ga"))
    host = batches_of({"forget": plain["forget"]}, "forget", SEED, 4)(0)

    def loss(params, batches):
        context = LEARNER.context(params, Frozen(), batches, row.questions(options))
        terms = row.loss(context, batches, options)
        return objectives.combine(terms, None, options)

    def both(params, batches):  # the cost if the first pass were kept
        value, grads = jax.value_and_grad(loss)(params, batches)
        probe = jax.tree.map(lambda x: 1.01 * x, params)
        return value, grads, loss(probe, batches)

    def cost(fn):
        compiled = jax.jit(fn).lower(start, host).compile()
        dots = len(re.findall(r" dot\(| custom-call\(|__onednn", compiled.as_text()))
        return compiled.cost_analysis()["flops"], dots

    def step(accumulate):
        def run(params, batches):
            losses = Losses(LEARNER, row, options, params, None, batches, accumulate)
            return losses.gradients(params)

        return run

    flops, dots = cost(jax.value_and_grad(loss))
    assert dots > 20
    more = cost(both)
    assert more[0] > 1.2 * flops and more[1] > 1.2 * dots
    mine = cost(step(1))
    assert mine[0] <= 1.01 * flops and mine[1] <= dots
    # The body of the loop over micro-batches is counted once.
    halves = cost(step(2))
    assert halves[0] <= 0.75 * flops and halves[1] <= dots


def test_step_donates_its_state_and_compiles_once_a_shape(start, plain):
    mesh = mesh_of(2, 2, 2)
    row, options = objectives.resolve(objective_of("nll"))
    tx, schedule, _ = build(ADAMW, STEPS)
    params = sharding.put_params(start, mesh)
    state, shardings = init_state(params, tx, mesh)
    step = compile_step(make_step(LEARNER, row, options, tx, schedule), shardings, mesh)
    train = plain["train"]
    short = [i for i, e in enumerate(train.examples) if len(e.tokens) <= 8]
    two = Examples(train.examples, 0, (8, 16), train.label_buckets)
    assert len(short) >= 8
    lengths = set()
    for rows in (short[:8], range(8), short[-8:], range(8, 16)):
        batch = sharding.put_batch(two.batch(rows), mesh)
        lengths.add(batch["tokens"].shape)
        before = jax.tree.leaves(state)
        state, metrics = step(state, None, {"train": batch})
        assert all(leaf.is_deleted() for leaf in before)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    assert lengths == {(8, 8), (8, 16)} and step._cache_size() == 2
    assert int(state.step) == 4
    assert set(metrics) == {"loss", "train_loss", "grad_norm", "update_norm", "lr"}
    assert all(x.sharding.is_fully_replicated for x in metrics.values())
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_a_stage_does_not_consume_what_it_starts_from(start, plain, tmp_path):
    """The original model still exists after unlearning from it (zero steps suffice)."""
    mesh = mesh_of(1, 2, 1)
    params = sharding.put_params(start, mesh)
    row, options = objectives.resolve(objective_of("nll"))
    batches = batches_of({"train": plain["train"]}, "train", SEED, ROWS)
    stage = loop.Stage("nll", 0, batches, row, options, ADAMW, 1, tmp_path / "c", 1e9)
    after = loop.run(stage, LEARNER, params, None, mesh, Tracker(tmp_path))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        assert not b.is_deleted() and np.array_equal(a, b)
        pointers = {s.data.unsafe_buffer_pointer() for s in b.addressable_shards}
        assert not pointers & {s.data.unsafe_buffer_pointer() for s in a.addressable_shards}
