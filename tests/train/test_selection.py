"""Training a part of a model, and a frozen model that shares the rest (RMU)."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder import selection
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from models.learner import Frozen, check_questions
from train.costs.flops import count_jaxpr
from train.engine import base_models
from train.engine.run import Recipe, Run, train
from train.engine.step import Losses, init_state, make_step, objective_state
from train.engine.trainable import trainable_of
from train.evaluators.evaluation import Model
from train.jobs import job, unlearning, unlearning_stages
from train.options import checks
from train.options.config import SelectConfig, UnlearnConfig, identity
from train.options.optimizers import build
from train.options.optimizers import options_of as optimizer_of
from train.presets import PRESETS, arguments
from train.reporting import provenance, tables
from train.runtime import sharding
from train.runtime.tracking import Tracker
from train.tasks import load_task

CONFIG = DecoderConfig(31, 16, 24, 10, 2, 1, 8)
LEARNER = DecoderLearner(Decoder(CONFIG))
DOWN = SelectConfig(("mlp/down",), (5, 6, 7))
ROW, OPTIONS = objectives.resolve("rmu", retain_weight=3.0)


@pytest.fixture(scope="module")
def params():
    return LEARNER.decoder.init(jax.random.key(0))


def batch(seed, rows=3, length=9):
    """Rows with an answer of four tokens behind a prompt, the last row shorter."""
    draw = np.random.default_rng(seed)
    lengths = np.array([length] * (rows - 1) + [length - 2])
    segment_ids = (np.arange(length) < lengths[:, None]).astype(np.int32)
    index = lengths[:, None] - 5 + np.arange(4)
    tokens = draw.integers(2, 31, (rows, length), np.int32)
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": segment_ids,
        "label_index": index.astype(np.int32),
        "targets": np.take_along_axis(tokens, index + 1, 1),
        "target_mask": np.ones((rows, 4), np.float32),
        "row_id": np.arange(rows, dtype=np.int32),
    }


BATCHES = {"forget": batch(1), "retain": batch(2)}


def losses_of(training, learner=LEARNER, start=None, batches=None, row=ROW, options=OPTIONS):
    return Losses(
        learner,
        row,
        options,
        training.start if start is None else start,
        training.frozen,
        BATCHES if batches is None else batches,
        binding=training.binding,
        state=objective_state(learner, row, options, 7),
    )


def moved(tree, by=0.05):
    keys = iter(jax.random.split(jax.random.key(9), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape, x.dtype), tree)


# Choosing


@pytest.mark.parametrize(
    ("leaves", "blocks", "inner", "outer", "train_from"),
    [
        (["mlp/down"], [5, 6, 7], {"mlp/down/kernel"}, set(), 5),
        (["down", "q"], [2, 9], {"mlp/down/kernel", "attn/q/kernel"}, set(), 2),
        (["embed", "up"], [3], {"mlp/up/kernel"}, {"embed/embedding"}, 0),
        (["final_norm"], None, set(), {"final_norm/scale"}, 10),
        (["attn"], None, {f"attn/{n}/kernel" for n in "qkvo"}, set(), 0),
    ],
)
def test_leaves_are_chosen_by_name_and_block(params, leaves, blocks, inner, outer, train_from):
    chosen = selection.select(params, leaves, blocks)
    assert (set(chosen.inner), set(chosen.outer)) == (inner, outer)
    assert chosen.train_from == train_from
    trainable, frozen = selection.split(params, chosen)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trainable, frozen, params)]
    assert sizes[0] + sizes[1] == sizes[2]
    tokens = BATCHES["forget"]["tokens"]
    want, _ = LEARNER.decoder.forward(params, tokens)
    viewed = selection.view(trainable, frozen, chosen=chosen)
    bound, layer_map = selection.bind(trainable, frozen, chosen=chosen, dtype="float32")
    for tree, mapped in ((viewed, None), (bound, layer_map)):
        got, _ = LEARNER.decoder.forward(tree, tokens, layer_map=mapped)
        np.testing.assert_allclose(got, want, atol=1e-6)
    same = selection.finish(trainable, params, chosen=chosen)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    other = selection.finish(moved(trainable), params, chosen=chosen)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(params), strict=True
    ):
        name = sharding.path_str(path)
        mine = name in outer or name.removeprefix("layers/") in inner
        assert (np.abs(np.asarray(a - b)).max() > 0) == mine, name
        if mine and name.startswith("layers/") and blocks is not None:
            still = [i for i in range(10) if i not in blocks]
            np.testing.assert_array_equal(a[np.array(still)], b[np.array(still)])


@pytest.mark.parametrize(
    ("leaves", "blocks", "message"),
    [
        (["mlp/dwn"], None, "--train.leaves mlp/dwn: no leaf of the model has that name"),
        (["own"], None, "attn/q"),
        (["down"], [10], "--train.blocks 10: the model has blocks 0 to 9"),
        (["down"], [-1], "--train.blocks -1: the model has blocks 0 to 9"),
        (["final_norm"], [1], "--train.blocks goes with leaves of blocks"),
    ],
)
def test_what_the_model_does_not_have(params, leaves, blocks, message):
    with pytest.raises(UserError) as error:
        selection.select(params, leaves, blocks)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_teon_takes_whole_groups(params):
    teon = optimizer_of("teon", group_size=2)
    for blocks in ((5, 6), (4, 5, 6)):
        with pytest.raises(UserError, match="this range cuts a group"):
            checks.check_selection(SelectConfig(("q",), blocks), teon, params)
    for fine in (SelectConfig(("q",), (4, 5)), SelectConfig(("q",))):
        checks.check_selection(fine, teon, params)
    four = optimizer_of("teon", group_size=4)  # blocks 8 and 9 are left over in the model, too
    for fine in (SelectConfig(("q",)), SelectConfig(("q",), (4, 5, 6, 7, 8, 9))):
        checks.check_selection(fine, four, params)
    trained = trainable_of(params, ROW, select=SelectConfig(("q",), (4, 5))).start
    whole = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    tx = build(teon, 10)[0]
    part = {"layers": {"attn": {"q": {"kernel": whole["layers"]["attn"]["q"]["kernel"][4:6]}}}}
    update = jax.jit(tx.update)
    alone, _ = update(part, tx.init(trained), trained)
    every, _ = update(whole, tx.init(params), params)
    np.testing.assert_allclose(
        alone["layers"]["attn"]["q"]["kernel"],
        every["layers"]["attn"]["q"]["kernel"][4:6],
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["mezo", "zo-muon", "hybrid"])
def test_zeroth_order_needs_a_kernel_of_a_block(params, name):
    for leaves in (("final_norm",), ("embed",), ("attn_norm",)):
        with pytest.raises(UserError, match=f"{name} moves one layer of a stack at a time"):
            checks.check_selection(SelectConfig(leaves), optimizer_of(name), params)
    checks.check_selection(SelectConfig(("attn_norm", "down")), optimizer_of(name), params)


# RMU with three matrices and a fork


def reference_loss(params, moved_down, u):
    """Two separate models in NumPy's float64 means, from hidden states of plain forward passes."""
    other = {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"]}}}
    down = params["layers"]["mlp"]["down"]["kernel"]
    other["layers"]["mlp"]["down"] = {"kernel": jnp.concatenate([down[:5], moved_down, down[8:]])}

    def hidden(tree, stream):
        b = BATCHES[stream]
        _, found = learner64().decoder.forward(
            tree, b["tokens"], positions=b["positions"], segment_ids=b["segment_ids"],
            hidden_at=(7,),
        )  # fmt: skip
        return np.asarray(found["hidden"][7], np.float64)

    def mean(errors, stream):
        index = BATCHES[stream]["label_index"] + 1
        return np.mean([errors[b][index[b]].mean() for b in range(len(index))])

    forget = ((hidden(other, "forget") - OPTIONS.steering * np.asarray(u)) ** 2).mean(-1)
    retain = ((hidden(other, "retain") - hidden(params, "retain")) ** 2).mean(-1)
    return mean(forget, "forget") + 3.0 * mean(retain, "retain")


def learner64():
    return DecoderLearner(Decoder(dataclasses.replace(CONFIG, dtype="float64")))


def test_rmu_equals_two_models_in_float64(params):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        learner = learner64()
        training = trainable_of(wide, ROW, select=DOWN, dtype="float64")
        start = moved(training.start)
        u = objective_state(learner, ROW, OPTIONS, 7)["direction"]
        losses = losses_of(training, learner, start)
        value = jax.jit(losses.value)
        down = start["layers"]["mlp"]["down"]["kernel"]
        np.testing.assert_allclose(value(start), reference_loss(wide, down, u), rtol=1e-10)
        # the fork from block 5 on, against a frozen model of its own
        apart = trainable_of(wide, ROW)
        whole = selection.finish(start, wide, chosen=selection.select(wide, *_pair(DOWN)))
        other = losses_of(apart, learner, whole)
        np.testing.assert_allclose(jax.jit(other.value)(whole), value(start), rtol=1e-12)
        grad = jax.jit(losses.grad)(start)
        want = jax.jit(other.grad)(whole)["layers"]["mlp"]["down"]["kernel"]
        np.testing.assert_allclose(
            grad["layers"]["mlp"]["down"]["kernel"], want[5:8], rtol=1e-9, atol=1e-14
        )
        step = moved(jax.tree.map(jnp.zeros_like, start), 1.0)
        slope = sum(
            jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grad, step)), strict=True)
        )
        ends = [
            value(jax.tree.map(lambda p, s, e=e: p + e * s, start, step)) for e in (1e-3, -1e-3)
        ]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-3, rtol=1e-4)


def _pair(select):
    return select.leaves, select.blocks


def test_rmu_at_the_start(params):
    """The retain term and its gradient are 0; nothing above block 7 is read."""
    training = trainable_of(params, ROW, select=DOWN)
    metrics = losses_of(training).look(training.start)
    assert float(metrics["retain_loss"]) < 1e-12 and float(metrics["forget_loss"]) > 0
    row, options = objectives.resolve("rmu", forget_weight=0.0)
    grad = jax.jit(losses_of(training, row=row, options=options).grad)(training.start)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) < 1e-9
    spoiled = jax.tree.map(lambda x: x.at[8:].set(jnp.nan), params["layers"])
    broken = {**params, "layers": spoiled, "final_norm": {"scale": jnp.full(16, jnp.nan)}}
    other = trainable_of(broken, ROW, select=DOWN)
    assert float(losses_of(other).value(other.start)) == float(metrics["loss"])


def scans(jaxpr, found=None):
    """Lengths of all loops, outermost first."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                scans(getattr(inner, "jaxpr", inner), found)
    return found


def test_rmu_computes_the_prefix_once_and_nothing_above(params):
    training = trainable_of(params, ROW, select=DOWN)

    def gradient(start, frozen, batches):
        return losses_of(training._replace(frozen=frozen), start=start, batches=batches).gradients(
            start
        )

    args = (training.start, training.frozen, jax.tree.map(jnp.asarray, BATCHES))
    closed = jax.make_jaxpr(gradient)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    # Forward: blocks 0 to 4, then 5 to 7 of both streams; 5 to 7 of the frozen model for retain;
    # backward: 7 to 5.
    assert sorted(scans(live)) == [3, 3, 3, 5]
    apart = trainable_of(params, ROW)
    plain = jax.make_jaxpr(
        lambda start, frozen, batches: losses_of(
            apart._replace(frozen=frozen), start=start, batches=batches
        ).gradients(start)
    )(apart.start, apart.frozen, args[2])
    all_live, _ = partial_eval.dce_jaxpr(plain.jaxpr, [True] * len(plain.jaxpr.outvars))
    part, whole = (
        count_jaxpr(jax.extend.core.ClosedJaxpr(j, c.consts)).flops
        for j, c in ((live, closed), (all_live, plain))
    )
    # 8 blocks of two streams forward and twice that backward, and 8 of one: 56; here 8 + 8 + 3 + 12
    assert part < 0.6 * whole


def test_a_fork_that_is_asked_for_labels_shares_the_prefix(params):
    """NPO with the frozen model in the step, in place of a cache: the same loss, one prefix."""
    row, options = objectives.resolve("npo", retain="none")
    forking = dataclasses.replace(row, reference={"forget": "fork"})
    one = {"forget": BATCHES["forget"]}
    training = trainable_of(params, forking, select=DOWN)
    cached = trainable_of(params, row, select=DOWN)
    frozen = LEARNER.context(params, Frozen(), one, row.questions(options)).model
    known = {"forget": one["forget"] | {"ref_log_probs": frozen.log_probs(one["forget"])}}
    start = moved(training.start)
    value = losses_of(training, start=start, batches=one, row=forking, options=options).value(start)
    want = losses_of(cached, start=start, batches=known, row=row, options=options).value(start)
    np.testing.assert_allclose(value, want, rtol=1e-5)

    def gradient(start, frozen, batches):
        return losses_of(
            training._replace(frozen=frozen), start=start, batches=batches, row=forking,
            options=options,
        ).gradients(start)  # fmt: skip

    closed = jax.make_jaxpr(gradient)(start, training.frozen, jax.tree.map(jnp.asarray, one))
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    # forward 0 to 4, 5 to 7, 8 and 9; the frozen model's 5 to 7, 8 and 9; backward the same
    assert sorted(scans(live)) == [2, 2, 2, 3, 3, 3, 5]


@pytest.mark.parametrize("name", ["adamw", "muon", "mezo", "zo-muon"])
def test_state_and_updates_are_of_three_matrices(params, name):
    mesh = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
    training = trainable_of(sharding.put_params(params, mesh), ROW, select=DOWN, mesh=mesh)
    sizes = [x.shape for x in jax.tree.leaves(training.start)]
    assert sizes == [(3, 24, 16)]
    tx, schedule, needs = build(
        optimizer_of(name, learning_rate=1e-2, schedule="constant", warmup=0.0), 4
    )
    memory = objective_state(LEARNER, ROW, OPTIONS, 7)
    start = jax.tree.map(jnp.array, training.start)
    state, _ = init_state(start, tx, mesh, memory)
    kept = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert kept <= 2 * 3 * 24 * 16 + 64
    step = jax.jit(
        make_step(LEARNER, ROW, OPTIONS, tx, schedule, needs=needs, binding=training.binding)
    )
    batches = {n: sharding.put_batch(b, mesh) for n, b in BATCHES.items()}
    seen = []
    for _ in range(3):
        state, metrics = step(state, training.frozen, batches)
        seen.append(float(metrics["loss"]))
    assert all(map(math.isfinite, seen)) and seen[2] != seen[0]
    np.testing.assert_array_equal(state.objective["direction"], memory["direction"])
    after = training.finish(state.params)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(params), strict=True
    ):
        if sharding.path_str(path) != "layers/mlp/down/kernel":
            np.testing.assert_array_equal(a, b)
        else:
            blocks = np.abs(np.asarray(a - b)).max((1, 2)) > 0
            assert blocks.tolist() == [5 <= i <= 7 for i in range(10)]


def test_the_copy_of_a_fork_is_planned(params):
    """A fork holds a second copy of what is trained, and nothing else twice."""

    def size(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    shapes = LEARNER.shapes()
    plain, _ = objectives.resolve("rmu", retain="nll")
    for select in (None, DOWN):
        alone, forked = (trainable_of(shapes, row, select=select) for row in (plain, ROW))
        assert size(forked.frozen) - size(alone.frozen) == size(forked.start)
        assert (alone.binding.fork is None) and forked.binding.fork is not None
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(forked.frozen))


def test_a_fork_needs_the_start_as_its_reference(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    model = Model(LEARNER.decoder, {}, None, "one")  # pyright: ignore[reportArgumentType]
    recipe = Recipe(UnlearnConfig(), optimizer_of("adamw"))
    with pytest.raises(UserError, match="no other reference can be given"):
        train(run, "x", model, (ROW, OPTIONS), {}, recipe, reference=model._replace(sha="other"))


def test_rmu_reaches_its_direction_and_keeps_the_rest(params):
    row, options = objectives.resolve("rmu", steering=3.0, retain_weight=3.0)
    training = trainable_of(params, row, select=DOWN)
    memory = objective_state(LEARNER, row, options, 0)
    tx = optax.adam(3e-2)
    step = jax.jit(
        make_step(LEARNER, row, options, tx, optax.constant_schedule(3e-2),
                  binding=training.binding)
    )  # fmt: skip
    mesh = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
    state, _ = init_state(sharding.put_params(training.start, mesh), tx, mesh, memory)
    first = last = {}
    for i in range(200):
        state, last = step(state, training.frozen, BATCHES)
        first = last if i == 0 else first
    assert float(last["forget_loss"]) < 0.6 * float(first["forget_loss"])
    assert float(last["retain_loss"]) < 0.3 * float(last["forget_loss"])


def test_a_model_that_does_not_answer_is_refused():
    with pytest.raises(UserError, match="output of block 10; the model has blocks 0 to 9"):
        check_questions(LEARNER, *objectives.resolve("rmu", layer=10))
    with pytest.raises(UserError, match="block 4 and nothing above it, and block 5 is the first"):
        check_questions(LEARNER, *objectives.resolve("rmu", layer=4), train_from=5)
    check_questions(LEARNER, *objectives.resolve("rmu", layer=4, retain="nll"), train_from=5)
    asks = dataclasses.replace(ROW, asks={"forget": ("noise",)})
    with pytest.raises(UserError, match="asks a model for noise, which this kind of model"):
        check_questions(LEARNER, asks, OPTIONS)


def test_a_selected_stage_from_the_command_line(small, tmp_path):
    argv = [*"quickstart --objective.name rmu --train.leaves mlp/down --train.blocks 1".split()]
    more = "--unlearn.steps 3 --unlearn.curve-points 1 --objective.layer 1".split()
    config = arguments.read_arguments(arguments.UNLEARN, [*argv, *small, *more])
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    unlearning.check_stages(config, task, base.learner)
    base = base.to_host()  # where a program's models wait
    trained = unlearning_stages.unlearn(run, config, base, task)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(trained.params)} == {"device"}
    assert trained.sha == unlearning_stages.unlearn(run, config, base, task).sha != base.sha
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(trained.params), jax.tree.leaves(base.params),
        strict=True,
    ):  # fmt: skip
        if sharding.path_str(path) != "layers/mlp/down/kernel":
            np.testing.assert_array_equal(a, b)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["retain_loss"] < 1e-12 and logged[2]["retain_loss"] > 0
    both = arguments.read_arguments(arguments.UNLEARN, [*argv, *small, "--lora.rank", "2"])
    with pytest.raises(UserError, match="use --lora.targets, or leave --lora.rank out"):
        job.check(unlearning.JOB, both)
    empty = arguments.read_arguments(
        arguments.UNLEARN,
        ["quickstart", *small, "--objective.name", "rmu", "--objective.layer", "2"],
    )
    with pytest.raises(UserError, match="output of block 2"):
        unlearning.check_stages(empty, task, base.learner)


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        ({"leaves": ["mlp/down"], "blocks": [5, 6, 7]}, "mlp/down of blocks 5, 6, 7"),
        ({"leaves": None, "blocks": [0]}, "all leaves of blocks 0"),
        ({"leaves": None, "blocks": None}, None),
        (None, None),
    ],
)
def test_a_report_says_what_was_trained(tmp_path, selected, words):
    config = identity(PRESETS["quickstart"].PRESET)
    config |= {} if selected is None else {"train": selected}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text('{"unlearned": {"forget_rouge": 0.1}}')
    (tmp_path / "run.json").write_text("{}")
    run = tables.load_run(tmp_path)
    assert dict(provenance.facts(run, {})).get("Trained") == words
