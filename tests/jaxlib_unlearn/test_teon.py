"""TEON against the concatenated polar factor; its closed form, groups, and Muon where K = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn.optim import orthogonalize as orth
from jaxlib_unlearn.optim.spectral.muon import muon, scale_by_muon
from jaxlib_unlearn.optim.spectral.post import normuon
from jaxlib_unlearn.optim.spectral.splitting import Split
from jaxlib_unlearn.optim.spectral.teon import scale_by_teon, teon
from train.costs.flops import flops


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def step(tx, grads):
    with jax.enable_x64(True):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    return jax.tree.map(np.asarray, updates)


def polar(z):
    u, _, vh = np.linalg.svd(z, full_matrices=False)
    return u @ vh


def grouped(x, size, axis):
    """The definition on a stack (L, in, out): concatenate, polar factor, cut."""
    out = []
    for start in range(0, len(x), size):
        group = x[start : start + size]
        if len(group) < size:
            out += [polar(m) for m in group]
            continue
        joined = np.concatenate(list(group), axis=0 if axis == "in" else 1)
        out += np.split(polar(joined), size, axis=0 if axis == "in" else 1)
    return np.stack(out)


@pytest.mark.parametrize(
    "shape, axis, size, layers",
    [
        ((6, 6), "in", 2, 4),
        ((6, 6), "out", 2, 5),
        ((4, 9), "in", 3, 7),
        ((4, 9), "out", 2, 4),
        ((9, 4), "in", 2, 5),
        ((9, 4), "out", 3, 6),
        ((3, 20), "in", 4, 4),  # fewer columns than rows only as a group
        ((20, 3), "out", 4, 4),
    ],
)
def test_concatenated_polar_factor(shape, axis, size, layers):
    x = draw(0, layers, *shape)
    tx = scale_by_teon(size, axis, orthogonalize=orth.svd())
    np.testing.assert_allclose(step(tx, {"w": x})["w"], grouped(x, size, axis), atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_shared_gram_is_newton_schulz_of_the_concatenation(shape):
    x = draw(1, 2, *shape)
    for axis, at in (("in", 0), ("out", 1)):
        with jax.enable_x64(True):
            want = orth.polar_express(5)(jnp.concatenate(list(x), axis=at))
        got = step(scale_by_teon(2, axis), {"w": x})["w"]
        np.testing.assert_allclose(np.concatenate(list(got), axis=at), want, atol=1e-12)


def test_closed_form():
    """(out, in) storage: each layer times one inverse square root of the summed Gram."""
    x = draw(2, 2, 7, 5)  # (in, out), so U = x^T
    total = sum(m.T @ m for m in x)
    values, vectors = np.linalg.eigh(total)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    got = step(scale_by_teon(2, orthogonalize=orth.svd()), {"w": x})["w"]
    np.testing.assert_allclose(got, np.stack([m @ root for m in x]), atol=1e-10)
    np.testing.assert_allclose(sum(m.T @ m for m in got), np.eye(5), atol=1e-10)
    assert np.sum(got**2) == pytest.approx(5)
    assert max(np.linalg.norm(m, 2) for m in got) <= 1 + 1e-10


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_group_of_one_is_muon_bit_for_bit(shape):
    x = {"layers": {"q": {"kernel": draw(3, 5, *shape)}}}
    ours = step(scale_by_teon(1, orthogonalize=orth.polar_express(5)), x)
    muons = step(scale_by_muon(nesterov=False, orthogonalize=orth.polar_express(5)), x)
    jax.tree.map(np.testing.assert_array_equal, ours, muons)


def test_is_not_batched_muon():
    x = draw(4, 2, 64, 64)
    teons = step(scale_by_teon(2, orthogonalize=orth.svd()), {"w": x})["w"]
    muons = step(scale_by_muon(orthogonalize=orth.svd()), {"w": x})["w"]
    assert np.linalg.norm(teons - muons) > 0.3 * np.linalg.norm(muons)
    assert np.linalg.norm(teons) / np.linalg.norm(muons) == pytest.approx(0.5**0.5, rel=1e-6)


def test_equal_and_orthogonal_layers():
    tx = scale_by_teon(2, orthogonalize=orth.svd())
    one = draw(5, 6, 6)
    got = step(tx, {"w": np.stack([one, one])})["w"]
    np.testing.assert_allclose(got[0], polar(one) / np.sqrt(2), atol=1e-10)
    # (in, out): orthogonal column spaces of U = x^T are disjoint output directions here.
    left, right = np.zeros((2, 6, 6))
    left[:, :3], right[:, 3:] = draw(6, 6, 3), draw(7, 6, 3)
    got = step(tx, {"w": np.stack([left, right])})["w"]
    np.testing.assert_allclose(
        got, np.stack([polar_of_rank(m, 3) for m in (left, right)]), atol=1e-9
    )


def polar_of_rank(z, rank):
    u, _, vh = np.linalg.svd(z, full_matrices=False)
    return u[:, :rank] @ vh[:rank]


def test_symmetries():
    tx = scale_by_teon(2, orthogonalize=orth.svd())
    x = draw(8, 2, 5, 7)
    base = step(tx, {"w": x})["w"]
    np.testing.assert_allclose(step(tx, {"w": x[::-1]})["w"], base[::-1], atol=1e-10)
    np.testing.assert_allclose(step(tx, {"w": 3.0 * x})["w"], base, atol=1e-10)
    flipped = step(tx, {"w": np.stack([x[0], -x[1]])})["w"]
    np.testing.assert_allclose(flipped, np.stack([base[0], -base[1]]), atol=1e-10)
    # Unlike Muon: the size of one layer changes what the other one gets.
    uneven = step(tx, {"w": np.stack([x[0], 10 * x[1]])})["w"]
    assert np.abs(uneven[0] - base[0]).max() > 0.05


def test_orthogonal_equivariance():
    """One rotation of the outputs and a different one of each layer's inputs."""
    tx = scale_by_teon(2, orthogonalize=orth.svd())
    x = draw(9, 2, 5, 4)  # (in, out)
    out = polar(draw(10, 4, 4))
    inner = [polar(draw(11 + k, 5, 5)) for k in range(2)]
    turned = np.stack([r.T @ m @ out.T for r, m in zip(inner, x, strict=True)])
    base = step(tx, {"w": x})["w"]
    want = np.stack([r.T @ m @ out.T for r, m in zip(inner, base, strict=True)])
    np.testing.assert_allclose(step(tx, {"w": turned})["w"], want, atol=1e-10)


def test_zero_groups():
    x = np.concatenate([np.zeros((2, 4, 4)), draw(12, 2, 4, 4)])
    got = step(scale_by_teon(2), {"w": x})["w"]
    assert np.all(got[:2] == 0) and np.all(np.isfinite(got)) and np.abs(got[2:]).max() > 0.1


# Groups: the same blocks, however the tree holds them


def trees(x):
    """One stack, a list of layers, a dict of layers, two consecutive stacks cut inside a group."""
    layer = [{"q": {"kernel": m}} for m in x]
    return {
        "stack": {"layers": {"q": {"kernel": x}}},
        "list": {"layers": layer},
        "dict": {"layers": {str(i): one for i, one in enumerate(layer)}},
        "segments": {"layers": ({"q": {"kernel": x[:3]}}, {"q": {"kernel": x[3:]}})},
        "linen": {f"Block_{i}": {"Dense_0": {"kernel": m}} for i, m in enumerate(x)},
        "haiku": {f"net/h{i}_attn/query": {"w": m} for i, m in enumerate(x)},
        "dots": {f"blocks.{i}.q.weight": m for i, m in enumerate(x)},
    }


@pytest.mark.parametrize(
    "form, size, axis",
    [
        ("list", 2, "in"),
        ("dict", 3, "out"),
        ("segments", 2, "in"),
        ("segments", 3, "out"),
        ("linen", 2, "in"),
        ("haiku", 3, "out"),
        ("dots", 2, "in"),
    ],
)
def test_one_result_for_every_tree(form, size, axis):
    x = draw(13, 7, 6, 4)
    tx = scale_by_teon(size, axis, orthogonalize=orth.svd())
    leaves = jax.tree.leaves(step(tx, trees(x)[form]))
    got = np.concatenate([m if m.ndim == 3 else m[None] for m in leaves])
    np.testing.assert_allclose(got, grouped(x, size, axis), atol=1e-10)


def test_twelve_layers_of_a_list_sort_by_number():
    x = draw(14, 12, 4, 4)  # "10" < "2" as text
    tx = scale_by_teon(2, orthogonalize=orth.svd())
    got = step(tx, trees(x)["dict"])["layers"]
    want = grouped(x, 2, "in")
    for i in range(12):
        np.testing.assert_allclose(got[str(i)]["q"]["kernel"], want[i], atol=1e-10)


def test_a_trained_range_of_blocks_keeps_its_groups():
    x = draw(15, 8, 4, 4)
    tx = scale_by_teon(2, orthogonalize=orth.svd())
    got = step(tx, {"layers": {str(i): {"q": x[i]} for i in (5, 6, 7)}})["layers"]
    np.testing.assert_allclose(got["5"]["q"], polar(x[5]), atol=1e-10)  # its partner is frozen
    want = grouped(x[6:], 2, "in")
    np.testing.assert_allclose(got["6"]["q"], want[0], atol=1e-10)
    np.testing.assert_allclose(got["7"]["q"], want[1], atol=1e-10)


def test_grouped_query_attention_and_the_rest():
    """q, k and v are each grouped by themselves; other matrices follow Muon, vectors AdamW."""
    grads = {
        "layers": {
            "attn": {
                n: {"kernel": draw(i, 4, 8, w)}
                for i, (n, w) in enumerate([("q", 8), ("k", 4), ("v", 4), ("o", 8)])
            },
            "norm": {"scale": draw(20, 4, 8)},
        }
    }
    exact = orth.svd()
    ours = teon(1.0, orthogonalize=exact, adam_learning_rate=0.1)
    with jax.enable_x64(True):
        got, state = ours.update(grads, ours.init(grads), grads)
        peer = muon(
            1.0, orthogonalize=exact, shape_scale="spectral", nesterov=False, adam_learning_rate=0.1
        )
        muons, _ = peer.update(grads, state, grads)  # a TEON state is a Muon state
    for name in "qkv":
        x = grads["layers"]["attn"][name]["kernel"]
        want = -np.sqrt(x.shape[2] / x.shape[1]) * grouped(x, 2, "in")
        np.testing.assert_allclose(got["layers"]["attn"][name]["kernel"], want, atol=1e-10)
    del muons
    with jax.enable_x64(True):
        fresh, peer_state = peer.update(grads, peer.init(grads), grads)
    assert jax.tree.structure(peer_state) == jax.tree.structure(state)
    np.testing.assert_allclose(
        got["layers"]["attn"]["o"]["kernel"], fresh["layers"]["attn"]["o"]["kernel"], atol=1e-12
    )
    np.testing.assert_allclose(
        got["layers"]["norm"]["scale"], fresh["layers"]["norm"]["scale"], atol=1e-12
    )


def test_fused_projection_is_cut_first():
    x = draw(21, 4, 6, 18)
    tx = scale_by_teon(2, orthogonalize=orth.svd(), split={"c_attn": (6, 6, 6)})
    got = step(tx, {"layers": {"c_attn": {"kernel": x}}})["layers"]["c_attn"]["kernel"]
    want = np.concatenate([grouped(p, 2, "in") for p in np.split(x, 3, axis=2)], axis=2)
    np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("form", ["stack", "list"])
def test_heads_meet_their_likes(form):
    x = draw(22, 4, 6, 6)
    tx = scale_by_teon(2, orthogonalize=orth.svd(), split={"q": Split(3)})
    got = jax.tree.leaves(step(tx, trees(x)[form]))
    got = np.concatenate([m if m.ndim == 3 else m[None] for m in got])
    want = np.concatenate([grouped(p, 2, "in") for p in np.split(x, 3, axis=2)], axis=2)
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_momentum_conventions_without_nesterov_agree():
    grads = [{"w": draw(i, 4, 5, 6)} for i in range(3)]
    with jax.enable_x64(True):
        found = []
        for momentum in ("ema", "heavy_ball"):
            tx = scale_by_teon(2, momentum=momentum, orthogonalize=orth.svd())
            state = tx.init(grads[0])
            for g in grads:
                updates, state = tx.update(g, state)
            found.append(updates["w"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)


def test_normuon_follows_each_layer():
    x = draw(23, 2, 5, 6)
    plain = step(scale_by_teon(2, orthogonalize=orth.svd()), {"w": x})["w"]
    got = step(scale_by_teon(2, orthogonalize=orth.svd(), post=normuon()), {"w": x})["w"]
    for a, b in zip(got, plain, strict=True):
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b))
        rms = np.sqrt(np.mean(a**2, axis=0))  # over the inputs, per output neuron
        np.testing.assert_allclose(rms, rms[0], rtol=1e-6)


def test_toy_attention_model_learns():
    """Two blocks of attention: both reduce the loss; no claim about which is faster."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 32, 6, 16)).astype(np.float32)
    params = {
        "layers": {
            n: {"kernel": 0.3 * rng.standard_normal((2, 16, 16)).astype(np.float32)}
            for n in ("q", "k", "v", "o")
        }
    }

    def loss(params):
        h = x
        for i in range(2):
            q, k, v, o = (params["layers"][n]["kernel"][i] for n in ("q", "k", "v", "o"))
            mix = jax.nn.softmax((h @ q) @ jnp.swapaxes(h @ k, 1, 2) / 4)
            h = h + mix @ (h @ v) @ o
        return jnp.mean((h - y) ** 2)

    for tx in (teon(0.02), muon(0.02)):
        state, p = tx.init(params), params

        @jax.jit
        def advance(p, state, tx=tx):
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state, value

        values = []
        for _ in range(40):
            p, state, value = advance(p, state)
            values.append(float(value))
        assert values[-1] < 0.7 * values[0]


def test_flops_are_fewer_than_muons():
    """The square of the Gram matrix is shared: (4 K + 2) / 6 K of the products, square layers."""

    x = {"w": jnp.ones((4, 32, 32))}
    counts = []
    for size in (1, 2, 4):
        tx = scale_by_teon(size)
        # On CPUs wide matrices take another path.
        counts.append(flops(tx.update, x, tx.init(x), platform="tpu"))
    assert counts[1] / counts[0] == pytest.approx((4 * 2 + 2) / 12)
    assert counts[2] / counts[0] == pytest.approx((4 * 4 + 2) / 24)


def test_wrong_arguments():
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="group_size"):
            scale_by_teon(bad)
    with pytest.raises(ValueError, match="axis"):
        scale_by_teon(2, "rows")
    with pytest.raises(ValueError, match="embedding"):
        scale_by_teon().init({"embedding": jnp.ones((3, 4))})
