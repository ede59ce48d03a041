"""A step keeps one copy of the parameters: donated buffers are reused, nothing else is copied."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.costs.flops import count_jaxpr
from train.engine.step import Losses, TrainState, make_step
from train.options.optimizers import COMBINERS, OPTIMIZERS, build, over_rows
from train.options.optimizers import options_of as optimizer_of

pytestmark = pytest.mark.fused

DECODER = Decoder(DecoderConfig(64, 32, 96, 3, 4, 2, 8), "full")
LEARNER = DecoderLearner(DECODER)
PARAMS = DECODER.shapes()


def shapes(streams, rows=2, length=8, labels=4):
    ints = {n: (rows, length) for n in ("tokens", "positions", "segment_ids")}
    ints |= {n: (rows, labels) for n in ("label_index", "targets")} | {"row_id": (rows,)}
    one = {n: jax.ShapeDtypeStruct(shape, jnp.int32) for n, shape in ints.items()}
    floats = {"target_mask": (rows, labels), "ref_log_probs": (rows, labels)}
    one |= {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in floats.items()}
    return dict.fromkeys(streams, one)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(name, combine="sum", accumulate=1, objective="graddiff"):
    row, options = objectives.resolve(objective_of(objective))
    more = {"period": 1} if name == "hybrid" else {}
    tx, schedule, needs = build(over_rows(optimizer_of(name, **more), 2), 10, combine)
    step = make_step(LEARNER, row, options, tx, schedule, accumulate, needs)
    opt_state = jax.eval_shape(tx.init, PARAMS)
    state = TrainState(PARAMS, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        made = jax.jit(step, donate_argnums=0).lower(state, None, shapes(row.streams)).compile()
    return state, made


def check(state, made):
    memory = made.memory_analysis()
    # All but a few numbers: JAX passes no buffer for those that a step does not read.
    assert memory.alias_size_in_bytes >= size(state) - 4096
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096  # metrics
    # XLA copies a donated array when it cannot tell that its last reader comes before its writer.
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(%state_(\w+?)\.?\d*\)", made.as_text())
    large = [name for dims, name in copied if dims.count(",") >= 1]
    assert not large, large


# One for each kind of `needs` by default; each takes seconds to compile.
QUICK = ("adamw", "sift", "mezo")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_every_optimizer(name):
    check(*compiled(name))


@pytest.mark.parametrize(
    ("combine", "accumulate", "objective"),
    [
        ("sum", 2, "npo"),
        *(
            pytest.param(name, 1, "graddiff", marks=pytest.mark.slow)
            for name in COMBINERS
            if name != "sum"
        ),
    ],
)
def test_combiners_and_micro_batches(combine, accumulate, objective):
    check(*compiled("adamw", combine, accumulate, objective))


def test_the_check_sees_a_copy():
    """A step that reads the old parameters after writing the new ones cannot work in place."""

    def step(state):
        new = jax.tree.map(lambda x: 2 * x, state)
        return new, jax.lax.fori_loop(
            0, 3, lambda i, c: c + jnp.sum(state.params["w"] * i), jnp.sum(new.params["w"])
        )

    state = TrainState({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, (), ())
    made = jax.jit(step, donate_argnums=0).lower(state).compile()
    with pytest.raises(AssertionError, match="params"):
        check(state, made)


def test_two_gradients_cost_one_forward_pass_each():
    """The metrics of a side come from its own pass: they do not cost the other side's."""
    row, options = objectives.resolve(objective_of("graddiff"))
    batches = shapes(row.streams)

    def gradients(sides):
        def run(params, batches):
            losses = Losses(LEARNER, row, options, params, None, batches, 1)
            return losses.gradients(params, sides)

        return jax.jit(run).lower(PARAMS, batches).compile().cost_analysis()["flops"]

    metrics, both = jax.eval_shape(
        lambda p, b: Losses(LEARNER, row, options, p, None, b, 1).gradients(
            p, ("forget", "retain")
        ),
        PARAMS,
        batches,
    )
    assert set(metrics) == {"loss", "forget_loss", "retain_loss"} and len(both) == 2
    assert gradients(("forget", "retain")) <= 1.02 * gradients((None,))


@pytest.mark.parametrize(("side", "accumulate"), [("forget", 1), ("retain", 2)])
def test_a_side_of_weight_0_costs_no_pass(side, accumulate):
    def flops(**weights):
        row, options = objectives.resolve(objective_of("graddiff", **weights))

        def run(params, batches):
            losses = Losses(LEARNER, row, options, params, None, batches, accumulate)
            return losses.gradients(params)

        closed = jax.make_jaxpr(run)(PARAMS, shapes(row.streams))
        live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        return count_jaxpr(ClosedJaxpr(live, closed.consts)).flops

    both, one = flops(), flops(**{f"{side}_weight": 0.0})
    assert both > 0 and one == both / 2


def test_metrics_do_not_depend_on_how_gradients_are_asked_for():
    row, options = objectives.resolve(objective_of("graddiff"))
    draw = np.random.default_rng(0)
    batches = jax.tree.map(
        lambda x: draw.integers(0, 4, x.shape).astype(x.dtype), shapes(row.streams)
    )
    batches = {n: b | {"segment_ids": np.ones((2, 8), np.int32)} for n, b in batches.items()}
    params = DECODER.init(jax.random.key(0))

    @jax.jit
    def run(params):
        losses = Losses(LEARNER, row, options, params, None, batches, 2)
        return losses.gradients(params), losses.gradients(params, ("forget", "retain"))

    (one, (joint,)), (two, split) = run(params)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)
    added = jax.tree.map(jnp.add, *split)
    for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
