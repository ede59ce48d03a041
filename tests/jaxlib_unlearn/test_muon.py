"""Muon against a float64 loop, optax and torch; its reductions, and Optax's protocol."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
import update_trace
from optax.contrib import MuonDimensionNumbers
from trees import run

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import matrices, orthogonalize
from jaxlib_unlearn.optim.spectral import buckets
from jaxlib_unlearn.optim.spectral.reference import reference

JORDAN = (3.4445, -4.7750, 2.0315)
SHAPES = {
    "layers": {
        "up": {"kernel": (3, 6, 10), "bias": (3, 10)},
        "down": {"kernel": (3, 10, 6)},
        "q": {"kernel": (3, 6, 6)},
    },
    "tall": {"kernel": (9, 5)},
    "norm": {"scale": (6,)},
}
random_tree = functools.partial(trees.random_tree, shapes=SHAPES)


# The reference: one matrix at a time, numpy, float64


def newton_schulz_loop(x):
    if x.ndim > 2:
        return np.stack([newton_schulz_loop(m) for m in x])
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / np.linalg.norm(x)
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if turned else x


def tree_like(seed, shapes):
    return random_tree(seed, np.float64, shapes=shapes)


LAYER = {"q": {"kernel": (6, 6), "bias": (6,)}, "up": {"kernel": (6, 10)}}
TREES = {
    "stacked": (SHAPES, {}),
    "list": ([LAYER, LAYER], {}),
    "out_in": (SHAPES, {"layout": "out_in"}),
    "experts": ({"layers": {"experts": {"up": {"kernel": (2, 3, 6, 4)}}}}, {}),
    "dense_general": (
        {"attn": {"query": {"kernel": (6, 2, 3)}, "out": {"kernel": (2, 3, 6)}}, "b": (4,)},
        {},
    ),
    "conv": ({"k": (3, 3, 2, 5)}, {"matrices": {"k": MuonDimensionNumbers((0, 1, 2), 3)}}),
    "transposed": ({"k": (5, 3, 4)}, {"matrices": {"k": MuonDimensionNumbers(2, 0)}}),
}
KINDS = [("ema", True), ("ema", False), ("heavy_ball", True), ("heavy_ball", False)]


@pytest.mark.parametrize(
    "tree, kind, make",
    [
        *(("stacked", kind, "muon") for kind in KINDS),
        *((tree, KINDS[i % 4], "muon") for i, tree in enumerate(TREES) if i),
        *((tree, ("ema", False), "teon") for tree in ("stacked", "out_in")),
    ],
)
def test_the_readable_twin(tree, kind, make):
    """Four steps in float64, by loops over names and matrices and a Newton-Schulz in numpy."""
    shapes, where = TREES[tree]
    params, *grads = (tree_like(seed, shapes) for seed in range(5))
    momentum, nesterov = kind
    options = {
        "nesterov": nesterov,
        "momentum": momentum,
        "shape_scale": "spectral",
        "weight_decay": 0.1,
        "adam_learning_rate": 1e-3,
        **where,
    }
    if make == "teon":
        options |= {"group_size": 2, "groups": "q|up"}
    with jax.enable_x64(True):
        fast = getattr(optim, make)(0.03, orthogonalize="newton_schulz", **options)
        twin = reference(params, grads, 0.03, newton_schulz_loop, **options)
        for got, want in zip(run(fast, params, grads), twin, strict=True):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), got, want
            )


def test_an_update_walks_straight():
    """At most 60 moves between files, and the names of leaves are read by `init` alone."""
    first = update_trace.count("muon")
    assert first["moves"] <= 60 and first["names"] == 0
    for name in ("teon", "sift"):
        assert update_trace.count(name, times=2)["names"] == 0
    assert update_trace.count("optax.muon")["moves"] > 20  # the counter counts


def dimension_numbers(params):
    """Our rules in the form that optax takes."""
    flat, structure = jax.tree.flatten(params)
    axes = matrices.resolve(params)
    specs = [None if a is None else MuonDimensionNumbers(a.fan_in, a.fan_out) for a in axes]
    assert len(flat) == len(specs)
    return jax.tree.unflatten(structure, specs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_equals_optax(nesterov, consistent_rms):
    params = random_tree(0)
    grads = [random_tree(i) for i in range(1, 7)]
    specs = dimension_numbers(params)
    theirs = optax.contrib.muon(
        0.02,
        nesterov=nesterov,
        weight_decay=0.1,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=specs,
    )
    ours = optim.muon(
        0.02,
        nesterov=nesterov,
        weight_decay=0.1,
        shape_scale="width" if consistent_rms is None else "match_rms",
    )
    labels = matrices.labels(params)
    for a, b in zip(run(ours, params, grads), run(theirs, params, grads), strict=True):
        for x, y, label in zip(*map(jax.tree.leaves, (a, b, labels)), strict=True):
            if label == "muon" or not nesterov:  # optax uses nesterov for its AdamW, too
                np.testing.assert_allclose(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.torch_parity
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("bfloat16", 0.08)])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_equals_torch(monkeypatch, scale, dtype, limit):
    torch = pytest.importorskip("torch")
    if dtype == "float32":  # theirs has no option for it, and bfloat16 hides small mistakes
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    rng = np.random.default_rng(0)
    for shape in ((24, 16), (16, 24), (16, 16)):  # (in, out)
        w = rng.standard_normal(shape).astype(np.float32)
        grads = rng.standard_normal((10, *shape)).astype(np.float32)
        weight = torch.nn.Parameter(torch.tensor(w.T.copy()))
        theirs = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, adjust_lr_fn=scale)
        ours = optim.muon(
            0.02,
            momentum="heavy_ball",
            weight_decay=0.1,
            shape_scale="width" if scale == "original" else "match_rms",
            orthogonalize=orthogonalize.newton_schulz(dtype=dtype),
        )
        got = run(ours, {"w": jnp.asarray(w)}, [{"w": jnp.asarray(g)} for g in grads])
        for g, tree in zip(grads, got, strict=True):
            weight.grad = torch.tensor(g.T.copy())
            theirs.step()
            want = weight.detach().numpy().T
            moved = np.linalg.norm(want - w)
            assert np.linalg.norm(np.asarray(tree["w"]) - want) < limit * moved


# The bare direction


def test_scale_by_muon_keeps_the_sign_and_knows_no_shape():
    grads = {
        "w": jnp.asarray(random_tree(0, shapes={"w": (4, 16)})["w"]),
        "v": jnp.array([1.0, -2.0]),
    }
    tx = optim.scale_by_muon(orthogonalize=orthogonalize.svd())
    updates, state = tx.update(grads, tx.init(grads))
    u, _, vh = np.linalg.svd(grads["w"], full_matrices=False)
    np.testing.assert_allclose(updates["w"], u @ vh, atol=1e-5)
    # A vector's momentum is passed on: beta (1 - beta) / (1 - beta^2) + 1 gradients at step one.
    np.testing.assert_allclose(updates["v"], (0.95 / 1.95 + 1) * grads["v"], rtol=1e-5)
    assert isinstance(state, optim.MuonState)
    assert jax.tree.structure(state.mu) == jax.tree.structure(grads)


def test_names_that_are_no_matrices_are_refused():
    for name in ("norm_scale", "bias", "embedding"):
        with pytest.raises(ValueError, match=name):
            optim.scale_by_muon().init({name: jnp.ones((2, 3))})


def test_layout_turns_the_shape_factor_only():
    w = random_tree(0, shapes={"w": (4, 16)})
    sizes = []
    for layout in ("in_out", "out_in"):
        tx = optim.muon(1.0, layout=layout, shape_scale="spectral")
        sizes.append(np.linalg.norm(tx.update(w, tx.init(w), w)[0]["w"]))
    assert sizes[0] / sizes[1] == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_shape_scales(shape):
    w = random_tree(0, shapes={"w": shape})
    rms = {}
    for name in ("unit", "width", "spectral", "match_rms"):
        exact = orthogonalize.svd()
        tx = optim.muon(0.1, shape_scale=name, orthogonalize=exact)
        updates, _ = tx.update(w, tx.init(w), w)
        rms[name] = float(jnp.sqrt(jnp.mean(updates["w"] ** 2)))
    assert rms["match_rms"] == pytest.approx(0.02, rel=1e-4)
    assert rms["width"] / rms["unit"] == pytest.approx(max(1.0, (shape[1] / shape[0]) ** 0.5))
    assert rms["spectral"] / rms["unit"] == pytest.approx((shape[1] / shape[0]) ** 0.5)


def test_decay_without_gradient():
    params = random_tree(0, shapes={"w": (4, 16)})
    tx = optim.muon(0.1, weight_decay=0.5, shape_scale="match_rms")
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05 * params["w"], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 24, 2**20])
def test_blocks_do_not_change_the_result(monkeypatch, block):
    leaves = [
        random_tree(i, shapes={"w": s})["w"] for i, s in enumerate([(6, 3, 4), (4, 3), (2, 3, 4)])
    ]
    axes = [matrices.trailing_axes("w", x) for x in leaves]
    monkeypatch.setattr(buckets, "_BLOCK", block)
    # A new function: the cache of compiled programs does not know about the constant.
    got = buckets.map_matrices(lambda z: orthogonalize.newton_schulz()(z), leaves, axes)
    for x, y in zip(leaves, got, strict=True):
        np.testing.assert_allclose(y, newton_schulz_loop(x.astype(np.float64)), atol=2e-5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="momentum"):
        optim.muon(0.1, momentum="none")
    with pytest.raises(ValueError, match="shape_scale"):
        optim.muon(0.1, shape_scale="none")
    with pytest.raises(ValueError, match="beta"):
        optim.scale_by_muon(1.0)
    with pytest.raises(ValueError, match="comm_dtype is a floating dtype"):
        optim.muon(0.1, comm_dtype="int8")
    with pytest.raises(ValueError, match="'mystery'"):
        optim.muon(0.1).init({"mystery": jnp.ones((2, 3))})


# Matrices communicated in bfloat16


def through(x):
    """To bfloat16 and back, outside of any jit that could optimise the pair of casts away."""
    return np.asarray(x, jnp.bfloat16).astype(np.float32)


@pytest.mark.parametrize(
    "make", [optim.scale_by_muon, lambda **more: optim.scale_by_teon(group_size=1, **more)]
)
def test_comm_dtype_rounds_there_and_back_on_one_device(make):
    """jit and eager alike; the momentum and the leaves that are not matrices are not changed."""
    whole, narrow = (
        make(orthogonalize=lambda x: 3.0 * x, nesterov=False, comm_dtype=dtype)
        for dtype in (None, jnp.bfloat16)
    )
    shapes = {"up": (3, 6, 10), "tall": (9, 5), "norm": (6,)}
    params, grads = random_tree(0, shapes=shapes), random_tree(1, shapes=shapes)
    want, state = whole.update(grads, whole.init(params))
    for update in (narrow.update, jax.jit(narrow.update)):
        got, new = update(grads, narrow.init(params))
        jax.tree.map(np.testing.assert_array_equal, new.mu, state.mu)
        np.testing.assert_array_equal(got["norm"], want["norm"])
        for name in ("up", "tall"):
            assert got[name].dtype == jnp.float32
            np.testing.assert_array_equal(got[name], through(3 * through(want[name] / 3)))
            assert np.any(got[name] != want[name])


def test_comm_dtype_is_a_rounding_and_no_more():
    """Against the float64 iteration of the rounded matrix: products stay in float32."""
    x = random_tree(2)["layers"]["up"]["kernel"]
    tx = optim.scale_by_muon(nesterov=False, comm_dtype="bfloat16")
    got, _ = jax.jit(tx.update)({"up": x}, tx.init({"up": x}))
    want = newton_schulz_loop(through(x).astype(np.float64))
    np.testing.assert_allclose(got["up"], want, rtol=2**-8, atol=1e-5)
    tiny, _ = jax.jit(tx.update)({"up": 2.0**-100 * x}, tx.init({"up": x}))
    np.testing.assert_array_equal(tiny["up"], got["up"])  # float32's exponents


# Optax's protocol


def test_bfloat16_parameters_with_a_wider_momentum():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
    tx = optim.muon(0.1, mu_dtype=jnp.float32)
    state = tx.init(params)
    for i in range(2):
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(i))
        updates, new = jax.jit(tx.update)(grads, state, params)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
        state = new
    mu = optax.tree.get(state, "mu", filtering=lambda path, _: "MuonState" in str(path))
    assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.dtype(jnp.float32)}


def test_inject_hyperparams_and_schedules():
    params, grads = random_tree(0), [random_tree(i) for i in range(1, 4)]
    rates = [0.1, 0.05, 0.025]
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.5})
    scheduled = run(optim.muon(schedule, adam_learning_rate=schedule), params, grads)
    make = optax.inject_hyperparams(optim.muon, static_args=optim.STATIC_ARGS["muon"])
    tx = make(learning_rate=0.1, adam_learning_rate=0.1, weight_decay=0.0)
    state = tx.init(params)
    for rate, g, want in zip(rates, grads, scheduled, strict=True):
        state.hyperparams["learning_rate"] = state.hyperparams["adam_learning_rate"] = rate
        updates, state = jax.jit(tx.update)(g, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), params, want)


def test_regression_converges_and_steps_are_bounded():
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((256, 32)), 0.3 * rng.standard_normal((32, 32))
    x, target = x.astype(np.float32), target.astype(np.float32)
    tx = optim.muon(optax.linear_schedule(0.05, 0.0, 200))

    def loss(w):
        return jnp.mean((x @ (w["w"] - target)) ** 2)

    @jax.jit
    def train(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), jnp.linalg.norm(updates["w"], 2)

        return jax.lax.scan(step, (w, tx.init(w)), None, 200)

    start = {"w": jnp.zeros((32, 32))}
    (end, _), steps = train(start)
    assert float(loss(end)) < float(loss(start)) / 100
    assert float(steps.max()) <= 0.05 * 1.21
