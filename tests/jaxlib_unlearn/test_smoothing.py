"""SAM and randomised smoothing as gradient estimators: exact on quadratics, their limits, keys."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_close, random_tree

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.combine import blur, blur_combine
from jaxlib_unlearn.optim.sharpness import (
    randomised_smoothing,
    sam,
    sam_gradient,
    smoothed_gradient,
)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


plain_sam = jax.jit(lambda params, rho: sam_gradient(cubic, params, rho))


def cubic(params):
    """The gradient of ``sum x^3 / 3``, which depends on the position."""
    return jax.tree.map(jnp.square, params)


def test_sam_float64_reference():
    with jax.enable_x64(True):
        params = random_tree(0, np.float64)
        tx = optax.chain(sam(0.1), optax.sgd(0.05))
        state, update = tx.init(params), jax.jit(functools.partial(tx.update, grad_fn=cubic))
        for _ in range(3):
            ascent = jax.tree.map(np.square, params)
            length = norm(ascent)  # one norm over all leaves
            want = jax.tree.map(
                lambda p, a, n=length: -0.05 * (p + 0.1 * a / n) ** 2, params, ascent
            )
            updates, state = update(cubic(params), state, params)
            assert_trees_close(updates, want, rtol=1e-12)
            assert float(state[0].grad_norm) == pytest.approx(length, rel=1e-6)
            params = jax.tree.map(np.add, params, want)
    assert int(state[0].count) == 3


@pytest.mark.parametrize("given", [True, False])
def test_the_incoming_gradient_saves_a_call(given):
    calls = []

    def grad_fn(params):
        calls.append(params)
        return cubic(params)

    params = random_tree(0)
    tx = sam(0.3)
    updates = cubic(params) if given else None
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params, grad_fn=grad_fn)[0])
    assert_trees_close(update(updates), plain_sam(params, 0.3), rtol=1e-6)
    assert len(calls) == (1 if given else 2)


def test_sam_moves_by_rho_and_not_at_all_without_a_gradient():
    params = random_tree(0)
    moved = sam_gradient(lambda p: p, params, 0.25)  # the gradient there is the point itself
    assert norm(jax.tree.map(np.subtract, moved, params)) == pytest.approx(0.25, rel=1e-5)
    zeros = jax.tree.map(np.zeros_like, params)
    assert_trees_close(sam_gradient(lambda p: p, params, 0.25, zeros), params)
    assert_trees_close(sam_gradient(cubic, zeros, 0.25), zeros)


@pytest.mark.parametrize("tx", [sam(0.0), randomised_smoothing(0.0, 3)], ids=["sam", "smoothing"])
def test_no_perturbation_is_the_plain_gradient(tx):
    params = random_tree(0)
    update = jax.jit(functools.partial(tx.update, grad_fn=cubic))
    got, _ = update(cubic(params), tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, got, cubic(params))


def test_only_the_forget_gradient_is_perturbed():
    params, retain = random_tree(0), random_tree(1)
    tx = optax.chain(sam(0.1), blur(0.5))
    update = jax.jit(functools.partial(tx.update, grad_fn=cubic))
    got, _ = update(None, tx.init(params), params, constraint_grads=retain)
    want, _ = jax.jit(blur_combine)(plain_sam(params, 0.1), retain, 0.5)
    assert_trees_close(got, want, rtol=1e-5, atol=1e-6)


# Randomised smoothing


@jax.jit
def draws(params, seed, count, sample):
    """The documented keys, derived independently."""
    key = jax.random.key(seed, impl="threefry2x32")
    for data in (zlib.crc32(b"randomised_smoothing"), count, sample):
        key = jax.random.fold_in(key, data)

    def draw(path, p):
        text = "/".join(str(entry.key) for entry in path)
        leaf_key = jax.random.fold_in(key, zlib.crc32(text.encode()))
        return jax.random.normal(leaf_key, p.shape, p.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def test_smoothing_float64_reference():
    with jax.enable_x64(True):
        params = random_tree(0, np.float64)
        tx = randomised_smoothing(0.3, 4, seed=5)
        state, update = tx.init(params), jax.jit(functools.partial(tx.update, grad_fn=cubic))
        for count in range(3):
            noise = [draws(params, 5, count, sample) for sample in range(4)]
            want = jax.tree.map(
                lambda p, *zs: np.mean([(p + 0.3 * z) ** 2 for z in zs], axis=0), params, *noise
            )
            got, state = update(None, state, params)
            assert_trees_close(got, want, rtol=1e-11, atol=1e-13)


def test_smoothed_gradient_has_the_right_mean():
    """The gradient of the smoothed ``x^3 / 3`` is ``x^2 + sigma^2``."""
    params = {"w": jnp.array([1.0, -2.0, 0.0])}
    got = jax.jit(lambda p: smoothed_gradient(cubic, p, 0.5, 4000))(params)
    # Four standard errors of the widest coordinate: sd of (x + s z)^2 is at most 2.1.
    np.testing.assert_allclose(got["w"], np.square(params["w"]) + 0.25, atol=4 * 2.1 / 4000**0.5)


def test_a_draw_belongs_to_seed_step_and_leaf():
    @jax.jit
    def where(params, seed, count):
        return smoothed_gradient(lambda p: p, params, 1.0, 1, seed=seed, count=count)

    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    base = where(params, seed=1, count=2)
    np.testing.assert_array_equal(where({"a": params["a"]}, seed=1, count=2)["a"], base["a"])
    with jax.default_prng_impl("rbg"):
        jax.tree.map(np.testing.assert_array_equal, where(params, seed=1, count=2), base)
    others = [base["b"], where(params, seed=2, count=2)["a"], where(params, seed=1, count=3)["a"]]
    for other in others:
        assert np.abs(np.asarray(base["a"]) - other).min() > 1e-3


@pytest.mark.fused
def test_memory_does_not_grow_with_the_samples():
    params = {"w": jnp.ones((16, 16))}

    def peak(samples):
        fn = jax.jit(lambda p: smoothed_gradient(cubic, p, 0.1, samples))
        return fn.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert peak(50) <= peak(2) + 1024  # 50 trees would be 50 KiB


# Optax's protocol


@pytest.mark.parametrize("tx", [sam(0.1), randomised_smoothing(0.1, 2)], ids=["sam", "smoothing"])
def test_missing_arguments(tx):
    params = random_tree(0)
    with pytest.raises(ValueError, match=r"grad_fn=f"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(params, tx.init(params), grad_fn=cubic)


def test_hyperparameters_may_be_traced():
    params = random_tree(0)
    for make, static, options in (
        (sam, optim.STATIC_ARGS["sam"], {"rho": 0.2}),
        (
            randomised_smoothing,
            optim.STATIC_ARGS["randomised_smoothing"],
            {"sigma": 0.2, "num_samples": 2, "seed": 3},
        ),
    ):
        tx = optax.inject_hyperparams(make, static_args=static)(**options)
        got, _ = jax.jit(functools.partial(tx.update, grad_fn=cubic))(None, tx.init(params), params)
        fixed = make(**options)
        update = jax.jit(functools.partial(fixed.update, grad_fn=cubic))
        want, _ = update(None, fixed.init(params), params)
        assert_trees_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tx", [sam(0.5), randomised_smoothing(0.5, 2)], ids=["sam", "smoothing"])
def test_bfloat16_parameters(tx):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
    for incoming in (None, cubic(params)):
        got, _ = jax.jit(functools.partial(tx.update, grad_fn=cubic))(
            incoming, tx.init(params), params
        )
        assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(got))
    assert norm(jax.tree.map(lambda a, b: a - b, got, cubic(params))) > 0.1


def test_wrong_arguments():
    for make, match in (
        (lambda: sam(-0.1), "rho must not be negative, got -0.1"),
        (lambda: randomised_smoothing(-1.0), "sigma must not be negative, got -1.0"),
        (lambda: randomised_smoothing(1.0, 0), "num_samples .* got 0"),
        (lambda: smoothed_gradient(cubic, jnp.ones(2), 1.0, 1.5), "num_samples .* got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
