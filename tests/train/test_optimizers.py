"""The optimizer table: schedules, decay, clipping, and errors that name the nearest."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder.model import Decoder, DecoderConfig
from train.options.checks import check_blocks
from train.options.optimizer_factories import decay_mask
from train.options.optimizer_options import Options
from train.options.optimizers import (
    COMBINERS,
    OPTIMIZERS,
    build,
    check,
    check_pair,
    check_steps,
    list_combiners,
    list_optimizers,
    other,
    over_rows,
)
from train.options.optimizers import options_of as optimizer_of
from train.runtime.sharding import path_str

PEAK = 3e-4
EVERY_LEAF = DecoderConfig(
    32, 8, 12, 2, 2, 1, 4, tie_embeddings=False, qk_norm=True, qkv_bias=True, o_bias=True,
    mlp_bias=True,
)  # fmt: skip


def rates(schedule, steps, warmup):
    config = optimizer_of("adamw", learning_rate=PEAK, schedule=schedule, warmup=warmup)
    made = build(config, steps)[1]
    return np.array([float(made(step)) for step in range(steps)]) / PEAK


AFTER = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@pytest.mark.parametrize("schedule", AFTER)
def test_warm_up_then_decay(schedule):
    found = rates(schedule, 20, 0.25)
    np.testing.assert_allclose(found[:5], [0.2, 0.36, 0.52, 0.68, 0.84], rtol=1e-6)
    expected = [AFTER[schedule](i / 15) for i in range(15)]
    np.testing.assert_allclose(found[5:], expected, rtol=1e-5, atol=1e-7)
    assert found.min() > 0  # decay ends after the last step: every step moves


@pytest.mark.parametrize("schedule", AFTER)
def test_no_warm_up_starts_at_the_peak(schedule):
    expected = [AFTER[schedule](i / 4) for i in range(4)]
    np.testing.assert_allclose(rates(schedule, 4, 0.0), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", AFTER)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_one_step_moves_at_the_peak(schedule, warmup):
    assert rates(schedule, 1, warmup).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("schedule", AFTER)
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_all_warm_up_still_reaches_the_peak(schedule, steps):
    found = rates(schedule, steps, 1.0)
    assert found[-1] == pytest.approx(1.0) and np.all(np.diff(found) >= 0) and found[0] > 0


def test_decay_mask_leaves_out_norms_and_biases():
    mask = decay_mask(Decoder(EVERY_LEAF).shapes())
    found = {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(mask)}
    kernels = {f"layers/attn/{n}/kernel" for n in "qkvo"}
    kernels |= {f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")}
    assert {path for path, decays in found.items() if decays} == {
        "embed/embedding",
        "lm_head/kernel",
        *kernels,
    }
    assert len(found) > 20


def one_step(config, params, grads, steps=1):
    tx, _, needs = build(config, steps)
    extra = {"constraint_grads": jax.tree.map(np.zeros_like, grads)} if needs == "split" else {}
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params, **extra)
    return updates, state


@pytest.fixture(scope="module")
def params():
    shapes = Decoder(EVERY_LEAF).shapes()
    return jax.tree.map(lambda x: np.full(x.shape, 2.0, np.float32), shapes)


@pytest.fixture(scope="module")
def few(params):
    """One leaf of each kind."""
    q = params["layers"]["attn"]["q"]
    return {"embed": params["embed"], "layers": {"attn": {"q": q}}, "norm": params["final_norm"]}


WITH_GRADIENT = [name for name, row in OPTIMIZERS.items() if row.needs in ("joint", "split")]


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_decay_is_decoupled_and_masked(name, params):
    """With no gradient at all a step is `-lr * decay * parameter`, or nothing."""
    config = optimizer_of(
        name, learning_rate=0.01, schedule="constant", warmup=0.0, weight_decay=0.1
    )
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = one_step(config, params, zeros)
    mask = decay_mask(params)
    if name in ("muon", "normuon", "optax-muon", "teon", "sift"):  # only the matrices
        mask["embed"]["embedding"] = mask["lm_head"]["kernel"] = False
    for (path, got), decays in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(mask), strict=True
    ):
        expected = -0.01 * 0.1 * 2.0 if decays else 0.0
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=path_str(path))


def test_adamw_is_adam(few):
    """Two steps of the update rule, written out, with every number that can be set."""
    config = optimizer_of(
        "adamw", learning_rate=0.01, schedule="linear", warmup=0.0, b1=0.8, b2=0.95, eps=1e-3
    )
    tx, schedule, needs = build(config, 4)
    assert needs == "joint"
    state, m, v = tx.init(few), 0.0, 0.0
    update = jax.jit(tx.update)
    for step, g in enumerate((0.5, -0.2), 1):
        grads = jax.tree.map(lambda x, g=g: np.full_like(x, g), few)
        updates, state = update(grads, state, few)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        hat = (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-3)
        rate = 0.01 * (1 - (step - 1) / 4)
        assert float(schedule(step - 1)) == pytest.approx(rate)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_allclose(leaf, -rate * hat, rtol=1e-5)


@pytest.mark.parametrize(("size", "layers", "fits"), [(2, 2, True), (3, 2, False), (1, 1, True)])
def test_a_group_of_blocks_fits_the_model(size, layers, fits):
    """A one-line error before any computation; without it the optimizer itself raises."""
    config = optimizer_of("teon", group_size=size)
    shapes = Decoder(dataclasses.replace(EVERY_LEAF, num_layers=layers)).shapes()
    if fits:
        check_blocks(config, layers)
        jax.eval_shape(build(config, 1)[0].init, shapes)
        return
    with pytest.raises(UserError, match=f"--optimizer.group-size {size}.*{layers} block.*muon"):
        check_blocks(config, layers)
    with pytest.raises(ValueError, match="finds no group"):
        jax.eval_shape(build(config, 1)[0].init, shapes)
    check_blocks(optimizer_of("muon"), layers)


def test_a_group_that_the_model_lacks_is_one_line_before_any_compute(program, small, tmp_path):
    options = ["--optimizer.name", "teon", "--optimizer.group-size", "9"]
    done = program("train.unlearn", "quickstart", *small, *options, "--output", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    (line,) = done.err.strip().splitlines()
    assert "--optimizer.group-size 9" in line and "--optimizer.name muon" in line


@pytest.mark.parametrize("name", ["muon", "teon", "sift"])
def test_matrices_move_as_far_as_adamw(name, params):
    """One learning rate serves both parts: RMS 0.2 on kernels, sign steps of AdamW elsewhere."""
    draw = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), params)
    updates, _ = one_step(
        optimizer_of(name, learning_rate=0.01, schedule="constant", warmup=0.0), params, grads
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        leaf_name, rms = path_str(path), float(np.sqrt(np.mean(np.square(leaf)))) / 0.01
        if leaf_name.startswith("layers") and leaf_name.endswith("kernel"):
            assert 0.1 < rms < 0.3, leaf_name
        else:
            assert rms == pytest.approx(1.0, abs=0.01), leaf_name


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_clip_norm_scales_the_gradient_first(name, few):
    grads = jax.tree.map(np.ones_like, few)
    size = float(optax.tree.norm(grads))
    config = optimizer_of(name, learning_rate=0.01, clip_norm=size / 4)
    _, clipped = one_step(config, few, grads)
    _, plain = one_step(dataclasses.replace(config, clip_norm=None), few, grads)
    moments = [
        [x for p, x in jax.tree_util.tree_leaves_with_path(s) if "mu" in path_str(p).split("/")]
        for s in (clipped, plain)
    ]
    assert len(moments[0]) == len(jax.tree.leaves(few))
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, np.asarray(b) / 4, rtol=1e-5)


def test_extra_arguments_are_swallowed(few):
    extra = {"value": 1.0, "unknown": None}
    for name in WITH_GRADIENT:
        tx, _, needs = build(optimizer_of(name, clip_norm=1.0), 2)
        both = extra | ({"constraint_grads": few} if needs == "split" else {})
        jax.eval_shape(lambda x, t=tx, e=both: t.update(x, t.init(x), x, **e), few)


def test_table_is_consistent():
    shared = {"name", "learning_rate", "schedule", "warmup", "weight_decay", "clip_norm"}
    shared |= {"hold", "floor"}
    assert {field.name for field in dataclasses.fields(Options)} == shared
    for name, row in OPTIMIZERS.items():
        assert row.name == name == row.options().name and row.summary
        assert row.needs in ("joint", "split", "value", "lazy")
        fields = dataclasses.fields(row.options)
        assert {field.name for field in fields} == shared | set(row.own) and row.own
        assert all(field.metadata["doc"] for field in fields)
        assert (row.sides > 0) == ("queries" in row.own) == (row.needs in ("value", "lazy"))
        check(optimizer_of(name))


def test_another_optimizer_keeps_what_it_reads():
    tuned = optimizer_of("sift", learning_rate=0.5, schedule="cosine", momentum=0.8, rank=7)
    assert other(tuned, "muon") == optimizer_of(
        "muon", learning_rate=0.5, schedule="cosine", momentum=0.8
    )
    assert other(tuned, "zo-muon").rank == 7
    assert other(optimizer_of("sift"), "zo-muon") == optimizer_of("zo-muon")  # no default of sift's
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        other(tuned, "adam")


# Which optimizer, combiner and objective go together.


def refusal(name, combine, objective=None):
    """The message that refuses a pair, or None."""
    row, options = objectives.resolve(objective or objective_of("graddiff"))
    try:
        check_pair(optimizer_of(name), combine, row, options)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def test_an_option_that_is_not_read_is_refused():
    check(optimizer_of("sift", rank=8))
    with pytest.raises(UserError, match=r"--optimizer.rank 8: muon does not read it; .* momentum"):
        check(optimizer_of("muon", rank=8))
    with pytest.raises(UserError, match=r"--optimizer.group-size 3: adamw"):
        check(optimizer_of("adamw", group_size=3))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("combine", COMBINERS)
def test_pairs(name, combine):
    message = refusal(name, combine)
    if OPTIMIZERS[name].needs == "joint" or combine == "sum":
        assert message is None
        assert build(over_rows(optimizer_of(name), 4), 2, combine)[2] == (
            OPTIMIZERS[name].needs if combine == "sum" else "split"
        )
    else:
        assert message and f"--combine {combine}" in message and name in message


NEEDS = "{} needs the gradients of forget and retain, and objective {}"


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (objective_of("nll"), "nll here has train alone; {}"),
        (objective_of("ga"), "ga here has forget alone; {}"),
        (objective_of("dpo", retain="none"),
         "dpo here has forget and idk alone; set --objective.retain nll, or {}"),
        (objective_of("npo", retain_weight=0.0),
         "npo here weighs retain with 0; raise the weight, or {}"),
        (objective_of("npo", forget_weight=0.0),
         "npo here weighs forget with 0; raise the weight, or {}"),
    ],
)  # fmt: skip
def test_two_sides_are_needed(objective, told):
    for pair, what, use in (
        (("sift", "sum"), "optimizer sift", "choose another optimizer or objective"),
        (("adamw", "blur"), "--combine blur", "use --combine sum"),
    ):
        assert refusal(*pair, objective) == NEEDS.format(what, told.format(use))
    assert refusal("adamw", "sum", objective) is None


def test_messages_name_the_sides_of_the_row():
    assert "did you mean 'blur'" in (refusal("adamw", "blurr") or "")
    row, options = objectives.resolve("graddiff")
    own = dataclasses.replace(row, sides=("erase", "keep"))
    with pytest.raises(UserError, match="sift, which takes the gradients of erase and keep itself"):
        check_pair(optimizer_of("sift"), "blur", own, options)
    told = "\n".join([*list_optimizers(), *list_combiners()])
    assert len(re.findall("forget and( the)? retain", told)) == 3  # sift, twice, and pcgrad
    assert not re.search("(first|second|lower|upper) (side|loss|one)|two (sides|gradients)", told)


def test_combiners_see_both_sides(few):
    """BLUR before SGD-like steps: the retain side's gradient loses its component along forget."""
    rng = np.random.default_rng(0)
    primary = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), few)
    constraint = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), few)
    config = optimizer_of("sign", learning_rate=1.0, schedule="constant", warmup=0.0, b1=0.0)
    found = {}
    for combine in COMBINERS:
        tx, _, needs = build(config, 2, combine)
        joint = jax.tree.map(np.add, primary, constraint)
        handed, extra = (
            (joint, {}) if needs == "joint" else (primary, {"constraint_grads": constraint})
        )
        found[combine], _ = tx.update(handed, tx.init(few), few, **extra)
    flat = {k: np.concatenate([np.ravel(x) for x in jax.tree.leaves(v)]) for k, v in found.items()}
    g, h = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (primary, constraint)
    )
    np.testing.assert_array_equal(flat["sum"], -np.sign(g + h))
    np.testing.assert_array_equal(flat["blur"], -np.sign(g + h - (g @ h) / (g @ g) * g))
    assert set(found) == {"sum", "blur", "pcgrad"}


def test_hybrid_ends_on_zeroth_order():
    check_steps(optimizer_of("hybrid", period=20), 120)
    check_steps(optimizer_of("adamw"), 7)
    with pytest.raises(UserError, match="use 160 steps"):
        check_steps(optimizer_of("hybrid", period=20), 121)


def test_hybrid_follows_the_schedule_of_the_run(few):
    """Each half counts its own steps, and still uses the rate of the run's step."""
    config = optimizer_of(
        "hybrid", learning_rate=0.1, schedule="linear", warmup=0.0, b1=0.0, b2=0.0, period=2
    )
    tx, schedule, needs = build(config, 8)
    state, rates = tx.init(few), []
    ones = jax.tree.map(np.ones_like, few)
    extra = {"value_fn": lambda p: 0.0, "coeffs": np.ones(1, np.float32)}
    for _ in range(8):
        updates, state = tx.update(ones, state, few, **extra)
        rates.append(np.abs(jax.tree.leaves(updates)[0]).max())
    assert needs == "lazy"
    for step in (0, 1, 4, 5):  # sign steps of AdamW without memory
        assert rates[step] == pytest.approx(float(schedule(step)), rel=1e-5)
    assert rates[6] < rates[2]


def test_both_halves_of_hybrid_decay(params):
    """A zeroth-order step that finds no slope still decays everything but norms and biases."""
    config = optimizer_of(
        "hybrid", learning_rate=0.01, schedule="constant", warmup=0.0, weight_decay=0.1, period=1
    )
    tx, _, _ = build(config, 2)
    state = tx.init(params)._replace(count=jnp.int32(1))
    extra = {"value_fn": lambda p: jnp.float32(0.0), "coeffs": jnp.zeros(1)}
    grads = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda s: tx.update(grads, s, params, **extra))(state)
    for (path, got), decays in zip(
        jax.tree_util.tree_leaves_with_path(updates),
        jax.tree.leaves(decay_mask(params)),
        strict=True,
    ):
        expected = -0.01 * 0.1 * 2.0 if decays else 0.0
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=path_str(path))


def test_clipping_needs_gradients():
    for name in ("mezo", "zo-muon", "hybrid"):
        with pytest.raises(UserError, match="--optimizer.clip-norm"):
            check(optimizer_of(name, clip_norm=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "optimizer 'adam' is unknown; did you mean 'adamw'?"),
        ({"name": "moun"}, "optimizer 'moun' is unknown; did you mean 'muon'?"),
        ({"name": ""}, "optimizer '' is unknown; did you mean"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown; did you mean 'cosine'?"),
        ({"schedule": "lin"}, "schedule 'lin' is unknown; did you mean 'linear'?"),
        ({"learning_rate": 0.0}, "--optimizer.learning-rate is 0.0; it must be positive"),
        ({"learning_rate": -1.0}, "must be positive"),
        ({"learning_rate": math.nan}, "must be positive"),
        ({"warmup": 1.5}, "--optimizer.warmup is 1.5; it must be from 0 to 1"),
        ({"warmup": -0.1}, "it must be from 0 to 1"),
        ({"name": "muon", "comm_dtype": "bf16"}, "--optimizer.comm-dtype 'bf16' is unknown"),
        ({"comm_dtype": "bfloat16"}, "--optimizer.comm-dtype bfloat16: adamw does not read it"),
        ({"name": "sift", "rank": 0}, "--optimizer.rank is 0; it must be at least 1"),
        ({"name": "hybrid", "zo_learning_rate": 0.0}, "zo-learning-rate is 0.0; it must be posi"),
    ],
)
def test_bad_options_are_told_in_one_line(changes, message):
    def config():
        named = {"name": "adamw"} | changes
        return optimizer_of(named.pop("name"), **named)

    for call in (lambda: check(config()), lambda: build(config(), 10)):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
