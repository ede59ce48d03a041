"""ZO-Muon: against NumPy in float64, its invariances, its subspaces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn.optim import orthogonalize
from jaxlib_unlearn.optim.zeroth_order.leaves import layout_of
from jaxlib_unlearn.optim.zeroth_order.methods import subspace_mezo
from jaxlib_unlearn.optim.zeroth_order.perturbations import QUERY, draw_core, subspace
from jaxlib_unlearn.optim.zeroth_order.zo_muon import scale_by_zo_muon, zo_muon

A, B, C = 3.4445, -4.7750, 2.0315


def tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"tall": (6, 3), "wide": (3, 6), "square": (2, 4, 4), "bias": (5,)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def loss(params, xp=jnp):
    total = 0.0
    for i, x in enumerate(jax.tree.leaves(params)):
        weight = np.cos(np.arange(x.size) + i).reshape(x.shape)
        total = total + xp.sum(xp.sin(x) * weight) + 0.1 * xp.sum(x**2)
    return total


def jordan(x):
    """Five steps of Newton-Schulz in NumPy, on the short side."""
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if turned else x


def one_step(tx, params, value_fn=loss, state=None):
    state = tx.init(params) if state is None else state
    return jax.jit(lambda s, p: tx.update(None, s, p, value_fn=value_fn))(state, params)


def stream(seed, purpose, number):
    base = jax.random.key(jnp.uint32(seed), impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, purpose), number)


def test_three_steps_equal_a_numpy_loop_in_float64():
    q, eps, rate, aux, decay = 3, 1e-3, 0.1, 0.01, 0.2
    with jax.enable_x64(True):
        params = tree(jnp.float64)
        tx = zo_muon(
            rate,
            num_queries=q,
            rank=2,
            eps=eps,
            refresh_every=2,
            aux_learning_rate=aux,
            weight_decay=decay,
            seed=5,
        )
        layout, family = layout_of(params), subspace(2)
        names = list(params)
        names.sort()
        state, bases = tx.init(params), []
        step = jax.jit(lambda s, p: tx.update(None, s, p, value_fn=loss))
        for t in range(3):
            updates, state = step(state, params)
            kept = state.proj["0"].items()
            basis = {k: None if b is None else np.asarray(b) for k, b in kept}
            bases.append(basis["tall"])
            base_loss = loss(params, np)
            sums = {k: 0.0 for k in names}
            for i in range(q):
                key = jax.random.fold_in(stream(5, QUERY, t), i)
                cores = {
                    k: np.asarray(
                        draw_core(family, leaf, jax.random.fold_in(key, leaf.code), None, {})
                    )
                    for k, leaf in zip(names, layout.leaves, strict=True)
                }
                moved = {}
                for k in names:
                    z = cores[k]
                    if basis[k] is not None:
                        z = np.einsum("nir,nor->nio", z, basis[k]).reshape(params[k].shape)
                    moved[k] = np.asarray(params[k]) + eps * z
                c = (loss(moved, np) - base_loss) / eps
                np.testing.assert_allclose(state.coeffs[i], c, rtol=1e-8, atol=1e-8)
                sums = {k: sums[k] + c * cores[k] / q for k in names}
            for k in names:
                if basis[k] is None:
                    want = -aux * sums[k]
                else:
                    out = [jordan(r) @ p.T for r, p in zip(sums[k], basis[k], strict=True)]
                    want = np.stack(out).reshape(params[k].shape)
                    want = -rate * (want + decay * np.asarray(params[k]))
                # Newton-Schulz turns rounding of the coefficients (1e-10) into at most 1e-7.
                np.testing.assert_allclose(updates[k], want, atol=1e-7, err_msg=k)
            params = optax.apply_updates(params, updates)
        assert np.array_equal(bases[0], bases[1]) and not np.array_equal(bases[1], bases[2])
        np.testing.assert_allclose(state.value, base_loss, rtol=1e-12)


def test_bases_are_orthonormal_and_bounded_by_the_smaller_side():
    params = tree()
    _, state = one_step(zo_muon(0.1, rank=64), params)
    shapes = {k: None if b is None else b.shape for k, b in state.proj["0"].items()}
    # One matrix of (out, r) each, and two for the stack.
    assert shapes == {"tall": (1, 3, 3), "wide": (1, 6, 3), "square": (2, 4, 4), "bias": None}
    for basis in jax.tree.leaves(state.proj):
        gram = jnp.einsum("nor,nos->nrs", basis, basis)
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=2e-6
        )


def test_loss_scale_offset_and_sign():
    params = tree()
    tx = zo_muon(0.1, rank=2, num_queries=2, aux_learning_rate=0.1, estimator="jvp")

    def scaled(params, state):
        def one(scale, offset):
            return tx.update(None, state, params, value_fn=lambda p: scale * loss(p) + offset)[0]

        return [one(s, o) for s, o in ((1.0, 0.0), (4.0, 0.0), (1.0, 100.0), (-1.0, 0.0))]

    plain, four, shifted, flipped = jax.jit(scaled)(params, tx.init(params))
    for k in params:
        np.testing.assert_allclose(shifted[k], plain[k], atol=1e-6)
        np.testing.assert_allclose(flipped[k], -plain[k], atol=1e-6)
        factor = 4.0 if k == "bias" else 1.0
        np.testing.assert_allclose(four[k], factor * plain[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, low, high",
    # float32 singular values to 1e-5; Jordan's band from muon.md; 0.72 by definition.
    [("svd", 1 - 1e-5, 1 + 1e-5), ("jordan", 0.68, 1.16), ("normalize", None, None)],
)
def test_norm_rank_and_column_space_of_an_update(name, low, high):
    params = {"w": jnp.zeros((64, 10))}
    how = {"svd": orthogonalize.svd(), "jordan": None, "normalize": "normalize"}[name]
    tx = zo_muon(0.5, rank=4, num_queries=8, orthogonalize=how)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(64, 10)), jnp.float32)
    updates, state = one_step(tx, params, lambda p: jnp.sum(jnp.sin(p["w"] * weight)))
    update, basis = np.asarray(updates["w"]) / 0.5, np.asarray(state.proj["0"]["w"][0])
    values = np.linalg.svd(update, compute_uv=False)
    assert values[4:].max() < 1e-5
    if low is None:
        np.testing.assert_allclose(np.linalg.norm(update), 0.72 * 2, rtol=1e-5)
    else:
        assert low <= values[:4].min() and values[:4].max() <= high
    # The rows are in the span of P, on the output side.
    np.testing.assert_allclose(update @ basis @ basis.T, update, atol=1e-5)


def test_zero_differences_are_a_step_of_zero():
    updates, _ = one_step(zo_muon(0.1, rank=2), tree(), lambda p: jnp.float32(1.0))
    for k, u in updates.items():
        np.testing.assert_array_equal(u, 0.0, err_msg=k)


def test_one_query_keeps_only_the_sign_of_its_coefficient():
    params = {"w": tree()["tall"]}
    tx = zo_muon(0.1, rank=2, num_queries=1)
    replay = jax.jit(lambda c: tx.update(None, tx.init(params), params, coeffs=c)[0]["w"])
    small, large, other = (replay(jnp.asarray([c], jnp.float32)) for c in (0.01, 7.0, -3.0))
    np.testing.assert_allclose(small, large, atol=1e-5)
    np.testing.assert_allclose(other, -large, atol=1e-5)


def test_without_orthogonalisation_it_is_subspace_mezo():
    params, shared = tree(), {"rank": 2, "seed": 3, "num_queries": 2, "estimator": "central"}
    ours, _ = one_step(zo_muon(0.1, orthogonalize="none", **shared), params)
    theirs, _ = one_step(subspace_mezo(0.1, **shared), params)
    for k in params:
        np.testing.assert_array_equal(ours[k], theirs[k], err_msg=k)


def _slope(tx, params, grad, seeds):
    """Mean of <estimate, projected gradient> over its square norm."""

    def one(seed):
        state = tx.init(params)._replace(seed=seed)
        updates, state = tx.update(None, state, params, value_fn=lambda p: jnp.sum(grad * p["w"]))
        basis = state.proj["0"]["w"][0]
        target = grad @ basis @ basis.T
        return jnp.sum(updates["w"] * target) / jnp.sum(jnp.square(target))

    return float(jnp.mean(jax.jit(jax.vmap(one))(seeds)))


def test_a_refresh_step_keeps_the_whole_signal():
    grad = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    tx = scale_by_zo_muon(
        num_queries=4, rank=2, refresh_every=1, orthogonalize="none", estimator="jvp"
    )
    # E = 1. One estimate has variance about 2 / q; 4000 of them a standard error of 0.011. A
    # separate P for every query (the public code on such steps) leaves 0.25 + 0.75 * 2 / 8.
    slope = _slope(tx, {"w": jnp.zeros((6, 8))}, grad, jnp.arange(4000, dtype=jnp.uint32))
    assert abs(slope - 1) < 0.04


def test_unknown_orthogonaliser_is_told():
    with pytest.raises(ValueError, match="'polar'"):
        zo_muon(0.1, orthogonalize="polar")


def test_loss_falls_on_a_low_rank_target():
    target = np.random.default_rng(0).normal(size=(8, 2)) @ np.ones((2, 8)) / 4
    params = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}

    def value_fn(p):
        return jnp.mean(jnp.square(p["w"] + p["b"] - target))

    tx = zo_muon(0.02, rank=8, num_queries=8, aux_learning_rate=0.02)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), state.value

        return jax.lax.scan(body, (params, tx.init(params)), length=200)[1]

    values = run(params)
    assert values[-1] < 0.5 * values[0]
