"""SIFT against a float64 loop and the card's numbers; its identities, limits and localisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

from jaxlib_unlearn.optim.orthogonalize import newton_schulz, svd
from jaxlib_unlearn.optim.spectral import fusion
from jaxlib_unlearn.optim.spectral.muon import muon, scale_by_muon
from jaxlib_unlearn.optim.spectral.sift import scale_by_sift, sift

FORGET = np.array([[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], float)
RETAIN = np.array([[-1, 1, 0, 0], [2, 0, 0, 1], [0, 0, -2, 0], [0, 1, 0, 1]], float)
FUSED = {
    1: [
        [0.3515156000, 0.1652485988, 0.7666825140, -0.2628462111],
        [0.7291908727, -0.1795853592, -0.2984941173, 0.5011534134],
        [0.1332948417, 0.0160092049, 0.1220296428, -0.0062181151],
        [0.4277670949, 0.0158237206, 0.2630573067, 0.0512623757],
    ],
    2: [
        [0.4924039411, 0.6121503205, 0.5416718240, -0.2990016370],
        [0.7105990140, -0.6632810387, 0.1840503395, 0.1457147129],
        [0.3007299211, -0.0112772829, -0.6472358212, -0.7003714223],
        [0.4026771841, 0.4303522646, -0.5037885463, 0.6315418548],
    ],
}
ALWAYS, NEVER = 2.0, -np.inf


def random(*shape, seed=0, dtype=float):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@functools.cache
def stepper(**options):
    """One compilation for all tests with the same options and shapes."""
    tx = scale_by_sift(**options)
    return jax.jit(lambda f, g: tx.update(f, tx.init(f), constraint_grads=g))


def one_step(f, *gs, x64=True, **options):
    """Direction and state after one step from zero momentum, fused unless a threshold is given."""
    options = {"threshold": ALWAYS, "num_constraints": len(gs), **options}
    with jax.enable_x64(x64):
        out, state = stepper(**options)(f, gs if len(gs) > 1 else gs[0])
        return jax.tree.map(np.asarray, out), state


def adjoint(x):
    return np.swapaxes(x, -1, -2)


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def inner(x, y):
    return np.sum(x * y, axis=(-2, -1))


def cosine(x, y):
    return inner(x, y) / np.sqrt(inner(x, x) * inner(y, y))


# The reference: one matrix at a time, numpy, float64


def newton_schulz_loop(x):
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if turned else x


def fuse_loop(matrices, rank, cap=True):
    side = min(matrices[0].shape)
    k = max(1, min(rank, side // len(matrices) if cap else side))
    parts = [np.linalg.svd(m, full_matrices=False) for m in matrices]
    u = np.hstack([u[:, :k] for u, _, _ in parts])
    v = np.hstack([vt[:k].T for _, _, vt in parts])
    return polar(u) @ polar(v).T


def sift_loop(streams, rank, threshold, nesterov=True, beta=0.95):
    """Directions of one matrix; ``streams`` is a list of steps, each with a gradient per stream."""
    buffers = [0.0] * len(streams[0])
    for gs in streams:
        buffers = [beta * b + g for b, g in zip(buffers, gs, strict=True)]
        mixed = [g + beta * b if nesterov else b for b, g in zip(buffers, gs, strict=True)]
        pairs = [cosine(x, y) for i, x in enumerate(mixed) for y in mixed[:i]]
        fused = min(pairs) < threshold
        yield fuse_loop(mixed, rank) if fused else newton_schulz_loop(sum(mixed)), fused


SHAPES = {
    "layers": {"up": {"kernel": (3, 6, 10), "bias": (3, 10)}, "down": {"kernel": (3, 9, 5)}},
    "square": {"kernel": (4, 4)},
    "norm": {"scale": (6,)},
}
random_tree = functools.partial(trees.random_tree, shapes=SHAPES, dtype=np.float64)


def adam_loop(grads, rate, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize("nesterov, bases", [(True, "svd"), (False, "subspace")])
def test_float64_reference(nesterov, bases):
    """Whole optimizer, several steps; both kinds of update occur, layer by layer."""
    params = random_tree(0)
    steps = [(random_tree(2 * i + 1), random_tree(2 * i + 2)) for i in range(4)]
    rate, decay, adam_rate, rank = 0.03, 0.1, 1e-3, 2
    tx = sift(
        rate,
        rank=rank,
        threshold=0.0,
        nesterov=nesterov,
        bases=bases,
        weight_decay=decay,
        adam_learning_rate=adam_rate,
    )
    kinds = set()
    with jax.enable_x64(True):
        state, update, got, p = tx.init(params), jax.jit(tx.update), [], params
        for f, g in steps:
            updates, state = update(f, state, p, constraint_grads=g)
            p = optax.apply_updates(p, updates)
            got.append(p)
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        pick = functools.partial(functools.reduce, lambda t, k: t[k.key], path)
        streams = [(pick(f), pick(g)) for f, g in steps]
        if w.ndim == 1 or path[-1].key == "bias":
            for step, tree in zip(
                adam_loop([f + g for f, g in streams], adam_rate), got, strict=True
            ):
                w = w + step
                np.testing.assert_allclose(pick(tree), w, rtol=1e-9, atol=1e-12)
            continue
        factor = np.sqrt(max(1, w.shape[-1] / w.shape[-2]))
        for layer in np.ndindex(*w.shape[:-2]):
            x, matrix = w[layer], [tuple(s[layer] for s in step) for step in streams]
            for (o, fused), tree in zip(sift_loop(matrix, rank, 0.0, nesterov), got, strict=True):
                kinds.add(fused)
                x = x - rate * (factor * o + decay * x)
                # Sides of at most 10 and 8 extra columns: the block is the whole space, exact.
                np.testing.assert_allclose(pick(tree)[layer], x, atol=1e-9)
    assert kinds == {True, False}


@pytest.mark.parametrize(
    "rank, msign, bases",
    [
        (1, "gram", "svd"),
        (2, "gram", "svd"),
        (256, "gram", "svd"),
        (2, "svd", "svd"),
        (1, "gram", "subspace"),
        (2, "gram", "subspace"),
    ],
)
def test_fixture(rank, msign, bases):
    out, state = one_step(FORGET, RETAIN, rank=rank, msign=msign, bases=bases)
    np.testing.assert_allclose(out, FUSED[min(rank, 2)], atol=1e-9)
    np.testing.assert_allclose(state.cos, -0.2773500981, atol=1e-9)
    assert state.fused


@pytest.mark.parametrize("shape", [(40, 7, 12), (40, 12, 7), (40, 9, 9)], ids=str)
def test_identities(shape):
    """Forty random pairs at once, k = 2."""
    f, g = random(*shape), random(*shape, seed=1)
    go = functools.partial(one_step, rank=2)
    out, _ = go(f, g)
    want = [fuse_loop([f[i], g[i]], 2) for i in range(len(f))]
    np.testing.assert_allclose(out, want, atol=1e-10)  # Gram form = SVD form
    np.testing.assert_allclose(out, go(f, g, msign="svd")[0], atol=1e-10)
    values = np.linalg.svd(out, compute_uv=False)
    np.testing.assert_allclose(values[:, :4], 1, atol=1e-10)
    np.testing.assert_allclose(values[:, 4:], 0, atol=1e-10)
    # Invariant to scale and order, equivariant under transposition and rotations.
    np.testing.assert_allclose(out, go(1e-6 * f, 1e5 * g)[0], atol=1e-9)
    np.testing.assert_allclose(out, go(g, f)[0], atol=1e-10)
    np.testing.assert_allclose(adjoint(out), go(adjoint(f), adjoint(g))[0], atol=1e-10)
    a, b = (polar(random(n, n, seed=2)) for n in shape[1:])
    np.testing.assert_allclose(a @ out @ b, go(a @ f @ b, a @ g @ b)[0], atol=1e-9)
    np.testing.assert_allclose(-out, go(-f, -g)[0], atol=1e-10)


@pytest.mark.parametrize("closeness", [0, 1e-1, 1e-5])
def test_both_objectives_descend(closeness):
    """Empirical, not a theorem: <M, O> >= 0 for both, also where they almost oppose each other.

    Bases by SVD: the Gram matrices of the last case have eigenvalues of 1e-13, and rounding is not
    small compared with those.
    """
    f, noise = random(400, 6, 8), random(400, 6, 8, seed=1)
    g = noise if closeness == 0 else closeness * noise - f
    for rank in (1, 3):
        out, _ = one_step(f, g, rank=rank, msign="svd")
        assert inner(f, out).min() > -1e-6 and inner(g, out).min() > -1e-6


def test_small_stream_is_not_overruled():
    """Norms 100 to 1 in conflict: Muon on the sum increases the small objective, SIFT neither."""
    f = random(20, 16, 16)
    g = 0.01 * (random(20, 16, 16, seed=1) - 0.7 * f)
    fused, _ = one_step(f, g, rank=8)
    muon_like, _ = one_step(f, g, threshold=NEVER)
    assert cosine(g, muon_like).max() < 0
    assert min(cosine(g, fused).min(), cosine(f, fused).min()) > 0.2


def test_orthogonal_tasks_are_added():
    f, g = np.zeros((8, 10)), np.zeros((8, 10))
    f[:4, :5], g[4:, 5:] = random(4, 2) @ random(2, 5), random(4, 2, seed=1) @ random(2, 5, seed=1)
    with jax.enable_x64(True):
        want = np.asarray(svd()(jnp.asarray(f + g)))
    np.testing.assert_allclose(one_step(f, g, rank=2)[0], want, atol=1e-9)
    # Missing ranks add nothing: k = 4 stays O of rank 2 + 2.
    np.testing.assert_allclose(one_step(f, g, rank=4)[0], want, atol=1e-9)


@pytest.mark.parametrize("bases", ["svd", "subspace"])
def test_identical_and_opposite_tasks(bases):
    m = random(12, 16, dtype=np.float32)
    go = functools.partial(one_step, x64=False, rank=5, first_passes=64, bases=bases)
    u, _, vt = np.linalg.svd(m)
    top = u[:, :5] @ vt[:5]
    # float32 round-off puts eigenvalues of 1e-7 where zeros should be; tol 1e-5 drops them.
    np.testing.assert_allclose(go(m, 3 * m)[0], top, atol=2e-5)
    np.testing.assert_allclose(go(m, -m)[0], 0, atol=2e-5)
    # Newton-Schulz: the same direction, singular values of its band; nothing for opposite tasks.
    ns = go(m, 3 * m, msign="ns")[0]
    assert cosine(ns, top) > 0.98
    assert np.linalg.norm(go(m, -m, msign="ns")[0]) < 0.1
    # Without a tolerance null directions come back at full size (as in the published code).
    assert np.linalg.norm(go(m, -m, msign="svd", bases="svd")[0]) > 1


def test_tolerance_decides_near_opposition():
    """M_g = -M_f + 1 %: eigenvalues of the Gram matrices near 4e-6 on either side of tol."""
    f = random(16, 20)
    g = -f + 0.002 * random(16, 20, seed=1)
    kept, _ = one_step(f, g, rank=1, tol=1e-9)
    dropped, _ = one_step(f, g, rank=1, tol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(kept), np.sqrt(2), atol=1e-6)
    assert np.linalg.norm(dropped) < 0.01


@pytest.mark.parametrize("rank, bases", [(8, "svd"), (1, "svd"), (1, "subspace")])
def test_nearly_opposed_streams_in_float32(rank, bases):
    """The case SIFT is made for: M_g = -M_f + a small difference, down to a hundred-thousandth."""
    f, other = (random(16, 20, seed=i, dtype=np.float32) for i in (0, 1))
    go = functools.partial(one_step, x64=False, rank=rank, bases=bases, first_passes=200,
                           nesterov=False)  # fmt: skip
    for share in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        g = -f + np.float32(share) * other
        want = fuse_loop([np.float64(f), np.float64(g)], rank)
        out, _ = go(f, g)
        assert np.linalg.norm(out - want) <= 1e-3 * np.linalg.norm(want), share
    # They differ only by rounding: one stream against its own opposite.
    assert np.linalg.norm(go(f, np.float32(-3) * f + np.float32(1e-7) * other)[0]) < 1e-6
    # Streams that agree are as sensitive.
    g = f + np.float32(1e-3) * other
    want = fuse_loop([np.float64(f), np.float64(g)], rank)
    assert np.linalg.norm(go(f, g)[0] - want) <= 1e-3 * np.linalg.norm(want)


def test_square_and_full_rank_without_cap_is_half_the_sum():
    f, g = random(6, 6), random(6, 6, seed=1)
    got, _ = one_step(f, g, rank=6, rank_cap=False)
    np.testing.assert_allclose(got, (polar(f) + polar(g)) / 2, atol=1e-10)
    assert np.linalg.matrix_rank(one_step(f, g, rank=6)[0], tol=1e-6) == 6


def test_rank_one_closed_form():
    f, g = random(50, 5, 7), random(50, 5, 7, seed=1)
    out, _ = one_step(f, g, rank=1)
    (uf, _, vf), (ug, _, vg) = (np.linalg.svd(x) for x in (f, g))
    uf, ug, vf, vg = uf[..., 0], ug[..., 0], vf[:, 0], vg[:, 0]
    cu, cv = np.sum(uf * ug, -1), np.sum(vf * vg, -1)
    want = (np.sqrt((1 + cu) * (1 + cv)) + np.sqrt((1 - cu) * (1 - cv))) / 2
    for u, v in ((uf, vf), (ug, vg)):
        np.testing.assert_allclose(np.einsum("bi,bij,bj->b", u, out, v), want, atol=1e-10)


def test_newton_schulz_msign():
    f, g = random(4, 10, 14), random(4, 10, 14, seed=1)
    got, _ = one_step(f, g, rank=3, msign="ns")
    for i in range(4):
        parts = [np.linalg.svd(x, full_matrices=False) for x in (f[i], g[i])]
        u = np.hstack([u[:, :3] for u, _, _ in parts])
        v = np.hstack([vt[:3].T for _, _, vt in parts])
        np.testing.assert_allclose(
            got[i], newton_schulz_loop(u) @ newton_schulz_loop(v).T, atol=1e-9
        )


def test_several_constraints():
    tasks = [random(8, 11, seed=i) for i in range(3)]
    out, state = one_step(*tasks, rank=256)
    np.testing.assert_allclose(out, fuse_loop(tasks, 256), atol=1e-10)  # k = 8 // 3
    pairs = [cosine(tasks[i], tasks[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(state.cos, min(pairs), atol=1e-10)
    assert len(state.mu_constraint) == 2
    plain, _ = one_step(*tasks, threshold=NEVER)
    np.testing.assert_allclose(plain, newton_schulz_loop(sum(tasks)), atol=1e-9)
    # AdamW's leaves get the sum of all.
    params = {"bias": np.zeros(3)}
    with jax.enable_x64(True):
        tx, adamw = sift(0.1, num_constraints=2), optax.adamw(0.1, weight_decay=0.0)
        one, two, three = ({"bias": random(3, seed=i)} for i in range(3))
        got, _ = tx.update(one, tx.init(params), params, constraint_grads=(two, three))
        total = jax.tree.map(lambda *x: sum(x), one, two, three)
        want, _ = adamw.update(total, adamw.init(params), params)
    np.testing.assert_allclose(got["bias"], want["bias"], rtol=1e-12)


def test_a_silent_stream():
    """A zero momentum opposes nothing and adds nothing; no NaN."""
    f, zero = random(6, 9, dtype=np.float32), np.zeros((6, 9), np.float32)
    for bases in ("svd", "subspace"):
        out, state = one_step(f, zero, x64=False, rank=2, first_passes=32, bases=bases)
        u, _, vt = np.linalg.svd(f)
        np.testing.assert_allclose(out, u[:, :2] @ vt[:2], atol=1e-4)
        assert state.cos == 1 and state.fused
        out, state = one_step(zero, zero, x64=False, bases=bases)
        assert not out.any() and all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert not one_step(f, zero, x64=False, threshold=1.0)[1].fused  # strictly below


def test_threshold_is_strict():
    f, g = np.diag([3.0, 4.0]), np.diag([4.0, -3.0])  # cosine 0 exactly
    for threshold, fused in ((0.0, False), (1e-9, True), (NEVER, False), (np.nan, False)):
        assert bool(one_step(f, g, threshold=threshold)[1].fused) is fused


@pytest.mark.parametrize("never", [{"threshold": NEVER}, {"spatial_mask": lambda path: False}])
def test_never_fused_is_muon_on_the_sum(never):
    params = random_tree(0, dtype=np.float32)
    steps = [
        (random_tree(2 * i + 1, dtype=np.float32), random_tree(2 * i + 2, dtype=np.float32))
        for i in range(3)
    ]
    ours = sift(0.1, weight_decay=0.1, **never)
    theirs = muon(0.1, weight_decay=0.1, momentum="heavy_ball")
    mine, other = ours.init(params), theirs.init(params)
    update, update_other = jax.jit(ours.update), jax.jit(theirs.update)
    for f, g in steps:
        total = jax.tree.map(np.add, f, g)
        a, mine = update(f, mine, params, constraint_grads=g)
        b, other = update_other(total, other, params)
        # Sums in another order: Newton-Schulz magnifies float32 rounding to a few 1e-6.
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), a, b)
    assert not any(x.any() for x in jax.tree.leaves(mine.inner_states["muon"].inner_state[0].fused))


def test_momenta_are_linear_and_decide():
    """mu_f + mu_g is the momentum of the sum; the cosine is that of the momenta."""
    f, g = random(5, 6), random(5, 6, seed=1)
    g -= f * inner(f, g) / inner(f, f) * 2  # reflected to the other side of orthogonal
    steps = [(f, -g), (0.01 * f, 0.01 * g), (0.01 * f, 0.01 * g)]
    with jax.enable_x64(True):
        tx, total = scale_by_sift(threshold=0.0), scale_by_muon(momentum="heavy_ball")
        state, other = tx.init(f), total.init(f)
        for a, b in steps:
            _, state = tx.update(a, state, constraint_grads=b)
            _, other = total.update(a + b, other)
            np.testing.assert_allclose(state.mu + state.mu_constraint, other.mu, atol=1e-12)
    now, before = cosine(*steps[-1]), cosine(*steps[0])
    assert now * before < 0 and np.sign(state.cos) == np.sign(before)


# Where and when


def step_with_mask(f, g, mask):
    tx = scale_by_sift(threshold=ALWAYS, spatial_mask=mask)
    with jax.enable_x64(True):
        return jax.jit(lambda f, g: tx.update(f, tx.init(f), constraint_grads=g))(f, g)


def test_masks():
    """By path, by tree, by layer; where no matrix may be fused, one momentum and Muon."""
    f, g = random_tree(1), random_tree(2)
    f["layers"].pop("up"), g["layers"].pop("up")
    layers = np.array([True, False, True])
    masks = {
        "path": lambda path: layers if path == "layers/down/kernel" else False,
        "tree": {"layers": {"down": {"kernel": layers}}, "square": False, "norm": False},
    }
    fused, _ = one_step(f, g)
    plain, _ = one_step(f, g, threshold=NEVER)
    for mask in masks.values():
        out, state = step_with_mask(f, g, mask)
        down = [t["layers"]["down"]["kernel"] for t in (out, fused, plain)]
        want = np.where(layers[:, None, None], down[1], down[2])
        np.testing.assert_allclose(down[0], want, atol=1e-10)
        np.testing.assert_array_equal(state.fused["layers"]["down"]["kernel"], layers)
        np.testing.assert_allclose(out["square"]["kernel"], plain["square"]["kernel"], atol=1e-10)
        assert state.mu_constraint["square"]["kernel"] == optax.MaskedNode()
        total = f["square"]["kernel"] + g["square"]["kernel"]
        np.testing.assert_allclose(state.mu["square"]["kernel"], total)
    whole = {"layers": False, "square": True, "norm": True}  # a prefix
    assert not step_with_mask(f, g, whole)[1].fused["layers"]["down"]["kernel"].any()
    # The same leaves inside partition, where others are masked.
    with jax.enable_x64(True):
        tx = sift(0.1, spatial_mask=masks["tree"], threshold=ALWAYS)
        state = tx.update(f, tx.init(f), f, constraint_grads=g)[1].inner_states["muon"]
    np.testing.assert_array_equal(state.inner_state[0].fused["layers"]["down"]["kernel"], layers)


@pytest.mark.parametrize(
    "when",
    [
        {"step_gate": (0, 2), "threshold": ALWAYS},
        {"step_gate": lambda count: count % 2 == 0, "threshold": ALWAYS},
        {"threshold": lambda count: jnp.where(count % 2 == 0, 2.0, -2.0)},
    ],
    ids=["steps", "gate", "schedule"],
)
def test_steps(when):
    tx = scale_by_sift(**when)
    state, seen = tx.init(jnp.asarray(FORGET)), []
    update = jax.jit(tx.update)
    for _ in range(4):
        _, state = update(jnp.asarray(FORGET), state, constraint_grads=jnp.asarray(RETAIN))
        seen.append(bool(state.fused))
    assert seen == [True, False, True, False] and update._cache_size() == 1


def primitives(jaxpr, outer=()):
    """Every primitive of a program with the names of the primitives that enclose it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, outer
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                yield from primitives(inside, (*outer, eqn.primitive.name))


@pytest.mark.parametrize("bases", ["svd", "subspace"])
def test_localisation_saves_time(bases):
    """Decompositions run one matrix at a time inside a condition, not for all under a select."""
    x = jnp.ones((12, 8, 10))

    def program(**options):
        tx = scale_by_sift(bases=bases, **options)
        jaxpr = jax.make_jaxpr(lambda f, s, g: tx.update(f, s, constraint_grads=g))
        return list(primitives(jaxpr(x, tx.init(x), x).jaxpr))

    found = [outer for name, outer in program(threshold=0.0) if name in ("svd", "eigh", "qr")]
    assert found
    for outer in found:
        where = [name for name in outer if name in ("cond", "scan")]
        assert where[:3] == ["cond", "scan", "cond"], outer  # any? then one by one: this one?
    # Always fused: one batch, except for the choice by platform around each decomposition (on CPUs
    # a loop). Never by mask: no decomposition at all, one momentum, one choice by platform.
    always = [outer for name, outer in program(threshold=ALWAYS) if name == "eigh"]
    loops = [[name for name in outer if name in ("cond", "scan")] for outer in always]
    assert always and all(loop in (["cond"], ["cond", "scan"]) for loop in loops), loops
    masked = [name for name, _ in program(spatial_mask=False)]
    assert not {"svd", "eigh", "qr"} & {*masked}
    assert masked.count("cond") == masked.count("platform_index") == 1


def test_one_in_a_stack_equals_alone():
    """A stack of conflicting and agreeing matrices against a Python loop over them."""
    f = random(6, 5, 8)
    g = np.where(np.arange(6)[:, None, None] % 2, 1, -1) * f + 0.5 * random(6, 5, 8, seed=1)
    out, state = one_step(f, g, threshold=0.0)
    np.testing.assert_array_equal(state.fused, np.arange(6) % 2 == 0)
    for i in range(6):
        alone, _ = one_step(f[i], g[i], threshold=0.0)
        np.testing.assert_allclose(out[i], alone, atol=1e-10)


# The fast path


def decaying(seed, count=4, shape=(24, 40)):
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal((count, *shape)), full_matrices=False)
    return (u * 0.6 ** np.arange(min(shape))) @ vt


def test_fast_path_follows_the_exact_one():
    """Cold start, then two passes a step on drifting momenta.

    With 4 extra columns, a pass shrinks the error by (0.6^7 / 0.6^2)^2 = 0.006.
    """
    steps = [(decaying(1) + 0.002 * random(4, 24, 40, seed=i), decaying(2)) for i in range(4)]
    with jax.enable_x64(True):
        options = {"rank": 3, "threshold": ALWAYS}
        exact, fast = (
            scale_by_sift(**options),
            scale_by_sift(bases="subspace", oversample=4, **options),
        )
        s, t = exact.init(steps[0][0]), fast.init(steps[0][0])
        assert t.basis.shape == (4, 2, 24, 3)
        run, run_fast = jax.jit(exact.update), jax.jit(fast.update)
        for f, g in steps:
            want, s = run(f, s, constraint_grads=g)
            got, t = run_fast(f, t, constraint_grads=g)
            np.testing.assert_allclose(got, want, atol=1e-3)
    basis = np.asarray(t.basis)
    gram = adjoint(basis) @ basis
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-10)


def test_old_bases_get_more_passes():
    """After steps without fusion the bases are old; they get as many passes as on a first step."""
    tx = scale_by_sift(rank=2, bases="subspace", oversample=0, passes=1, first_passes=200)
    with jax.enable_x64(True):
        state, update = tx.init(decaying(1)), jax.jit(tx.update)
        for seed in (1, 2):
            f = 1e-6 * decaying(seed)
            _, state = update(f, state, constraint_grads=f)
            assert not state.fused.any()
        f, g = decaying(3), 0.3 * decaying(4) - decaying(3)
        got, state = update(f, state, constraint_grads=g)
        assert state.fused.all()
        want, _ = one_step(f, g, rank=2)
    np.testing.assert_allclose(got, want, atol=1e-4)  # the older momenta still contribute 1e-6


# Protocol


TREE = {"a": (2, 6, 8), "b": (8, 4), "v": (5,)}


def test_half_precision_is_close_to_float32():
    f, g = decaying(1), decaying(2)
    wide, _ = one_step(np.float32(f), np.float32(g), x64=False, rank=3)
    half, _ = one_step(
        jnp.asarray(f, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16), x64=False, rank=3
    )
    # Rounding the gradients moves singular vectors by 2^-9 over the relative gap, 0.4.
    np.testing.assert_allclose(half.astype(np.float32), wide, atol=0.05)
    assert cosine(half.astype(np.float32), wide).min() > 0.999


def test_shape_scale_and_norm():
    f, g = random(4, 9), random(4, 9, seed=1)
    base, _ = one_step(f, g, rank=1)
    wide, _ = one_step(f, g, rank=1, shape_scale="width")
    np.testing.assert_allclose(wide, 1.5 * base)
    tall, _ = one_step(f.T, g.T, rank=1, shape_scale="width")
    np.testing.assert_allclose(tall, base.T, atol=1e-12)
    matched, _ = one_step(f, g, rank=1, match_norm=True)
    np.testing.assert_allclose(np.linalg.norm(matched), 2)  # sqrt(min(4, 9))


def test_complex_matrices():
    def complex_random(seed):
        return random(5, 7, seed=seed) + 1j * random(5, 7, seed=seed + 10)

    f, g = complex_random(0), complex_random(1)
    out, state = one_step(f, g, rank=2)
    np.testing.assert_allclose(np.linalg.svd(out)[1], [1, 1, 1, 1, 0], atol=1e-10)
    turned, _ = one_step(f.conj().T, g.conj().T, rank=2)
    np.testing.assert_allclose(turned, out.conj().T, atol=1e-10)
    want = np.real(np.vdot(f, g)) / np.linalg.norm(f) / np.linalg.norm(g)
    np.testing.assert_allclose(state.cos, want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"msign": "qr"}, "msign is one of"),
        ({"bases": "power"}, "bases is one of"),
        ({"shape_scale": "kimi"}, "shape_scale is one of"),
        ({"beta": 1.0}, r"beta lies in \[0, 1\), got 1.0"),
        ({"rank": 0}, "rank is at least 1, got 0"),
        ({"passes": 0}, "passes is at least 1"),
        ({"num_constraints": 0}, "num_constraints is at least 1"),
        ({"spatial_mask": lambda path: "yes"}, "spatial_mask says 'yes' for 'w'"),
        ({"spatial_mask": {"w": np.array([True, False])}}, "shaped like the stack axes"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_sift(**options).init({"w": jnp.ones((3, 4, 4))})


@pytest.mark.parametrize("tx", [scale_by_sift(), sift(0.1)], ids=["bare", "whole"])
def test_two_streams_are_asked_for(tx):
    x = {"w": jnp.ones((2, 3))}
    state = tx.init(x)
    with pytest.raises(ValueError, match="constraint_grads="):
        tx.update(x, state, x)
    with pytest.raises(ValueError, match="a tree like"):
        tx.update(x, state, x, constraint_grads=[jnp.ones((2, 3))])
    with pytest.raises(ValueError, match=r"'w'.*\(3, 2\).*\(2, 3\)"):
        tx.update(x, state, x, constraint_grads={"w": jnp.ones((3, 2))})


def test_refuses_what_is_no_matrix_by_name():
    with pytest.raises(ValueError, match="norm/scale"):
        scale_by_sift().init({"norm": {"scale": jnp.ones((2, 3))}})


def test_matrix_function_is_the_same_object():
    """Otherwise every eager call of the buckets would compile again."""
    method = fusion.Method(1, True, "gram", "svd", 2, 8, False, newton_schulz())
    assert fusion.matrix_function(method, True) is fusion.matrix_function(method, True)


def test_toy_run():
    """Two regressions on nearly opposite inputs, the first with a hundred times the loss."""
    a, w = random(4, 8, dtype=np.float32), random(8, 12, seed=1, dtype=np.float32)
    b = -0.9 * a + 0.4 * random(4, 8, seed=2, dtype=np.float32)

    def forget(x):
        return 50 * jnp.mean((a @ x - a @ w) ** 2)

    def retain(x):
        return jnp.mean((b @ x - a @ w) ** 2) / 2

    def run(threshold):
        tx = optax.chain(
            scale_by_sift(rank=4, threshold=threshold), optax.scale_by_learning_rate(0.02)
        )

        @jax.jit
        def step(x, state):
            grads, others = jax.grad(forget)(x), jax.grad(retain)(x)
            updates, state = tx.update(grads, state, x, constraint_grads=others)
            return optax.apply_updates(x, updates), state

        x = jnp.zeros_like(w)
        state = tx.init(x)
        for _ in range(10):
            x, state = step(x, state)
        return float(forget(x) / forget(0 * x)), float(retain(x) / retain(0 * x))

    on_sum, kept_apart = run(NEVER), run(0.0)
    assert on_sum[0] < 1 < on_sum[1]
    assert max(kept_apart) < 1
