"""The zeroth-order engine and its thin methods, against NumPy in float64 and against Optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import random_tree

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.zeroth_order import methods, perturbations
from jaxlib_unlearn.optim.zeroth_order.directions import (
    Draws,
    draw_bases,
    norm_scales,
    perturbed,
)
from jaxlib_unlearn.optim.zeroth_order.engine import scale_by_zeroth_order, zeroth_order
from jaxlib_unlearn.optim.zeroth_order.estimate import estimate
from jaxlib_unlearn.optim.zeroth_order.leaves import layout_of
from jaxlib_unlearn.optim.zeroth_order.steps import Rule

SHAPES = {
    "tall": (5, 3),
    "wide": (3, 6),
    "layers": {"up": {"kernel": (2, 4, 4), "bias": (2, 4)}},
    "bias": (5,),
}


def tree(seed=0, dtype=jnp.float32, shapes=SHAPES):
    return jax.tree.map(jnp.asarray, random_tree(seed, dtype, shapes))


def loss(params, xp=jnp):
    """Nonlinear in every entry, and different for every entry."""
    total = 0.0
    for i, x in enumerate(jax.tree.leaves(params)):
        weight = np.cos(np.arange(x.size) + i).reshape(x.shape)
        total = total + xp.sum(xp.sin(x) * weight) + 0.1 * xp.sum(x**2)
    return total


def directions(family, params, state, step, num_queries, refresh_every):
    """The directions Z of every query of a step as NumPy trees, from the engine's keys."""
    layout = layout_of(params)
    base = jax.random.key(state.seed, impl="threefry2x32")

    def stream(purpose, number):
        return jax.random.fold_in(jax.random.fold_in(base, purpose), number)

    bases = draw_bases(family, layout, stream(0, step // refresh_every))
    leaves, structure = jax.tree.flatten(params)
    moments = [{} for _ in leaves]
    for name, moment in state.moments.items():
        for entry, value in zip(moments, jax.tree.leaves(moment), strict=True):
            entry[name] = value
    mask = 0 if family.static_mask else step
    draws = Draws(stream(1, step), stream(2, mask), bases, moments)
    if family.normalize:
        draws = draws._replace(scales=norm_scales(family, layout, draws, num_queries))
    zero = [jnp.zeros_like(x) for x in leaves]

    @jax.jit
    def all_of_them(draws):
        one = functools.partial(perturbed, family, layout, draws, zero)
        return [one(jnp.int32(i), jnp.ones((), zero[0].dtype)) for i in range(num_queries)]

    return [jax.tree.map(np.asarray, jax.tree.unflatten(structure, z)) for z in all_of_them(draws)]


def add(params, z, scale):
    return jax.tree.map(lambda x, d: np.asarray(x) + scale * d, params, z)


def reference(family, params, zs, eps, estimator="central"):
    """Mean of c_i Z_i, the coefficients, and the mean of the curvature terms."""
    center = loss(params, np)
    coeffs, bends = [], []
    for z in zs:
        plus, minus = loss(add(params, z, eps), np), loss(add(params, z, -eps), np)
        central = estimator == "central"
        coeffs.append((plus - minus) / (2 * eps) if central else (plus - center) / eps)
        bends.append(abs(plus + minus - 2 * center) / (2 * eps**2))
    layout = layout_of(params)
    leaves = [jax.tree.leaves(z) for z in zs]
    means, squares = [], []
    for i, leaf in enumerate(layout.leaves):
        gain = 1.0
        if family.name == "uvt" and leaf.axes is not None:
            gain = 1 / min(2, *leaf.axes.sizes(leaf.shape)[1:])
        means.append(gain * sum(c * z[i] for c, z in zip(coeffs, leaves, strict=True)) / len(zs))
        squares.append(sum(b * z[i] ** 2 for b, z in zip(bends, leaves, strict=True)) / len(zs))
    return means, np.array(coeffs), squares


LR, DECAY, EPS = 0.05, 0.1, 1e-3
# name -> factory, family, the same method's options
METHODS = {
    "mezo": (methods.mezo, perturbations.dense(), {}),
    "mezo_forward": (methods.mezo, perturbations.dense(), {"estimator": "forward"}),
    "sparse_mezo": (methods.sparse_mezo, perturbations.sparse(0.5), {"keep": 0.5}),
    "lozo": (methods.lozo, perturbations.uvt(2), {"rank": 2, "refresh_every": 2}),
    "subzero": (methods.subzero, perturbations.uzv(2), {"rank": 2, "refresh_every": 2}),
    "subspace_mezo": (
        methods.subspace_mezo,
        perturbations.subspace(2),
        {"rank": 2, "refresh_every": 2, "aux_learning_rate": 0.5 * LR},
    ),
    "hizoo": (methods.hizoo, perturbations.curvature(), {"smoothing": 0.1}),
    "rada_zo": (methods.rada_zo, perturbations.sphere(), {}),
    "rada_zo_published": (
        methods.rada_zo,
        perturbations.dense(),
        {"directions": "gaussian", "bias_correction": False},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_equal_numpy_in_float64(name):
    factory, family, options = METHODS[name]
    q = 2
    with jax.enable_x64(True):
        params = tree(dtype=jnp.float64)
        tx = factory(LR, num_queries=q, eps=EPS, weight_decay=DECAY, seed=7, **options)
        state = tx.init(params)
        step = jax.jit(lambda s, p: tx.update(None, s, p, value_fn=loss))
        mu = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
        nu = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
        for t in range(3):
            every = options.get("refresh_every", 100)
            zs = directions(family, params, state, t, q, every)
            means, coeffs, squares = reference(
                family, params, zs, EPS, options.get("estimator", "central")
            )
            old = state.moments
            updates, state = step(state, params)
            np.testing.assert_allclose(state.coeffs, coeffs, rtol=1e-9, atol=1e-9)
            rows = enumerate(zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True))
            for i, (got, x) in rows:
                leaf = layout_of(params).leaves[i]
                direction, rate = means[i], LR
                if name == "hizoo":
                    h = np.asarray(jax.tree.leaves(old["hessian"])[i])
                    new = 0.9 * h + 0.1 * h * squares[i] * h  # Z^2 = z^2 / H
                    direction = means[i] * np.sqrt(h) / np.sqrt(new)
                    got_h = jax.tree.leaves(state.moments["hessian"])[i]
                    np.testing.assert_allclose(got_h, new, rtol=1e-6)
                if name.startswith("rada_zo"):
                    mu[i] = 0.9 * mu[i] + 0.1 * means[i]
                    lacks = [0.0, 0.0] if "published" in name else [0.9 ** (t + 1), 0.99 ** (t + 1)]
                    m = mu[i] / (1 - lacks[0])
                    nu[i] = 0.99 * nu[i] + 0.01 * m**2
                    v = nu[i] / (1 - lacks[1])
                    direction = m / np.sqrt(v + 1e-8)
                if leaf.axes is None:
                    rate = options.get("aux_learning_rate", LR)
                else:
                    direction = direction + DECAY * np.asarray(x)
                # Curvatures divide rounding by eps^2.
                tolerance = 1e-6 if name == "hizoo" else 1e-9
                np.testing.assert_allclose(
                    got, -rate * direction, rtol=tolerance, atol=tolerance, err_msg=leaf.path
                )
            params = optax.apply_updates(params, updates)


def linear(g, z):
    def loss_at(context, query, offset):
        point = 0.0 if query is None else offset * z[query]
        return jnp.sum(g * point) + 0.5

    return loss_at


def test_on_a_linear_loss_all_estimators_agree():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        g, z = rng.normal(size=6), jnp.asarray(rng.normal(size=(3, 6)))
        for estimator in ("forward", "central", "jvp"):
            got = estimate(linear(g, z), 3, 1e-2, estimator=estimator, dtype=jnp.float64)
            np.testing.assert_allclose(got.coeffs, z @ g, rtol=1e-8)
            # 1e-12: an average of values that differ by 1e-2.
            np.testing.assert_allclose(got.value, 0.5, rtol=1e-12)


def test_on_a_quadratic_central_is_exact_and_forward_off_by_half_eps_zhz():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        h, x, z = rng.normal(size=(4, 4)), rng.normal(size=4), jnp.asarray(rng.normal(size=(2, 4)))
        h, eps = h @ h.T, 0.3

        def loss_at(context, query, offset):
            p = x + (0.0 if query is None else offset * z[query])
            return 0.5 * p @ h @ p

        got = {
            name: estimate(loss_at, 2, eps, estimator=name, dtype=jnp.float64).coeffs
            for name in ("forward", "central", "jvp")
        }
        np.testing.assert_allclose(got["central"], got["jvp"], rtol=1e-8)
        zhz = np.einsum("qi,ij,qj->q", z, h, z)
        np.testing.assert_allclose(got["forward"] - got["jvp"], eps / 2 * zhz, rtol=1e-8)
        bend = estimate(loss_at, 2, eps, curvature=True, dtype=jnp.float64).curvatures
        np.testing.assert_allclose(bend, zhz / 2, rtol=1e-8)


def test_basis_directions_reproduce_finite_differences():
    with jax.enable_x64(True):
        x, z = jnp.asarray([0.3, -1.0, 2.0]), jnp.eye(3)

        def loss_at(context, query, offset):
            return jnp.sum(jnp.exp(x + (0.0 if query is None else offset * z[query])))

        got = estimate(loss_at, 3, 1e-4, dtype=jnp.float64).coeffs @ z
        # Central differences of exp: relative error eps^2 / 6.
        np.testing.assert_allclose(got, np.exp(x), rtol=2e-9)


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_values_do_not_depend_on_how_many_are_evaluated_at_a_time(batch):
    params = tree()
    updates = []
    for query_batch in (None, batch):
        tx = methods.mezo(0.1, num_queries=3, query_batch=query_batch)
        step = jax.jit(lambda p, tx=tx: tx.update(None, tx.init(p), p, value_fn=loss))
        updates.append(step(params))
    (one, first), (many, second) = updates
    # A float32 loss of about 4 is rounded by 2e-7, which eps = 1e-3 magnifies.
    np.testing.assert_allclose(first.coeffs, second.coeffs, atol=2e-3)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_dense_forward_estimate_is_optax_perturbed_gradient():
    with jax.enable_x64(True):
        params = {"w": tree(dtype=jnp.float64)["tall"]}
        tx = scale_by_zeroth_order(
            perturbations.dense(), num_queries=3, eps=1e-2, estimator="forward"
        )
        state = tx.init(params)
        zs = directions(perturbations.dense(), params, state, 0, 3, 100)
        stacked = jnp.stack([z["w"] for z in zs])
        # Optax maps over three keys and splits each once more, by leaf: they identify the queries.
        keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(
            jax.random.split(jax.random.key(0), 3)
        )

        class OurNoise(optax.perturbations.Normal):
            def sample(self, key, shape, dtype=float):
                ours = jnp.all(jax.random.key_data(keys) == jax.random.key_data(key), axis=-1)
                return jnp.where(jnp.any(ours), stacked[jnp.argmax(ours)], jnp.nan)

        smooth = optax.perturbations.make_perturbed_fun(
            loss, num_samples=3, sigma=1e-2, noise=OurNoise(), use_baseline=True
        )
        want = jax.grad(lambda p: smooth(jax.random.key(0), p))(params)
        got, _ = tx.update(None, state, params, value_fn=loss)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-9)


def test_replay_from_the_coefficients():
    tx = methods.subspace_mezo(0.1, rank=2, refresh_every=3, aux_learning_rate=None, seed=3)
    step = jax.jit(lambda s, p: tx.update(None, s, p, value_fn=loss))
    replay = jax.jit(lambda s, p, c: tx.update(None, s, p, coeffs=c))
    start = params = tree()
    state, log = tx.init(params), []
    for _ in range(5):
        updates, state = step(state, params)
        params = optax.apply_updates(params, updates)
        log.append(state.coeffs)
    state = tx.init(start)
    for coeffs in log:
        updates, state = replay(state, start, coeffs)
        start = optax.apply_updates(start, updates)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        # Another program, the same sums: rounding of five steps.
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_hyperparameters_can_be_injected_and_scheduled():
    params = tree()
    plain = methods.mezo(0.1, eps=1e-2)
    injected = optax.inject_hyperparams(methods.mezo, static_args=optim.STATIC_ARGS["mezo"])(
        lambda count: 0.1 / (1 + count), eps=1e-2
    )
    scheduled = methods.mezo(lambda count: 0.1 / (1 + count), eps=1e-2)
    results = []
    for tx in (plain, injected, scheduled):
        step = jax.jit(lambda s, p, tx=tx: tx.update(None, s, p, value_fn=loss))
        first, state = step(tx.init(params), params)
        second, state = step(state, params)
        results.append((first["tall"], second["tall"]))
    for other in results[1:]:
        np.testing.assert_allclose(other[0], results[0][0], rtol=1e-4)
        np.testing.assert_allclose(2 * other[1], results[0][1], rtol=1e-4)


def test_frozen_leaves_are_neither_perturbed_nor_moved():
    params = tree()
    tx = methods.rada_zo(0.1, trainable=lambda path: path == "layers/up/kernel")
    state = tx.init(params)
    assert state.moments["mu"]["tall"] is None

    def only_frozen(p):
        return sum(jnp.sum(jnp.sin(x)) for x in (p["tall"], p["bias"], p["layers"]["up"]["bias"]))

    step = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=only_frozen))
    _, state = step(params)
    assert state.coeffs.tolist() == [0.0]
    step = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=loss))
    updates, _ = step(params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == {
        "tall": False,
        "wide": False,
        "bias": False,
        "layers": {"up": {"kernel": True, "bias": False}},
    }


def test_bfloat16_parameters_get_bfloat16_updates_from_float32_arithmetic():
    params = tree(dtype=jnp.bfloat16)
    tx = methods.mezo(1.0, weight_decay=0.1)

    def value_fn(p):
        return loss(jax.tree.map(lambda x: x.astype(jnp.float32), p))

    updates, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=value_fn))(params)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
    assert state.coeffs.dtype == jnp.float32
    zs = directions(perturbations.dense(), tree(), tx.init(params), 0, 1, 100)
    want = -(float(state.coeffs[0]) * zs[0]["tall"] + 0.1 * params["tall"].astype(np.float32))
    # One rounding to bfloat16: half a unit in the last place, 2^-9.
    np.testing.assert_allclose(updates["tall"].astype(np.float32), want, rtol=2**-8)


def test_a_given_value_saves_the_baseline():
    calls = []

    def value_fn(p):
        jax.debug.callback(lambda: calls.append(1))
        return loss(p)

    params = tree()
    tx = zeroth_order(0.1, perturbations.dense(), num_queries=2, estimator="forward")
    for value, evaluations in ((None, 3), (loss(params), 2)):
        calls.clear()
        step = jax.jit(lambda p, v: tx.update(None, tx.init(p), p, value_fn=value_fn, value=v))
        _, state = step(params, value)
        jax.effects_barrier()
        assert len(calls) == evaluations
        np.testing.assert_allclose(state.value, loss(params), rtol=1e-6)


def test_sphere_first_step_and_scale_invariance():
    params = tree()

    def first(scale, **options):
        tx = methods.rada_zo(0.1, zeta=0.0, **options)
        step = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=lambda q: scale * loss(q)))
        return step(params)[0]["tall"]

    # One learning rate; as published sign(g) / sqrt(1 - b2), with b2 = 0.99 ten of them.
    np.testing.assert_allclose(jnp.abs(first(1.0)), 0.1, rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(first(1.0, bias_correction=False)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(first(4.0), first(1.0), rtol=1e-5)  # a power of two: no rounding


LEAVES = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}


def call(tx, params=LEAVES, **given):
    """A first step with these arguments."""
    return tx.update(None, tx.init(LEAVES), params, **given)


MEZO = methods.mezo(0.1)
INSIDE = optax.partition({"zo": MEZO, "rest": optax.sgd(0.1)}, {"w": "zo", "b": "rest"})
BAD = {
    "no params": (lambda: call(MEZO, None, value_fn=loss), "params"),
    "no value_fn": (lambda: call(MEZO), "value_fn"),
    "no scalar": (lambda: call(MEZO, value_fn=lambda p: p["b"]), "scalar"),
    "coeffs": (lambda: call(MEZO, coeffs=jnp.ones(2)), "num_queries"),
    "curvatures": (lambda: call(methods.hizoo(0.1), coeffs=jnp.ones(1)), "curvatures"),
    "nothing": (lambda: methods.mezo(0.1, trainable=lambda path: False).init(LEAVES), "trainable"),
    "axis": (lambda: call(methods.mezo(0.1, query_axis="query"), value_fn=loss), "query_axis"),
    "partition": (lambda: INSIDE.init(LEAVES), "trainable="),
    "masked": (lambda: optax.masked(MEZO, {"w": True, "b": False}).init(LEAVES), "trainable="),
    "estimator": (lambda: methods.mezo(0.1, estimator="backward"), "estimator"),
    "queries": (lambda: methods.mezo(0.1, num_queries=0), "num_queries"),
    "batch": (lambda: methods.mezo(0.1, query_batch=0), "query_batch"),
    "eps": (lambda: methods.mezo(0.1, eps=0.0), "eps"),
    "rank": (lambda: methods.lozo(0.1, rank=0), "rank"),
    "refresh": (lambda: methods.lozo(0.1, refresh_every=0), "refresh_every"),
    "keep": (lambda: methods.sparse_mezo(0.1, keep=1.5), "keep"),
    "mask": (lambda: methods.sparse_mezo(0.1, mask="magnitude"), "mask"),
    "directions": (lambda: methods.rada_zo(0.1, directions="cube"), "directions"),
    "b1": (lambda: methods.rada_zo(0.1, b1=1.0), "b1"),
    "rbg": (lambda: methods.mezo(0.1, rng_impl="rbg"), "rbg"),
    "unsafe_rbg": (lambda: methods.mezo(0.1, rng_impl="unsafe_rbg"), "unsafe_rbg"),
    "curvature": (
        lambda: zeroth_order(
            0.1,
            perturbations.dense(),
            estimator="jvp",
            rule=Rule({}, lambda g, h, m, c: (g, m), curvature=True),
        ),
        "central",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told(name):
    build, word = BAD[name]
    with pytest.raises(TypeError if name == "no value_fn" else ValueError, match=word):
        build()


def test_works_in_a_chain_and_reports_its_value():
    tx = optax.chain(scale_by_zeroth_order(perturbations.dense()), optax.scale(-0.1))
    params = tree()
    updates, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=loss))(params)
    whole = methods.mezo(0.1)
    want, _ = jax.jit(lambda p: whole.update(None, whole.init(p), p, value_fn=loss))(params)
    np.testing.assert_allclose(updates["wide"], want["wide"], rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "value"), loss(params), rtol=1e-3)


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_differences_of_16_bit_losses_are_refused(estimator):
    params = {"w": jnp.ones((2, 3))}
    tx = methods.mezo(0.1, estimator=estimator)

    def step(dtype, value=None):
        jax.eval_shape(
            lambda p: tx.update(
                None, tx.init(p), p, value_fn=lambda q: loss(q).astype(dtype), value=value
            ),
            params,
        )

    for dtype in (jnp.bfloat16, jnp.float16):
        with pytest.raises(TypeError, match=f"value_fn returned {jnp.dtype(dtype).name}.*float32"):
            step(dtype)
    with pytest.raises(TypeError, match="value has dtype bfloat16"):
        step(jnp.float32, jnp.ones([], jnp.bfloat16))
    step(jnp.float32)
    tx = methods.mezo(0.1, estimator="jvp")  # takes no difference
    step(jnp.bfloat16)
