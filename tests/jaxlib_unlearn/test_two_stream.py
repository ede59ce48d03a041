"""BLUR, PCGrad and the weighted sum: the card's numbers, identities, limits, Optax's protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_close, random_tree

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import combine as combiners
from jaxlib_unlearn.optim.combine import blur, blur_combine, pcgrad, weighted_sum

COMBINERS = {
    "blur": (blur, optim.STATIC_ARGS["blur"], {"gamma": 0.5, "constraint_weight": 2.0}),
    "pcgrad": (pcgrad, optim.STATIC_ARGS["pcgrad"], {"constraint_weight": 2.0}),
    "weighted_sum": (weighted_sum, optim.STATIC_ARGS["weighted_sum"], {"weight": 2.0}),
}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def combine(tx, primary, constraint):
    """In one jit: eager execution takes ten times as long."""
    return jax.jit(tx.update)(primary, tx.init(primary), constraint_grads=constraint)


blur_of = jax.jit(lambda *args: blur_combine(*args)[0])


# References: flat vectors, numpy, float64


def blur_loop(p, c, gamma, lower):
    low, up = (p, c) if lower == "primary" else (c, p)
    xi = gamma - low @ up / (low @ low)
    return up + xi * low


def pcgrad_loop(p, c):
    if p @ c >= 0:
        return p + c
    return (p - p @ c / (c @ c) * c) + (c - p @ c / (p @ p) * p)


@pytest.mark.parametrize(
    "tx, expected",
    [
        (blur(), [3.8, 0.6]),
        (blur(lower="constraint"), [3.7, 1.1]),
        (blur(constraint_weight=2.0), [6.6, -0.8]),
        (weighted_sum(), [4.0, 1.0]),
        (pcgrad(), [4.0, 1.0]),
    ],
)
def test_values_of_the_card(tx, expected):
    updates, state = combine(tx, jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0]))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    if isinstance(state, combiners.BlurStats):
        xi = {3.8: 0.8, 3.7: 0.9, 6.6: 0.6}[expected[0]]
        scale = 2.0 if expected[0] == 6.6 else 1.0
        np.testing.assert_allclose(state, [scale, 5.0, 10.0 * scale**2, xi], rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("scope", ["global", "per_leaf"])
@pytest.mark.parametrize("lower", ["primary", "constraint"])
def test_blur_float64_reference(lower, scope, alpha):
    with jax.enable_x64(True):
        tx = blur(0.7, lower=lower, scope=scope, constraint_weight=alpha)
        update = jax.jit(tx.update)
        for seed in range(2):
            p, c = random_tree(seed, np.float64), random_tree(seed + 10, np.float64)
            u, stats = update(p, tx.init(p), constraint_grads=c)
            a, b = flat(p), alpha * flat(c)
            if scope == "global":
                expected = blur_loop(a, b, 0.7, lower)
            else:
                pairs = zip(jax.tree.leaves(p), jax.tree.leaves(c), strict=True)
                parts = [blur_loop(x.ravel(), alpha * y.ravel(), 0.7, lower) for x, y in pairs]
                expected = np.concatenate(parts)
            np.testing.assert_allclose(flat(u), expected, rtol=1e-12, atol=1e-12)
            low, up = (a, b) if lower == "primary" else (b, a)
            xi = (expected - up) @ low / (low @ low)
            np.testing.assert_allclose(stats, [a @ b, a @ a, b @ b, xi], rtol=1e-12)
            assert stats.xi.dtype == jnp.float64


@pytest.mark.parametrize("dtype, limit", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_identities(dtype, limit):
    with jax.enable_x64(dtype is np.float64):
        p, c = random_tree(1, dtype), random_tree(2, dtype)
        a, b = flat(p), flat(c)
        for gamma in (0.1, 1.0, 5.0):
            u = flat(blur_of(p, c, gamma))
            across = b - a @ b / (a @ a) * a
            # Relative to the terms that cancel in the inner product, not to its value.
            assert abs(a @ u - gamma * (a @ a)) <= limit * np.linalg.norm(a) * np.linalg.norm(u)
            np.testing.assert_allclose(u @ u, gamma**2 * (a @ a) + across @ across, rtol=limit)
            shifted = jax.tree.map(lambda x, y: y + 3 * x, p, c)
            v = flat(blur_of(p, shifted, gamma))
            np.testing.assert_allclose(v, u, atol=10 * limit)  # sizes up to about 10
            along = jax.tree.map(lambda x: 3 * x, p)
            np.testing.assert_allclose(flat(blur_of(p, along, gamma)), gamma * a, atol=10 * limit)
        # Affine in the upper gradient: u(b) = u(0) + (linear in b).
        none = jax.tree.map(np.zeros_like, c)
        twice = jax.tree.map(lambda x: 2 * x, c)
        u0, u1, u2 = (flat(blur_of(p, x, 1.0)) for x in (none, c, twice))
        np.testing.assert_allclose(u2 - u0, 2 * (u1 - u0), atol=10 * limit)
        np.testing.assert_allclose(u0, a, rtol=limit)


def test_orthogonal_streams_are_a_weighted_sum():
    p, c = {"a": jnp.ones(3), "b": jnp.zeros(2)}, {"a": jnp.zeros(3), "b": jnp.ones(2)}
    u = blur_of(p, c, 0.25)
    assert_trees_close(u, {"a": 0.25 * np.ones(3), "b": np.ones(2)})
    assert_trees_close(combine(pcgrad(), p, c)[0], combine(weighted_sum(), p, c)[0])


@pytest.mark.parametrize("tx, loop", [(blur(), blur_loop), (pcgrad(), pcgrad_loop)])
def test_global_scope_does_not_see_how_the_tree_is_cut(tx, loop):
    rng = np.random.default_rng(0)
    p, c = rng.standard_normal((2, 12)).astype(np.float32)
    c = c - 2 * p  # they conflict
    args = (1.0, "primary") if loop is blur_loop else ()
    expected = loop(p.astype(np.float64), c.astype(np.float64), *args)
    for cut in ([], [4], [1, 2, 9]):
        u, _ = combine(tx, np.split(p, cut), np.split(c, cut))
        np.testing.assert_allclose(flat(u), expected, atol=1e-5)
    each, _ = combine(_per_leaf(loop), np.split(p, [4]), np.split(c, [4]))
    assert np.abs(flat(each) - expected).max() > 0.1


def _per_leaf(loop):
    return blur(scope="per_leaf") if loop is blur_loop else pcgrad(scope="per_leaf")


@pytest.mark.parametrize("scope", ["global", "per_leaf"])
def test_zero_gradients(scope):
    g = jnp.array([1.0, -2.0])
    zero = jnp.zeros(2)
    for tx in (blur(0.5, scope=scope), pcgrad(scope=scope)):
        np.testing.assert_array_equal(combine(tx, zero, g)[0], g)
        np.testing.assert_array_equal(combine(tx, zero, zero)[0], zero)
    np.testing.assert_array_equal(combine(blur(0.5, scope=scope), g, zero)[0], 0.5 * g)
    np.testing.assert_array_equal(combine(pcgrad(scope=scope), g, zero)[0], g)
    swapped = blur(0.5, lower="constraint", scope=scope)
    np.testing.assert_array_equal(combine(swapped, g, zero)[0], g)
    # eps: a lower gradient of squared norm 5 counts as zero.
    np.testing.assert_array_equal(combine(blur(eps=5.0, scope=scope), g, g + 1)[0], g + 1)
    for weight in (jnp.zeros(2), g):
        gradient = jax.jit(jax.grad(lambda p, w: blur_combine(p, w)[0].sum()))(zero, weight)
        assert np.isfinite(gradient).all()


def test_rmu_form():
    p, c, alpha = random_tree(1), random_tree(2), 800.0
    one, _ = combine(blur(constraint_weight=alpha), p, c)
    other, _ = combine(blur(1 / alpha), p, c)
    largest = np.abs(flat(one)).max()
    np.testing.assert_allclose(flat(one), alpha * flat(other), atol=1e-6 * largest)


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_reference(seed):
    with jax.enable_x64(True):
        p, c = random_tree(seed, np.float64), random_tree(seed + 10, np.float64)
        sign = -1 if seed % 2 else 1
        c = jax.tree.map(lambda x, y: y + sign * x, p, c)
        a, b = flat(p), flat(c)
        u, stats = jax.jit(pcgrad().update)(p, pcgrad().init(p), constraint_grads=c)
        np.testing.assert_allclose(flat(u), pcgrad_loop(a, b), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(stats, [a @ b, a @ a, b @ b], rtol=1e-12)
        swapped, _ = combine(pcgrad(), c, p)
        np.testing.assert_allclose(flat(swapped), flat(u), atol=1e-12)
        assert (a @ b < 0) == (sign < 0)
        if a @ b < 0:  # a step against u raises neither loss, to first order
            assert flat(u) @ a >= -1e-12 and flat(u) @ b >= -1e-12


# Convergence


@pytest.mark.parametrize("rank", [1, 3])
def test_quadratics_end_at_the_projection(rank):
    """Lower ``|A x - b|^2 / 2``, upper ``|x - c|^2 / 2``: the limit is c projected on A x = b."""
    rng = np.random.default_rng(rank)
    u, _, vh = np.linalg.svd(rng.standard_normal((rank, 6)), full_matrices=False)
    a = (u * np.linspace(1.0, 1.5, rank)) @ vh
    b, c = rng.standard_normal(rank), 2 * rng.standard_normal(6)
    target = c - np.linalg.pinv(a) @ (a @ c - b)

    def distance(tx, eta):
        def step(carry, _):
            x, state = carry
            g, h = a.T @ (a @ x - b), x - c
            u, state = tx.update(g, state, constraint_grads=h)
            return (x - eta * u, state), None

        start = jnp.zeros(6)
        run = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), None, int(20 / eta))[0])
        return np.linalg.norm(run()[0] - target)

    with jax.enable_x64(True):
        coarse, fine = distance(blur(), 1e-2), distance(blur(), 1e-3)
        penalty = [distance(weighted_sum(), eta) for eta in (1e-2, 1e-3)]
    assert penalty[1] == pytest.approx(penalty[0], rel=1e-2)  # no eta brings it nearer
    assert coarse < penalty[0] / 3
    if rank == 1:
        assert coarse < 1e-4
    else:  # one direction is projected out per step
        assert 7 < coarse / fine < 14


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_theorem_bounds(gamma):
    """Means of cosines: values, gradients and curvatures bounded by one, so C = L = 1."""
    rng = np.random.default_rng(0)
    waves = rng.standard_normal((2, 5, 4))
    waves /= np.linalg.norm(waves, axis=-1, keepdims=True)
    steps, eta, big_c = 2000, 0.05, 1.0

    def step(x, _):
        g, h = (-(np.swapaxes(w, 0, 1) @ jnp.sin(w @ x)) / 5 for w in waves)
        u, _ = blur_combine(g, h, gamma)
        return x - eta * u, (g @ g, u @ u)

    with jax.enable_x64(True):
        start = jnp.asarray(rng.standard_normal(4))
        _, (lower, whole) = jax.jit(lambda x: jax.lax.scan(step, x, None, steps))(start)
    reach = (2 + gamma) * big_c
    first = 2 * big_c / (steps * eta * gamma) + eta * reach**2 / (2 * gamma)
    second = 2 * big_c / (eta * steps) + gamma**2 * first + big_c * gamma * first**0.5
    assert np.asarray(lower).mean() <= first
    assert np.asarray(whole).mean() <= 2 / (2 - eta) * second


# Optax's protocol


@pytest.mark.parametrize("name", COMBINERS)
def test_extra_arguments_pass_on(name):
    make, _, options = COMBINERS[name]
    seen = []

    def look(updates, state, params=None, *, value, constraint_grads, **extra):
        seen.append((value, constraint_grads, extra))
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), look)
    tx = optax.chain(make(**options), probe)

    def step(p, state, c):
        return tx.update(p, state, p, constraint_grads=c, value=1.0, unknown="x")

    params = random_tree(0)
    jax.eval_shape(step, params, tx.init(params), params)
    assert len(seen) == 1 and seen[0][0] == 1.0 and seen[0][2] == {"unknown": "x"}
    assert jax.tree.structure(seen[0][1]) == jax.tree.structure(params)


@pytest.mark.parametrize("name", COMBINERS)
def test_hyperparameters_may_be_traced(name):
    make, static, options = COMBINERS[name]
    p, c = random_tree(1), random_tree(2)
    c = jax.tree.map(lambda x, y: y - 2 * x, p, c)  # a conflict, for pcgrad
    tx = optax.inject_hyperparams(make, static_args=static)(**options)
    state = tx.init(p)
    for factor in (1.0, 3.0):
        for key, value in options.items():
            state.hyperparams[key] = jnp.float32(factor * value)
        updates, _ = jax.jit(tx.update)(p, state, constraint_grads=c)
        fixed = make(**{key: factor * value for key, value in options.items()})
        assert_trees_close(updates, combine(fixed, p, c)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMBINERS)
def test_bfloat16_products_are_float32(name):
    make, _, options = COMBINERS[name]
    p, c = (jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(i)) for i in (1, 2))
    updates, stats = jax.jit(make(**options).update)(p, make(**options).init(p), constraint_grads=c)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (p, c)]
    exact, exact_stats = combine(make(**options), *wide)
    # One rounding to bfloat16, at the end.
    assert_trees_close(updates, exact, rtol=2.0**-8, atol=1e-6)
    assert_trees_close(stats, exact_stats, rtol=1e-6)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(stats))


def test_first_step_in_front_of_adamw():
    p, c, params = random_tree(1), random_tree(2), random_tree(3)
    chain, adamw = optax.chain(blur(0.5), optax.adamw(1e-2)), optax.adamw(1e-2)
    got, _ = chain.update(p, chain.init(params), params, constraint_grads=c)
    want, _ = adamw.update(blur_of(p, c, 0.5), adamw.init(params), params)
    assert_trees_close(got, want, rtol=1e-6)


def test_frozen_leaves_and_masks():
    p, c = {"w": jnp.array([1.0, 2.0]), "f": None}, {"w": jnp.array([3.0, -1.0]), "f": None}
    u, _ = combine(blur(), p, c)
    np.testing.assert_allclose(u["w"], [3.8, 0.6], rtol=1e-6)
    assert u["f"] is None
    full = {"w": p["w"], "f": jnp.ones(2)}
    mask, streams = {"w": True, "f": False}, {"w": c["w"], "f": jnp.ones(2)}
    tx = optax.masked(blur(), mask, mask_compatible_extra_args=True)
    np.testing.assert_allclose(combine(tx, full, streams)[0]["w"], [3.8, 0.6], rtol=1e-6)
    with pytest.raises(ValueError, match="constraint_grads must be a tree like"):
        combine(optax.masked(blur(), mask), full, streams)  # optax masks one stream only


def test_wrong_arguments():
    with pytest.raises(ValueError, match="lower is one of .*'retain'"):
        blur(lower="retain")
    for make in (blur, pcgrad):
        with pytest.raises(ValueError, match="scope"):
            make(scope="layer")
        with pytest.raises(ValueError, match="constraint_weight must not be negative, got -1"):
            make(constraint_weight=-1)
    with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
        blur(-1.0)
    g = {"w": jnp.ones(2)}
    for tx in (blur(), pcgrad(), weighted_sum()):
        with pytest.raises(ValueError, match="must be a tree like"):
            combine(tx, g, {"v": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"\['w'\] has shape \(1,\)"):
            combine(tx, g, {"w": jnp.ones(1)})
        with pytest.raises(ValueError, match="constraint_grads=tree"):
            tx.update(g, tx.init(g))


@pytest.mark.parametrize("sizes", [(1e20, 1e20), (1e20, 1.0), (1e-25, 1e-24)], ids=str)
@pytest.mark.parametrize("scope", ["global", "per_leaf"])
@pytest.mark.parametrize("lower", ["primary", "constraint"])
def test_squares_out_of_range(sizes, scope, lower):
    """Finite gradients whose squares overflow, or vanish, in float32: as in float64."""
    rng = np.random.default_rng(0)
    p, c = ({"a": size * rng.standard_normal(7), "b": size * rng.standard_normal((2, 3))}
            for size in sizes)  # fmt: skip
    c["b"] -= 2 * sizes[1] / sizes[0] * p["b"]  # in conflict
    narrow = [jax.tree.map(np.float32, x) for x in (p, c)]
    with jax.enable_x64(True):
        wide = [jax.tree.map(np.float64, x) for x in narrow]
        want, _ = blur_combine(*wide, 0.5, lower=lower, scope=scope)
    got, stats = blur_combine(*narrow, 0.5, lower=lower, scope=scope)
    assert all(np.isfinite(x) for x in stats)
    tx = pcgrad(scope=scope)
    with jax.enable_x64(True):
        other, _ = tx.update(wide[0], tx.init(wide[0]), constraint_grads=wide[1])
    mine, state = tx.update(narrow[0], tx.init(narrow[0]), constraint_grads=narrow[1])
    assert all(np.isfinite(x) for x in state)
    for a, b in ((got, want), (mine, other)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
