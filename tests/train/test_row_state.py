"""Rows with a dual variable, with an estimator on one side, and without training."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from points import FORGET, LEARNER, RETAIN, STREAMS, Bounded, PointModel, row_of

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Context
from jaxlib_unlearn.objectives.base import Options, named, no_loss
from jaxlib_unlearn.optim.sharpness import sam_gradient
from jaxlib_unlearn.options import option
from train.engine import run as runs
from train.engine.run import Recipe, Run, edit
from train.engine.step import Losses
from train.options.checks import check_estimators
from train.options.config import TrainConfig
from train.options.optimizers import options_of as optimizer_of
from train.runtime import distributed
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker


def advance(state, means, options, progress):
    """The dual variable rises while the retain loss is above its budget."""
    dual = jnp.maximum(0.0, state["dual"] + options.rate * (means["retain"] - options.budget))
    return {"dual": dual, "epoch": progress.epoch, "done": progress.done}


DUAL = row_of(
    init_state=lambda key, options, sizes: {
        "dual": jnp.float32(options.retain_weight), "epoch": jnp.float32(0), "done": jnp.float32(0)
    },
    advance=advance,
    weigh=lambda options, state: dataclasses.replace(options, retain_weight=state["dual"]),
)  # fmt: skip


def train(folder, row=DUAL, steps=400, seen=None):
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    adamw = optimizer_of("adamw", learning_rate=0.1, warmup=0.0, weight_decay=0.0)
    stage = TrainConfig(steps=steps, batch_size=4, optimizer=adamw)
    if seen is not None:
        row = dataclasses.replace(row, advance=lambda *args: seen(advance(*args)))
    base: Any = PointModel(LEARNER, {"w": jnp.array([3.0, 1.0])}, "start")
    run = Run(folder, mesh, 0, Tracker(folder))
    trained = runs.train(run, "dual", base, (row, Bounded()), STREAMS, Recipe(stage, adamw))
    return trained, [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("dual"))


def test_a_dual_variable_holds_its_budget(undisturbed):
    """At the optimum |w|^2 / 2 is the budget; w lies on the line between the two points."""
    trained, lines = undisturbed
    np.testing.assert_allclose(trained.params["w"], [1.0, 0.0], atol=5e-3)
    assert abs(lines[-1]["retain_loss"] - 0.5) < 5e-3  # a mean without the dual variable
    assert lines[0]["loss"] == pytest.approx(lines[0]["forget_loss"] + lines[0]["retain_loss"])
    gap = lines[-1]["loss"] - lines[-1]["forget_loss"]
    assert gap == pytest.approx(2.0 * lines[-1]["retain_loss"], rel=0.05)  # the dual is 2 there


def test_a_state_goes_on_where_it_was_stopped(undisturbed, tmp_path, monkeypatch):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 150

    with monkeypatch.context() as patch, pytest.raises(distributed.Preempted):
        patch.setattr(distributed, "asked_to_stop", stop)
        train(tmp_path)
    trained, lines = train(tmp_path)
    assert (trained.sha, lines) == (undisturbed[0].sha, undisturbed[1])


def test_advance_sees_epochs(tmp_path):
    """Eight rows in batches of four: an epoch is two steps."""
    found = []

    def seen(state):
        jax.debug.callback(lambda *x: found.append(x), state["epoch"], state["done"], ordered=True)
        return state

    train(tmp_path, steps=4, seen=seen)
    jax.effects_barrier()
    np.testing.assert_allclose(found, [(0.5, 0.25), (1, 0.5), (1.5, 0.75), (2, 1)])


def test_an_estimator_of_one_side_against_float64():
    """SAM on the forget side alone: the retain gradient is plain, in one gradient and in two."""
    row = row_of(
        estimators=lambda options: {
            "forget": lambda e: sam_gradient(e.grad_fn, e.params, 0.5, e.gradient)
        }
    )
    with jax.enable_x64(True):
        w = np.array([1.0, 2.0])
        batches = {n: s.batch(range(4), (), 0) for n, s in STREAMS.items()}
        options = Bounded(forget_weight=0.5, retain_weight=3.0)
        params = {"w": jnp.asarray(w, jnp.float64)}
        losses = Losses(LEARNER, row, options, params, None, batches)
        ascent = 0.5 * (w - FORGET)
        forget = 0.5 * (w + 0.5 * ascent / np.linalg.norm(ascent) - FORGET)
        retain = 3.0 * (w - RETAIN)
        metrics, (joint,) = losses.gradients(params)
        _, apart = losses.gradients(params, ("forget", "retain"))
        np.testing.assert_allclose(joint["w"], forget + retain, rtol=1e-12)
        np.testing.assert_allclose(losses.grad(params)["w"], forget + retain, rtol=1e-12)
        np.testing.assert_allclose(apart[0]["w"], forget, rtol=1e-12)
        np.testing.assert_allclose(apart[1]["w"], retain, rtol=1e-12)
        want = 0.25 * np.sum((w - FORGET) ** 2) + 1.5 * np.sum(w**2)
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-12)
    with pytest.raises(UserError, match="mezo sees values of the loss alone.*its side forget"):
        check_estimators(optimizer_of("mezo"), row, options)


def none(estimate):
    raise AssertionError("the gradient of a side without weight is not estimated")


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_side_of_weight_0_is_left_out(side):
    """A loss that is infinite changes nothing there; a traced 0 gives the same for a finite one."""
    batches = {n: s.batch(range(4), (), 0) for n, s in STREAMS.items()}
    alone = {n: batch for n, batch in batches.items() if n != side}
    spoiled = {**batches, side: {**batches[side], "point": np.full((4, 2), np.inf, np.float32)}}
    params = {"w": jnp.array([1.0, 2.0])}

    def answers(row, batches, weight):
        options = dataclasses.replace(Bounded(), **{f"{side}_weight": weight})
        losses = Losses(LEARNER, row, options, params, None, batches)
        return losses.value(params), losses.grad(params), losses.look(params)

    row = row_of(estimators=lambda options: {side: none})
    want = answers(row, alone, 1.0)
    for found in (answers(row, spoiled, 0.0), answers(row, spoiled, 0)):
        jax.tree.map(np.testing.assert_array_equal, found, want)
    traced = jax.jit(lambda weight: answers(row_of(), batches, weight))(0.0)
    jax.tree.map(np.testing.assert_array_equal, traced[:2], want[:2])
    assert f"{side}_loss" in traced[2] and f"{side}_loss" not in want[2]


@dataclasses.dataclass(frozen=True)
class Between(Options):
    name: str = named("between")
    alpha: float = option(0.5, "share of the base model.", low=0, high=1)


def between(work, *, options, original, base):
    """``(1 - alpha) original + alpha base``."""
    return jax.tree.map(lambda x, y: x + options.alpha * (y - x), original.params, base.params)


BETWEEN = row_of(
    name="between", loss=no_loss, streams=(), columns={}, asks={}, options=Between, trains=False,
    compute=between,
)  # fmt: skip


def test_a_row_that_does_not_train(tmp_path):
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    run = Run(tmp_path, mesh, 0, Tracker(tmp_path))
    start: Any = PointModel(LEARNER, {"w": jnp.array([0.5, -3.0])}, "start")
    base: Any = PointModel(LEARNER, {"w": jnp.array([1.5, 5.0])}, "base")
    for alpha, want in ((0.0, [0.5, -3.0]), (0.5, [1.0, 1.0])):
        found = edit(run, "unlearned", start, (BETWEEN, Between(alpha=alpha)), {}, base=base)
        np.testing.assert_array_equal(found.params["w"], np.float32(want))
    with pytest.raises(ValueError, match="a row has a compute where it does not train"):
        row_of(trains=False)
    with pytest.raises(ValueError, match="is computed, not trained"):
        BETWEEN.loss(Context(None), {}, Between())  # pyright: ignore[reportArgumentType]
