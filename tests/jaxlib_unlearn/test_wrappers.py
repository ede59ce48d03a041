"""Accumulate, finite and clip_streams; what Optax's own wrappers do with two gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_close, random_tree

from jaxlib_unlearn.optim.combine import blur, pcgrad, weighted_sum
from jaxlib_unlearn.optim.spectral.sift import scale_by_sift, sift
from jaxlib_unlearn.optim.wrappers import accumulate, clip_streams, finite


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def jitted(tx):
    """Its update, compiled once; eager branches compile at every call."""
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def total():
    """Minus the sum of both gradients, step by step."""
    return optax.chain(weighted_sum(), optax.sgd(1.0))


def several():
    """A transformation of a primary gradient and a tuple of constraints."""

    def update(updates, state, params=None, *, constraint_grads, **extra):
        first, second = constraint_grads
        return jax.tree.map(lambda p, a, b: p + 10 * a + 100 * b, updates, first, second), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


# accumulate


@pytest.mark.parametrize("wrap, last", [(accumulate, -508.0), (optax.MultiSteps, -1003.0)])
def test_optax_multi_steps_takes_the_last_constraint(wrap, last):
    tx = jitted(wrap(total(), 2))
    state = tx.init(jnp.zeros(()))
    for g, h in ((1.0, 10.0), (5.0, 1000.0)):
        updates, state = tx.update(jnp.float32(g), state, constraint_grads=jnp.float32(h))
    assert float(updates) == last


@pytest.mark.parametrize("k", [1, 3])
def test_accumulate_float64_reference(k):
    inner = jitted(optax.chain(blur(0.5), optax.adamw(0.1)))
    with jax.enable_x64(True):
        params = random_tree(0, np.float64)
        tx, expected = accumulate(inner, k), inner.init(params)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(3):
            primary = [random_tree(10 * step + i, np.float64) for i in range(k)]
            constraint = [random_tree(100 + 10 * step + i, np.float64) for i in range(k)]
            for i, (p, c) in enumerate(zip(primary, constraint, strict=True), 1):
                before = state.inner_state
                updates, state = update(p, state, params, constraint_grads=c)
                if i < k:
                    assert all((u == 0).all() for u in jax.tree.leaves(updates))
                    assert_same(before, state.inner_state)
                    assert int(state.count) == i
            p, c = (jax.tree.map(lambda *x: np.mean(x, 0), *s) for s in (primary, constraint))
            want, expected = inner.update(p, expected, params, constraint_grads=c)
            assert_trees_close(updates, want, rtol=1e-10)
            assert int(state.count) == 0
            sums = state.primary_sum, state.constraint_sum
            assert all((x == 0).all() for x in jax.tree.leaves(sums))
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("num_constraints", [0, 1])
def test_accumulate_with_one_gradient_is_multi_steps(num_constraints):
    params = random_tree(0)
    ours = accumulate(optax.adam(0.1), 3, num_constraints=num_constraints)
    theirs = optax.MultiSteps(optax.adam(0.1), 3)
    a, b = ours.init(params), theirs.init(params)
    for i in range(7):
        g = random_tree(i)
        u, a = jax.jit(ours.update)(g, a, params)
        v, b = jax.jit(theirs.update)(g, b, params)
        assert_trees_close(u, v, rtol=1e-4, atol=1e-6)


def test_accumulate_several_constraints():
    tx = jitted(accumulate(several(), 2, num_constraints=2))
    g = jnp.ones(3)
    state = tx.init(g)
    for i in (1.0, 3.0):
        updates, state = tx.update(i * g, state, constraint_grads=(2 * i * g, 3 * i * g))
    np.testing.assert_allclose(updates, 2 + 10 * 4 + 100 * 6)
    # A tuple with the parameters' own structure is one stream.
    tx = jitted(accumulate(weighted_sum(), 2))
    pair = (jnp.ones(1), jnp.ones(2))
    state = tx.init(pair)
    for i in (1.0, 3.0):
        scaled = jax.tree.map(lambda x, i=i: i * x, pair)
        updates, state = tx.update(pair, state, constraint_grads=scaled)
    assert_trees_close(updates, jax.tree.map(lambda x: 3 * x, pair))


def test_sums_are_float32():
    """256 numbers, all but the first too small for a sum in bfloat16."""
    ones = jnp.ones(2, jnp.bfloat16)
    narrow, wide = (accumulate(total(), 256, dtype=d) for d in (jnp.bfloat16, None))
    got = []
    for tx in (narrow, wide):
        state, update = tx.init(ones), jax.jit(tx.update)
        kinds = {x.dtype for x in jax.tree.leaves((state.primary_sum, state.constraint_sum))}
        assert kinds == {jnp.dtype(jnp.bfloat16 if tx is narrow else jnp.float32)}
        for i in range(256):
            g = ones if i == 0 else ones * 2.0**-9
            updates, state = update(g, state, constraint_grads=0 * g)
        assert updates.dtype == jnp.bfloat16
        got.append(-256 * float(updates[0]))
    assert got[0] == 1.0 and got[1] == pytest.approx(1 + 255 / 512, rel=2**-8)


def test_accumulate_passes_other_arguments_on():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(sorted(extra))
        return value * updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = jitted(accumulate(inner, 2))
    g = jnp.ones(())
    state = tx.init(g)
    for value in (5.0, 7.0):
        updates, state = tx.update(g, state, value=jnp.float32(value), batch=None)
    assert float(updates) == 7.0 and seen[0] == ["batch"]


def test_accumulate_refuses():
    for k in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="k is a positive whole number"):
            accumulate(total(), k)
    with pytest.raises(ValueError, match="num_constraints must not be negative, got -1"):
        accumulate(total(), 2, num_constraints=-1)
    g = {"w": jnp.ones(2)}
    tx = accumulate(total(), 2)
    state = tx.init(g)
    with pytest.raises(ValueError, match="mean of a function, got value_fn"):
        tx.update(g, state, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match="mean of a function, got grad_fn"):
        tx.update(g, state, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="updates is None"):
        tx.update(None, state)
    with pytest.raises(ValueError, match="num_constraints=1, but constraint_grads has 2"):
        tx.update(g, state, constraint_grads=(g, g))
    with pytest.raises(ValueError, match="must be a tree like"):
        tx.update(g, state, constraint_grads={"v": jnp.ones(2)})


# finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_optax_apply_if_finite_does_not_see_the_constraint(bad):
    g = jnp.ones(2)
    h = g.at[0].set(bad)
    theirs = jitted(optax.apply_if_finite(total(), 5))
    updates, state = theirs.update(g, theirs.init(g), constraint_grads=h)
    assert bool(state.last_finite) and not np.isfinite(updates).all()
    ours = jitted(finite(total()))
    updates, state = ours.update(g, ours.init(g), constraint_grads=h)
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert not bool(state.last_finite) and int(state.total_notfinite) == 1


class ValueState(NamedTuple):
    value: jax.Array
    best: jax.Array


def watching(updates_of=lambda value, params: jnp.zeros_like(params)):
    """Keeps the value, as zeroth-order optimizers do, and a best one that starts infinite."""

    def init(params):
        return ValueState(jnp.zeros([]), jnp.asarray(jnp.inf))

    def update(updates, state, params=None, *, value_fn, **extra):
        value = value_fn(params)
        return updates_of(value, params), ValueState(value, jnp.minimum(value, state.best))

    return optax.GradientTransformationExtraArgs(init, update)


def test_finite_sees_values_and_results():
    params = jnp.ones(2)
    tx = finite(watching())
    state = tx.init(params)
    _, state = tx.update(None, state, params, value_fn=lambda p: jnp.sum(p) * jnp.nan)
    assert not bool(state.last_finite) and float(state.inner_state.value) == 0.0
    # The infinite initial best value is not an error, and a good step passes.
    updates, state = tx.update(None, state, params, value_fn=jnp.sum)
    assert bool(state.last_finite) and float(state.inner_state.best) == 2.0
    tx = finite(watching(lambda value, params: params / value))
    state = tx.init(params)
    updates, state = tx.update(None, state, params, value_fn=lambda p: 0.0 * jnp.sum(p))
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert float(state.inner_state.best) == np.inf and int(state.notfinite_count) == 1


def test_a_moment_that_overflows_is_seen():
    """RMS scaling divides by the infinite moment: a finite update, and a dead coordinate."""
    g = jnp.array([1e30, 1.0])
    plain = optax.scale_by_rms()
    updates, state = plain.update(g, plain.init(g))
    assert np.isfinite(updates).all() and not np.isfinite(state.nu).all()
    tx = finite(plain)
    updates, state = tx.update(g, tx.init(g))
    assert int(state.total_notfinite) == 1 and np.isfinite(state.inner_state.nu).all()


@pytest.mark.parametrize("where", ["primary", "constraint", "second constraint"])
def test_a_skipped_step_did_not_happen(where):
    inner = optax.chain(several() if "second" in where else weighted_sum(), optax.adamw(0.1))
    tx, params = finite(inner), random_tree(0)
    update = jax.jit(tx.update)

    def streams(i, poison):
        p, c, d = (random_tree(10 * i + j) for j in range(3))
        target = {"primary": p, "constraint": c, "second constraint": d}[where]
        if poison:
            target["tall"][0, 0] = np.nan
        return p, (c, d) if "second" in where else c

    state, clean = tx.init(params), tx.init(params)
    for i in range(4):
        p, c = streams(i, i == 2)
        updates, state = update(p, state, params, constraint_grads=c)
        if i == 2:
            assert all((u == 0).all() for u in jax.tree.leaves(updates))
            continue
        want, clean = update(p, clean, params, constraint_grads=c)
        assert_same(updates, want)
    assert_same(state.inner_state, clean.inner_state)
    counts = state.count, state.notfinite_count, state.total_notfinite
    assert [int(x) for x in counts] == [4, 0, 1]


@pytest.mark.parametrize("limit", [0, 2])
def test_limit_of_errors_is_optax_s(limit):
    ours, theirs = (jitted(wrap(optax.sgd(1.0), limit)) for wrap in (finite, optax.apply_if_finite))
    g = jnp.ones(2)
    a, b = ours.init(g), theirs.init(g)
    for bad in (1, 1, 0, 1, 1, 1, 1, 0):
        x = g * (np.nan if bad else 1.0)
        u, a = ours.update(x, a)
        v, b = theirs.update(x, b)
        np.testing.assert_array_equal(u, v)
        assert [int(a.notfinite_count), int(a.total_notfinite)] == [
            int(b.notfinite_count),
            int(b.total_notfinite),
        ]
    with pytest.raises(ValueError, match="max_consecutive_errors must not be negative, got -1"):
        finite(optax.sgd(1.0), -1)


def test_without_a_limit_nothing_ever_passes():
    tx = jitted(finite(optax.sgd(1.0)))
    bad = jnp.full(2, jnp.nan)
    state = tx.init(bad)
    for _ in range(20):
        updates, state = tx.update(bad, state)
        np.testing.assert_array_equal(updates, np.zeros(2))
    assert int(state.notfinite_count) == 20


# clip_streams


def test_optax_clips_the_primary_only():
    p, c = jnp.array([30.0, 0.0]), jnp.array([0.0, 40.0])
    chain = jitted(optax.chain(optax.clip_by_global_norm(1.0), weighted_sum()))
    theirs, _ = chain.update(p, chain.init(p), constraint_grads=c)
    np.testing.assert_allclose(theirs, [1.0, 40.0])
    tx = jitted(clip_streams(1.0, weighted_sum()))
    ours, state = tx.update(p, tx.init(p), constraint_grads=c)
    np.testing.assert_allclose(ours, [0.6, 0.8], rtol=1e-6)
    assert float(state.norm) == 50.0


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_the_streams_is_clipping_their_sum(max_norm):
    p, c = random_tree(1), random_tree(2)
    tx = clip_streams(max_norm, weighted_sum())
    got, _ = jax.jit(tx.update)(p, tx.init(p), constraint_grads=c)
    clip = jitted(optax.clip_by_global_norm(max_norm))
    want, _ = clip.update(jax.tree.map(np.add, p, c), clip.init(p))
    assert_trees_close(got, want, rtol=1e-5, atol=1e-7)
    # Without a constraint it is optax's.
    tx = jitted(clip_streams(max_norm))
    alone, _ = tx.update(p, tx.init(p))
    assert_trees_close(alone, clip.update(p, clip.init(p))[0], rtol=1e-5)


@pytest.mark.parametrize("norm", ["sum", "joint"])
def test_one_factor_for_all_streams(norm):
    seen = []

    def look(updates, state, params=None, *, constraint_grads, **extra):
        seen.append((updates, *constraint_grads))
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), look)
    with jax.enable_x64(True):
        streams = [random_tree(i, np.float64) for i in range(3)]
        flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(s)]) for s in streams]
        tx = clip_streams(0.5, probe, norm=norm)
        tx.update(streams[0], tx.init(streams[0]), constraint_grads=tuple(streams[1:]))
        length = np.linalg.norm(np.sum(flat, 0) if norm == "sum" else flat)
        for got, stream in zip(seen[0], streams, strict=True):
            want = jax.tree.map(lambda x: 0.5 / length * x, stream)
            assert_trees_close(got, want, rtol=1e-12)


def test_cancelling_gradients_are_bounded_by_the_joint_norm():
    g = jnp.array([3.0, 4.0])
    for norm, expected in (("sum", 5.0), ("joint", 1 / 2**0.5)):
        tx = jitted(clip_streams(1.0, norm=norm))
        updates, _ = tx.update(g, tx.init(g), constraint_grads=-g)
        assert np.linalg.norm(updates) == pytest.approx(expected, rel=1e-6)


LOST = {
    "clip, then sift": (lambda: optax.chain(clip_streams(1.0), sift(0.1)), "clip_streams"),
    "clip, then blur": (lambda: optax.chain(clip_streams(1.0), blur()), "clip_streams"),
    "blur, then sift": (lambda: optax.chain(blur(), sift(0.1)), "blur has made one"),
    "pcgrad, then sift": (lambda: optax.chain(pcgrad(), scale_by_sift()), "pcgrad has made one"),
    "sum, then blur": (lambda: optax.chain(weighted_sum(), blur()), "weighted_sum has made one"),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", LOST)
def test_a_second_stream_lost_in_a_chain(name, jit):
    make, why = LOST[name]
    tx, p = make(), {"bias": jnp.array([30.0, 0.0])}
    c = {"bias": jnp.array([0.0, 40.0])}

    def step(p, c):
        return tx.update(p, tx.init(p), p, constraint_grads=c)[0]

    with pytest.raises(ValueError, match=f"constraint gradient is lost: {why}"):
        (jax.jit(step) if jit else step)(p, c)


def test_streams_that_are_not_lost():
    """Another constraint, and the same constraint in a separate step."""
    p, c = jnp.array([30.0, 0.0]), jnp.array([0.0, 40.0])
    made, _ = blur().update(p, blur().init(p), constraint_grads=c)
    weighted_sum().update(made, optax.EmptyState(), constraint_grads=c + 1)
    weighted_sum().update(p, optax.EmptyState(), constraint_grads=c)
    tx = optax.chain(clip_streams(1.0), optax.sgd(1.0))
    updates, _ = tx.update(p, tx.init(p), constraint_grads=c)
    np.testing.assert_allclose(updates, [-0.6, 0.0], rtol=1e-6)


def test_clip_streams_refuses_and_shows_nan():
    with pytest.raises(ValueError, match="max_norm is positive, got 0"):
        clip_streams(0)
    with pytest.raises(ValueError, match="norm is 'sum' or 'joint', got 'max'"):
        clip_streams(1.0, norm="max")
    with pytest.raises(ValueError, match="inner is an optax transformation"):
        clip_streams(1.0, 2.0)  # type: ignore[arg-type]
    g = jnp.ones(2)
    tx = clip_streams(1.0, total())
    with pytest.raises(ValueError, match="updates is None"):
        tx.update(None, tx.init(g))
    updates, _ = tx.update(g, tx.init(g), constraint_grads=g * jnp.nan)
    assert np.isnan(updates).all()
    zeros, _ = tx.update(0 * g, tx.init(g), constraint_grads=0 * g)
    np.testing.assert_array_equal(zeros, np.zeros(2))


# Together


def test_one_bad_micro_batch_is_left_out_of_the_mean():
    tx = jitted(finite(accumulate(total(), 2)))
    state = tx.init(jnp.zeros(()))
    for g, h in ((1.0, 10.0), (1.0, np.nan), (5.0, 1000.0)):
        updates, state = tx.update(jnp.float32(g), state, constraint_grads=jnp.float32(h))
    assert float(updates) == -508.0


def test_max_norm_may_be_traced():
    p, c = random_tree(1), random_tree(2)
    tx = optax.inject_hyperparams(clip_streams, static_args=("inner", "norm"))(
        max_norm=0.5, inner=weighted_sum()
    )
    got, _ = jax.jit(tx.update)(p, tx.init(p), constraint_grads=c)
    fixed = jitted(clip_streams(0.5, weighted_sum()))
    assert_trees_close(got, fixed.update(p, fixed.init(p), constraint_grads=c)[0], rtol=1e-5)
