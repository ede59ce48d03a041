"""Sophia-G in SOUL's and the paper's form: references, limits, and Optax's protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_close, random_tree, run

from jaxlib_unlearn.optim.sophia import (
    scale_by_sophia,
    sophia,
)


def soul_loop(w, grads, rate, decay, b1=0.9, b2=0.95, rho=0.04, bs=5120):
    """In the order of SOUL's code: curvature, momentum, decay, momentum again, step."""
    m, h = np.zeros_like(w), np.zeros_like(w)
    for g in grads:
        h = b2 * h + (1 - b2) * g * g
        m = b1 * m + (1 - b1) * g
        w = w * (1 - rate * decay)
        m = b1 * m + (1 - b1) * g
        w = w - rate * np.sign(m) * np.minimum(1, np.abs(m) / (rho * bs * h + 1e-15))
        yield w


def paper_loop(w, grads, rate, decay, b1=0.9, b2=0.95, gamma=204.8, eps=1e-15):
    m, h = np.zeros_like(w), np.zeros_like(w)
    for g in grads:
        m = b1 * m + (1 - b1) * g
        h = b2 * h + (1 - b2) * g * g
        w = w - rate * (np.clip(m / np.maximum(gamma * h, eps), -1, 1) + decay * w)
        yield w


@pytest.mark.parametrize("size", [1.0, 3e-2])  # most coordinates free, most clipped
@pytest.mark.parametrize("form, loop", [("soul", soul_loop), ("paper", paper_loop)])
def test_float64_reference(form, loop, size):
    with jax.enable_x64(True):
        params = random_tree(0, np.float64)
        grads = [random_tree(i, np.float64, size=size) for i in range(1, 6)]
        got = run(sophia(0.01, form=form, weight_decay=0.1), params, grads)
        for i, w in enumerate(jax.tree.leaves(params)):
            leaf_grads = [jax.tree.leaves(g)[i] for g in grads]
            for tree, want in zip(got, loop(w, leaf_grads, 0.01, 0.1), strict=True):
                np.testing.assert_allclose(jax.tree.leaves(tree)[i], want, rtol=1e-11)


def test_two_averages_a_step_are_one_with_the_square():
    params, grads = random_tree(0), [random_tree(i, size=0.03) for i in range(1, 5)]
    soul, paper = sophia(0.01, b1=0.9, form="soul"), sophia(0.01, b1=0.81, form="paper")
    for a, b in zip(run(soul, params, grads), run(paper, params, grads), strict=True):
        assert_trees_close(a, b, rtol=1e-6)


@pytest.mark.parametrize("form", ["soul", "paper"])
def test_limits(form):
    tx = scale_by_sophia(form=form)
    update = jax.jit(tx.update)
    g = random_tree(0)
    state = tx.init(g)
    for i in range(4):
        u, state = update(random_tree(i, size=10.0**-i), state)
        assert all((np.abs(x) <= 1).all() for x in jax.tree.leaves(u))
    # No curvature seen, then a gradient too small to leave any: the sign.
    u, _ = update(jax.tree.map(lambda x: 1e-6 * x, g), tx.init(g))
    assert_trees_close(u, jax.tree.map(np.sign, g))
    # A large rho: nothing is clipped, m / (rho bs h).
    beta = 0.81 if form == "soul" else 0.9
    tx = scale_by_sophia(form=form, rho=1e4, batch_scale=2.0)
    update = jax.jit(tx.update)
    u, _ = update(g, tx.init(g))
    want = jax.tree.map(lambda x: (1 - beta) * x / (2e4 * 0.05 * x * x), g)
    assert_trees_close(u, want, rtol=1e-5)
    zeros = jax.tree.map(np.zeros_like, g)
    assert_trees_close(update(zeros, tx.init(g))[0], zeros)


def test_decay_and_mask():
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    mask = {"layers": {"up": True, "bias": False}, "tall": True, "gain": False}
    tx = sophia(0.1, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    want = jax.tree.map(lambda p, on: -0.05 * p * on, params, mask)
    assert_trees_close(updates, want, rtol=1e-6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="form is 'soul' or 'paper', got 'g'"):
        sophia(0.1, form="g")
    for name, value in (("b1", 1.0), ("b2", -0.1), ("rho", 0.0), ("batch_scale", -1), ("eps", 0)):
        with pytest.raises(ValueError, match=f"{name} .*got {value}"):
            sophia(0.1, **{name: value})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_keep_a_float32_curvature(dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree(0))
    tx = scale_by_sophia(mu_dtype=jnp.float32)
    state = tx.init(params)
    g = jax.tree.map(lambda x: jnp.asarray(1e-3 * x, dtype), random_tree(1))
    updates, new = jax.jit(tx.update)(g, state)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
    assert_trees_close(new.h, jax.tree.map(lambda x: 0.05 * x * x, wide), rtol=1e-5)
