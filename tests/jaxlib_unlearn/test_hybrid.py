"""First-order and zeroth-order blocks in turn: phases, frozen states, and no wasted backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.hybrid import (
    alternate,
    ends_on_zeroth_order,
    round_to_zeroth_order,
)
from jaxlib_unlearn.optim.sharpness import sam


class ToyState(NamedTuple):
    count: jax.Array
    mu: optax.Updates


def toy_zeroth_order(rate=0.1):
    """One Gaussian direction, a central difference, heavy-ball momentum."""

    def init(params):
        return ToyState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params, *, value_fn, **extra_args):
        assert updates is None
        key = jax.random.fold_in(jax.random.key(3), state.count)
        z = optax.tree.random_like(key, params)
        up, down = (value_fn(optax.tree.add_scale(params, e, z)) for e in (1e-2, -1e-2))
        mu = jax.tree.map(lambda m, x: (0.5 * m + (up - down) / 2e-2 * x).astype(m.dtype),
                          state.mu, z)  # fmt: skip
        return jax.tree.map(lambda m: -rate * m, mu), ToyState(state.count + 1, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def loss(params):
    return jnp.sum((params["w"] - 1.0) ** 2) + jnp.sum(jnp.tanh(params["w"] @ params["v"]) ** 2)


grad = jax.grad(loss)


def start(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in
            {"w": (4, 3), "v": (3, 2)}.items()}  # fmt: skip


def stepper(tx, lazy=True):
    @jax.jit
    def step(params, state):
        gradient = {"grad_fn": grad} if lazy else {}
        updates = None if lazy else grad(params)
        updates, state = tx.update(updates, state, params, value_fn=loss, **gradient)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, steps, lazy=True):
    state, step, out = tx.init(params), stepper(tx, lazy), []
    for _ in range(steps):
        params, state = step(params, state)
        out.append((params, state))
    return out


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("lazy", [True, False])
def test_equals_two_optimizers_taken_in_turn(lazy):
    first, zeroth, period = optax.adamw(0.05), toy_zeroth_order(), 3
    first_update = jax.jit(lambda s, p: first.update(grad(p), s, p))
    zeroth_update = jax.jit(lambda s, p: zeroth.update(None, s, p, value_fn=loss))
    with jax.enable_x64(True):
        params = start(np.float64)
        got = run(alternate(first, zeroth, period), params, 4 * period, lazy)
        first_state, zeroth_state = first.init(params), zeroth.init(params)
        for t, (at, state) in enumerate(got):
            if t // period % 2 == 0:
                updates, first_state = first_update(first_state, params)
            else:
                updates, zeroth_state = zeroth_update(zeroth_state, params)
            params = optax.apply_updates(params, updates)
            expected = (params, first_state, zeroth_state)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
                (at, state.first_order, state.zeroth_order),
                expected,
            )


def test_a_state_waits_in_the_other_blocks():
    period = 2
    states = [state for _, state in run(alternate(optax.adam(0.1), toy_zeroth_order(), period),
                                        start(), 4 * period)]  # fmt: skip
    for t, (before, after) in enumerate(zip(states, states[1:], strict=False), 1):
        waiting = "zeroth_order" if t // period % 2 == 0 else "first_order"
        moving = ({"zeroth_order", "first_order"} - {waiting}).pop()
        assert_same(getattr(before, waiting), getattr(after, waiting))
        counts = [int(optax.tree.get(getattr(s, moving), "count")) for s in (before, after)]
        assert counts[1] == counts[0] + 1
    assert int(states[-1].count) == 4 * period
    assert int(states[-1].zeroth_order.count) == 2 * period


def test_one_long_block_is_the_first_optimizer():
    adam = optax.with_extra_args_support(optax.adam(0.1))
    got = run(alternate(optax.adam(0.1), toy_zeroth_order(), 10**6), start(), 4)
    params, state = start(), adam.init(start())
    step = jax.jit(lambda p, s: adam.update(grad(p), s, p))
    for at, _ in got:
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), at, params)


def test_resumes_within_a_block():
    tx = alternate(optax.adam(0.1), toy_zeroth_order(), 3)
    whole = run(tx, start(), 8)
    for cut in (2, 5):
        params, state = jax.tree.map(np.asarray, whole[cut - 1])  # as after a checkpoint
        step = stepper(tx)
        for at, _ in whole[cut:]:
            params, state = step(params, state)
            assert_same(params, at)


# What a step computes


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in what it calls."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                yield from primitives(getattr(sub, "jaxpr", sub))


def test_a_zeroth_order_step_pays_no_backward():
    """The backward pass of this loss, and nothing else, computes a digamma."""

    @jax.custom_vjp
    def marked(x):
        return jnp.sum(jnp.sin(x))

    marked.defvjp(lambda x: (marked(x), x), lambda x, g: (g * jax.lax.digamma(x),))

    def value(params):
        return marked(params["w"] @ params["v"])

    tx, params = alternate(optax.adam(0.1), toy_zeroth_order(), 2), start()

    def step(params, state):
        return tx.update(None, state, params, value_fn=value, grad_fn=jax.grad(value))

    jaxpr = jax.make_jaxpr(step)(params, tx.init(params)).jaxpr
    (cond,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    # Branches are numbered: 0 where the predicate (first order) is false.
    zeroth, first = ([*primitives(branch.jaxpr)] for branch in cond.params["branches"])
    outside = [eqn.primitive.name for eqn in jaxpr.eqns if eqn is not cond]
    assert first.count("digamma") == 1
    assert "digamma" not in zeroth and "digamma" not in outside
    # One forward against two; the backward of a product is two products.
    assert (first.count("dot_general"), zeroth.count("dot_general")) == (3, 2)
    assert "dot_general" not in outside


def test_who_receives_what():
    seen = {}

    def probe(name, tx):
        tx = optax.with_extra_args_support(tx)

        def update(updates, state, params=None, **extra):
            seen[name] = (updates is None, sorted(extra))
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    tx = alternate(probe("first", optax.adam(0.1)), probe("zeroth", toy_zeroth_order()))
    params = start()
    extra = {"value_fn": loss, "grad_fn": grad, "batch": 1, "other": "x"}
    jax.eval_shape(lambda p: tx.update(None, tx.init(p), p, **extra)[0], params)
    assert seen == {
        "first": (False, ["batch", "grad_fn", "other"]),
        "zeroth": (True, ["batch", "other", "value_fn"]),
    }


def test_sam_in_the_first_order_part():
    tx = alternate(optax.chain(sam(0.1), optax.sgd(0.1)), toy_zeroth_order())
    (params, _), *_ = run(tx, start(), 1)
    alone = optax.chain(sam(0.1), optax.sgd(0.1))
    update = jax.jit(lambda p: alone.update(None, alone.init(p), p, grad_fn=grad)[0])
    updates = update(start())
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        params,
        optax.apply_updates(start(), updates),
    )


def test_with_rada_zo():
    from jaxlib_unlearn.optim import rada_zo

    tx = alternate(optax.adam(0.05), rada_zo(0.02), 10)
    params = start()
    got = run(tx, params, 40)
    assert float(loss(got[-1][0])) < 0.5 * float(loss(params))
    np.testing.assert_array_equal(
        jax.tree.leaves(got[9][1].zeroth_order)[0], jax.tree.leaves(tx.init(params).zeroth_order)[0]
    )
    for t in (10, 30):  # the first steps of its blocks move the parameters
        assert np.abs(got[t][0]["w"] - got[t - 1][0]["w"]).max() > 0


# Numbers of steps


@pytest.mark.parametrize("period", [1, 3, 20])
def test_numbers_of_steps(period):
    is_zeroth = [t // period % 2 == 1 for t in range(7 * period)]
    for steps in range(1, 7 * period):
        whole = is_zeroth[steps - 1] and (steps % period == 0)
        assert ends_on_zeroth_order(steps, period) == whole
        rounded = round_to_zeroth_order(steps, period)
        assert ends_on_zeroth_order(rounded, period) and steps <= rounded < steps + 2 * period
    assert not ends_on_zeroth_order(0, period)


@pytest.mark.parametrize("period", [0, -1, 1.5, True])
def test_wrong_period(period):
    for call in (
        lambda: alternate(optax.adam(0.1), optax.adam(0.1), period),
        lambda: ends_on_zeroth_order(4, period),
        lambda: round_to_zeroth_order(4, period),
    ):
        with pytest.raises(ValueError, match="period is a positive whole number"):
            call()


def test_missing_arguments():
    params = start()
    tx = alternate(optax.adam(0.1), toy_zeroth_order())
    state = tx.init(params)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(params, state, value_fn=loss)
    with pytest.raises(ValueError, match="value_fn=f"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="grad_fn=f"):
        tx.update(None, state, params, value_fn=loss)


# Optax's protocol


def test_injected_learning_rates():
    inject = optax.inject_hyperparams
    first = inject(optax.sgd)(learning_rate=0.1)
    tx = inject(alternate, static_args=optim.STATIC_ARGS["alternate"])(
        first_order=first, zeroth_order=toy_zeroth_order(), period=1
    )
    got = run(tx, start(), 4)
    want = run(alternate(optax.sgd(0.1), toy_zeroth_order(), 1), start(), 4)
    for (a, _), (b, _) in zip(got, want, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)
