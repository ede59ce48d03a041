"""One SIFT chain in three loops: ``nnx.Optimizer``, a plain loop, a linen ``TrainState``."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from jaxlib_unlearn.optim.spectral.sift import scale_by_sift, sift

WIDTHS = (6, 8, 4)
STEPS = 3


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(*WIDTHS[:2], rngs=rngs)
        self.down = nnx.Linear(*WIDTHS[1:], rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTHS[1], name="up")(x))
        return nn.Dense(WIDTHS[2], name="down")(x)


def batch(seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((5, n)), jnp.float32) for n in (WIDTHS[0], WIDTHS[-1])]


def losses(predict):
    """Primary and constraint: towards other targets on overlapping inputs."""
    (x, y), (z, t) = batch(0), batch(1)

    def forget(model):
        return jnp.mean((predict(model, x) - y) ** 2)

    def retain(model):
        return jnp.mean((predict(model, z - x) + t) ** 2)

    return forget, retain


OPTIMIZERS = {
    "whole": lambda: sift(0.05, rank=2, threshold=1.5, adam_learning_rate=0.01, weight_decay=0.1),
    # Frozen-off matrices, bases and diagnostics pass through nnx's Variables as well.
    "chain": lambda: optax.chain(
        scale_by_sift(rank=2, bases="subspace", spatial_mask=lambda path: path.startswith("up")),
        optax.scale_by_learning_rate(0.05),
    ),
}


def start():
    return nnx.to_pure_dict(nnx.state(Module(), nnx.Param))


def plain_loop(tx):
    graph = nnx.graphdef(Module())
    forget, retain = losses(lambda params, x: nnx.merge(graph, params)(x))
    params = start()
    state = tx.init(params)
    for _ in range(STEPS):
        f, g = jax.grad(forget)(params), jax.grad(retain)(params)
        updates, state = tx.update(f, state, params, constraint_grads=g)
        params = optax.apply_updates(params, updates)
    return params


def in_nnx(tx):
    model = Module()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    forget, retain = losses(lambda model, x: model(x))
    for _ in range(STEPS):
        f, g = nnx.grad(forget)(model), nnx.grad(retain)(model)
        optimizer.update(model, f, constraint_grads=g)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train_state(tx):
    model = Linen()
    forget, retain = losses(lambda params, x: model.apply({"params": params}, x))
    state = TrainState.create(apply_fn=model.apply, params=start(), tx=tx)
    return state, jax.grad(forget), jax.grad(retain)


def in_linen(tx):
    state, forget, retain = train_state(tx)
    for _ in range(STEPS):
        updates, opt_state = state.tx.update(
            forget(state.params),
            state.opt_state,
            state.params,
            constraint_grads=retain(state.params),
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state.params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_homes_one_result(name):
    make = OPTIMIZERS[name]
    want = plain_loop(make())
    for home in (in_nnx, in_linen):
        # The same arithmetic, compiled in different pieces.
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), home(make()), want)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), want, start())
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_apply_gradients_has_one_stream_only():
    """Pinned: keywords of flax's method are fields of the state, not arguments of the optimizer."""
    state, forget, retain = train_state(sift(0.1))
    with pytest.raises(ValueError, match="constraint_grads="):
        state.apply_gradients(grads=forget(state.params))
    with pytest.raises(ValueError, match="constraint_grads="):
        state.apply_gradients(grads=forget(state.params), constraint_grads=retain(state.params))
