"""Sign momentum and quantised updates: references, reductions, and Optax's protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_close, random_tree, run

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.sign import (
    quantize_updates,
    scale_by_sign_momentum,
    sign_momentum,
)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_signum_float64_reference(beta):
    with jax.enable_x64(True):
        params = random_tree(0, np.float64)
        grads = [random_tree(i, np.float64) for i in range(1, 6)]
        got = run(sign_momentum(0.01, beta=beta, weight_decay=0.1), params, grads)
        m, w = jax.tree.map(np.zeros_like, params), params
        for g, tree in zip(grads, got, strict=True):
            m = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, m, g)
            w = jax.tree.map(lambda w, m: w - 0.01 * (np.sign(m) + 0.1 * w), w, m)
            assert_trees_close(tree, w, rtol=1e-12)


@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_signum_is_sign_adam(b2):
    params, grads = random_tree(0), [random_tree(i) for i in range(1, 7)]
    adam = optax.chain(
        optax.scale_by_adam(0.9, b2), quantize_updates(1), optax.scale_by_learning_rate(0.01)
    )
    for a, b in zip(run(sign_momentum(0.01), params, grads), run(adam, params, grads), strict=True):
        assert_trees_close(a, b, rtol=1e-7)


def test_sign_does_not_see_the_scale_of_the_loss():
    grads = [random_tree(i) for i in range(1, 4)]
    tx = scale_by_sign_momentum(0.0)
    for g in grads:
        one, _ = tx.update(g, tx.init(g))
        other, _ = tx.update(jax.tree.map(lambda x: 1e-12 * x, g), tx.init(g))
        assert_trees_close(one, other)
        assert all((np.abs(x) == 1).all() for x in jax.tree.leaves(one))
    zeros = jax.tree.map(np.zeros_like, grads[0])
    assert_trees_close(tx.update(zeros, tx.init(zeros))[0], zeros)


def test_decay_and_mask():
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    mask = {"layers": {"up": True, "bias": False}, "tall": True, "gain": False}
    tx = sign_momentum(0.1, weight_decay=0.5, mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    want = jax.tree.map(lambda p, on: -0.05 * p * on, params, mask)
    assert_trees_close(updates, want, rtol=1e-6)


# Quantised updates


def quantize_loop(m, bits):
    if bits == 1:
        return np.sign(m)
    step = np.abs(m).max() / (2 ** (bits - 1) - 1)
    return step * np.round(m / step)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quantisation_float64_reference(bits):
    tx = quantize_updates(bits)
    with jax.enable_x64(True):
        tree = random_tree(0, np.float64)
        got, _ = jax.jit(tx.update)(tree, tx.init(tree))
        again, _ = jax.jit(tx.update)(got, tx.init(tree))
        got, again = jax.tree.map(np.asarray, (got, again))
    # Layer by layer where layers are stacked.
    want = {
        "layers": {k: np.stack([quantize_loop(x, bits) for x in v])
                   for k, v in tree["layers"].items()},
        "tall": quantize_loop(tree["tall"], bits),
        "gain": quantize_loop(tree["gain"], bits),
    }  # fmt: skip
    assert_trees_close(got, want, rtol=1e-12)
    assert_trees_close(again, got, rtol=1e-14)
    if bits > 1:
        step = np.abs(tree["tall"]).max() / (2 ** (bits - 1) - 1)
        assert np.abs(got["tall"] - tree["tall"]).max() <= step / 2 * (1 + 1e-12)
        assert len(np.unique(np.round(got["tall"] / step))) <= 2**bits - 1


def test_many_bits_are_the_identity():
    with jax.enable_x64(True):
        tree = random_tree(0, np.float64)
        got, _ = quantize_updates(53).update(tree, optax.EmptyState())
        assert_trees_close(got, tree, atol=1e-14)


@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_infinities_and_complex(bits):
    tx = quantize_updates(bits)

    def once(x):
        return tx.update({"w": x}, tx.init(None))[0]["w"]

    np.testing.assert_array_equal(once(jnp.zeros(3)), np.zeros(3))
    assert np.isnan(once(jnp.array([jnp.nan, 1.0]))[0])
    tiny = np.float32(1e-30) * np.array([7, -3, 0], np.float32)
    np.testing.assert_allclose(once(tiny), quantize_loop(tiny.astype(np.float64), bits), rtol=1e-5)
    z = jnp.array([1.0 + 7.0j, -7.0 - 2.0j])
    expected = np.sign(z) if bits == 1 else np.array([1 + 7j, -7 - 2j])
    np.testing.assert_allclose(once(z), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [0, -1, 54, 2.5, True, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits is a whole number"):
        quantize_updates(bits)


# Optax's protocol


def test_wrong_beta():
    for beta in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"got {beta}"):
            sign_momentum(0.1, beta=beta)


def test_hyperparameters_may_be_traced():
    params = random_tree(0)
    quantize = optax.inject_hyperparams(
        quantize_updates, static_args=optim.STATIC_ARGS["quantize_updates"]
    )(bits=3)
    got, _ = quantize.update(params, quantize.init(params))
    assert_trees_close(got, quantize_updates(3).update(params, optax.EmptyState())[0])


@pytest.mark.parametrize("mu_dtype", [None, jnp.float32])
def test_bfloat16(mu_dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
    tx = optax.chain(scale_by_sign_momentum(mu_dtype=mu_dtype), quantize_updates(4))
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert {m.dtype for m in jax.tree.leaves(new[0].mu)} == {jnp.dtype(mu_dtype or jnp.bfloat16)}
