"""R2MU on a decoder: its four terms, what it computes, what it trains, every kind of optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from jaxlib_unlearn import objectives
from models.decoder import asked, selection
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.costs.flops import count_jaxpr
from train.engine.step import Losses, init_state, make_step, objective_state
from train.engine.trainable import trainable_of
from train.options.config import SelectConfig
from train.options.optimizers import build
from train.options.optimizers import options_of as optimizer_of
from train.runtime import sharding

CONFIG = DecoderConfig(31, 16, 24, 4, 2, 1, 8)
LEARNER = DecoderLearner(Decoder(CONFIG))
WIDE = DecoderLearner(Decoder(dataclasses.replace(CONFIG, dtype="float64")))
DOWN = SelectConfig(("mlp/down",), (1, 2))
ROW, OPTIONS = objectives.resolve(
    "r2mu", block=2, steering=3.0, retain_weight=2.0, trace_weight=0.5, cot_weight=7.0
)
TERMS = {"forget": "forget", "forget_trace": "traces", "retain": "retain", "retain_cot": "cot"}


@pytest.fixture(scope="module")
def params():
    return LEARNER.decoder.init(jax.random.key(0))


def batch(seed, rows=2, length=9):
    """Whole texts, each token but the first a label; the last row is shorter."""
    draw = np.random.default_rng(seed)
    lengths = np.array([length] * (rows - 1) + [length - 3])
    slots = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segment_ids = (slots < lengths[:, None]).astype(np.int32)
    tokens = draw.integers(2, 31, (rows, length)).astype(np.int32) * segment_ids
    return {
        "tokens": tokens,
        "positions": slots * segment_ids,
        "segment_ids": segment_ids,
        "label_index": slots[:, :-1],
        "targets": tokens[:, 1:],
        "target_mask": segment_ids[:, 1:].astype(np.float32),
        "row_id": np.arange(rows, dtype=np.int32),
    }


BATCHES = {stream: batch(seed) for seed, stream in enumerate(ROW.streams)}


def losses_of(training, start=None, *, row=ROW, options=OPTIONS, learner=LEARNER, batches=BATCHES):
    return Losses(
        learner,
        row,
        options,
        training.start if start is None else start,
        training.frozen,
        {stream: batches[stream] for stream in row.streams},
        binding=training.binding,
        state=objective_state(learner, row, options, 7),
    )


def moved(tree, by=0.05):
    keys = iter(jax.random.split(jax.random.key(9), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape, x.dtype), tree)


def test_four_terms_of_a_fork_are_those_of_two_models_in_float64(params):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        training = trainable_of(wide, ROW, select=DOWN, dtype="float64")
        start = moved(training.start)
        chosen = selection.select(wide, DOWN.leaves, DOWN.blocks)
        other = selection.finish(start, wide, chosen=chosen)
        u = np.asarray(objective_state(WIDE, ROW, OPTIONS, 7)["direction"])

        def hidden(tree, one):
            _, found = WIDE.decoder.forward(
                tree, one["tokens"], positions=one["positions"], segment_ids=one["segment_ids"],
                hidden_at=(2,),
            )  # fmt: skip
            return np.asarray(found["hidden"][2])

        want = {}
        for term, stream in TERMS.items():
            one = BATCHES[stream]
            target = OPTIONS.steering * u if "forget" in term else hidden(wide, one)
            errors = np.square(hidden(other, one) - target).mean(-1)
            rows = [e[real > 0].mean() for e, real in zip(errors, one["segment_ids"], strict=True)]
            want[term] = np.mean(rows)

        def gradients(training, start):
            def whole(start, frozen):
                state = training._replace(frozen=frozen)
                return losses_of(state, start, learner=WIDE).gradients(start)

            return jax.jit(whole)(start, training.frozen)

        found, (grads,) = gradients(training, start)
        for term, value in want.items():
            np.testing.assert_allclose(found[f"{term}_loss"], value, rtol=1e-10, err_msg=term)
        total = want["forget"] + 2 * want["retain"] + 0.5 * want["forget_trace"]
        np.testing.assert_allclose(found["loss"], total + 7 * want["retain_cot"], rtol=1e-10)
        # the same where the frozen model is a copy of its own, with a pass of its own
        apart, (every,) = gradients(trainable_of(wide, ROW), other)
        np.testing.assert_allclose(apart["loss"], found["loss"], rtol=1e-10)
        kernel = every["layers"]["mlp"]["down"]["kernel"]
        (mine,) = jax.tree.leaves(grads)
        np.testing.assert_allclose(mine, kernel[1:3], rtol=1e-9, atol=1e-14)


def test_what_is_kept_is_exactly_0_at_the_start(params):
    """Both distances and their gradients; nothing above the block is read."""
    spoiled = jax.tree.map(lambda x: x.at[3:].set(jnp.nan), params["layers"])
    broken = {**params, "layers": spoiled, "final_norm": {"scale": jnp.full(16, jnp.nan)}}
    values = []
    for tree in (params, broken):
        training = trainable_of(tree, ROW, select=DOWN)

        def both(start, frozen, training=training):
            losses = losses_of(training._replace(frozen=frozen), start)
            _, (grads,) = losses.gradients(start, ("retain",))
            return losses.look(start), grads

        found, grads = jax.jit(both)(training.start, training.frozen)
        assert float(found["retain_loss"]) == float(found["retain_cot_loss"]) == 0.0
        assert not any(np.any(g) for g in jax.tree.leaves(grads))
        assert float(found["forget_loss"]) > 0 and float(found["forget_trace_loss"]) > 0
        values.append(float(found["loss"]))
    assert values[0] == values[1]


@pytest.mark.parametrize(("select", "size"), [(None, 1), (DOWN, 4)])
def test_a_whole_copy_computes_only_what_is_asked_of_it(params, select, size, monkeypatch):
    """A fork has the batches of the model's pass; a copy one batch a pass, of what is kept."""
    training, passes, real = trainable_of(params, ROW, select=select), [], asked.forward_joined

    def counted(decoder, tree, batches, **options):
        passes.append([id(batch["tokens"]) for batch in batches])
        return real(decoder, tree, batches, **options)

    def value(start, frozen, batches):
        losses = losses_of(training._replace(frozen=frozen), start, batches=batches)
        passes.clear()
        found = losses.look(start)
        names = {id(batch["tokens"]): stream for stream, batch in batches.items()}
        passes[:] = [[names[one] for one in many] for many in passes]
        return found

    monkeypatch.setattr(asked, "forward_joined", counted)
    jax.eval_shape(value, training.start, training.frozen, BATCHES)
    ours, *frozen = passes
    assert ours == list(ROW.streams)
    assert frozen == ([ours] if size == 4 else [["retain"], ["cot"]])


def test_without_its_two_terms_it_is_rmu_bit_by_bit(params):
    same = {"block": 2, "positions": "all", "retain_weight": 2.0, "steering": 3.0}
    found = []
    for name, more in (("rmu", {}), ("r2mu", {"trace_weight": 0.0, "cot_weight": 0.0})):
        row, options = objectives.resolve(name, **same, **more)
        training = trainable_of(params, row, select=DOWN)

        def gradients(start, frozen, training=training, row=row, options=options):
            state = training._replace(frozen=frozen)
            return losses_of(state, start, row=row, options=options).gradients(start)

        found.append(jax.jit(gradients)(moved(training.start), training.frozen))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("name", "combine"),
    [
        ("adamw", "blur"),
        pytest.param("adamw", "pcgrad", marks=pytest.mark.slow),
        ("sift", "sum"),
        ("mezo", "sum"),
    ],
)
def test_optimizers_of_every_kind_take_it(params, name, combine):
    """Losses fall or move, and every leaf that is not chosen keeps its bits."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
    training = trainable_of(sharding.put_params(params, mesh), ROW, select=DOWN, mesh=mesh)
    chosen = optimizer_of(name, learning_rate=1e-2, schedule="constant", warmup=0.0)
    tx, schedule, needs = build(chosen, 3, combine)
    memory = objective_state(LEARNER, ROW, OPTIONS, 7)
    state, _ = init_state(jax.tree.map(jnp.array, training.start), tx, mesh, memory)
    step = jax.jit(
        make_step(LEARNER, ROW, OPTIONS, tx, schedule, needs=needs, binding=training.binding)
    )
    seen = []
    for _ in range(3):
        state, metrics = step(state, training.frozen, BATCHES)
        seen.append(float(metrics["loss"]))
    assert np.all(np.isfinite(seen)) and (needs == "value" or seen[2] < seen[0])
    np.testing.assert_array_equal(state.objective["direction"], memory["direction"])
    after = training.finish(state.params)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(params), strict=True
    ):
        if sharding.path_str(path) != "layers/mlp/down/kernel":
            np.testing.assert_array_equal(a, b)
        else:
            changed = np.abs(np.asarray(a - b)).max((1, 2)) > 0
            assert changed.tolist() == [1 <= i <= 2 for i in range(4)]


def test_eight_of_32_blocks_cost_less_than_a_third_of_a_whole_step():
    """A step at block 7 that trains blocks 5 to 7, against one of NLL on the same four streams."""
    config = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=32, num_layers=32)
    learner = DecoderLearner(Decoder(dataclasses.replace(config, intermediate_size=96)))
    shapes, batches = learner.shapes(), {s: batch(0, 2, 32) for s in ROW.streams}
    row, options = objectives.resolve("r2mu")

    def flops(row, options, select, batches):
        training = trainable_of(shapes, row, select=select, dtype="float32")

        def gradients(start, frozen, batches):
            state = training._replace(frozen=frozen)
            losses = losses_of(
                state, start, row=row, options=options, learner=learner, batches=batches
            )
            return losses.gradients(start)

        closed = jax.make_jaxpr(gradients)(training.start, training.frozen, batches)
        live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        return count_jaxpr(jax.extend.core.ClosedJaxpr(live, closed.consts)).flops

    part = flops(row, options, SelectConfig(("mlp/down",), (5, 6, 7)), batches)
    four = {"train": {k: np.concatenate([b[k] for b in batches.values()]) for k in batches["cot"]}}
    whole = flops(*objectives.resolve("nll"), None, four)
    print(f"R2MU at block 7 of 32: {part / whole:.3f} of a whole step")
    assert part <= 0.30 * whole
