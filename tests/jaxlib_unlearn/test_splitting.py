"""Heads, fused projections and transformations after the polar step, against loops over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim import orthogonalize as orth
from jaxlib_unlearn.optim.matrices import MatrixAxes
from jaxlib_unlearn.optim.spectral.muon import muon, scale_by_muon
from jaxlib_unlearn.optim.spectral.post import Post, normuon
from jaxlib_unlearn.optim.spectral.splitting import Split, cut, find_split, join


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def polar(x):
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def direction(grads, **options):
    tx = scale_by_muon(orthogonalize=orth.svd(), **options)
    with jax.enable_x64(True):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    return jax.tree.map(np.asarray, updates)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(
    "split, sections, axis",
    [
        (3, 3, -1),
        (Split(2, "in"), 2, -2),
        ((2, 4), [2], -1),
        (Split((1, 2, 5), "in"), [1, 3], -2),
    ],
)
def test_every_block_by_itself(stack, split, sections, axis):
    x = draw(0, *stack, 8, 6)
    got = direction({"q": {"kernel": x}}, split={"q/": split})["q"]["kernel"]
    want = np.concatenate([polar(block) for block in np.split(x, sections, axis)], axis)
    np.testing.assert_allclose(got, want, atol=1e-10)


def test_first_pattern_wins_and_others_stay_whole():
    x = {"q": draw(1, 4, 6), "k": draw(2, 4, 6), "up": draw(3, 4, 6)}
    got = direction(x, split={"^q": 2, "^[qk]": 3})
    for name, parts in (("q", 2), ("k", 3), ("up", 1)):
        want = np.concatenate([polar(block) for block in np.split(x[name], parts, 1)], 1)
        np.testing.assert_allclose(got[name], want, atol=1e-10)


def test_dense_general_splits_at_its_head_axis():
    shapes = {"query": (6, 2, 3), "out": (2, 3, 6)}
    x = {"attn": {name: {"kernel": draw(i, *s)} for i, (name, s) in enumerate(shapes.items())}}
    tx = muon(
        1.0,
        shape_scale="unit",
        orthogonalize=orth.svd(),
        split={"query": 2, "out": Split(2, "in")},
    )
    with jax.enable_x64(True):
        updates, _ = tx.update(x, tx.init(x), x)
    query, out = (updates["attn"][n]["kernel"] for n in ("query", "out"))
    for head in range(2):
        want = -polar(x["attn"]["query"]["kernel"][:, head])
        np.testing.assert_allclose(query[:, head], want, atol=1e-10)
        want = -polar(x["attn"]["out"]["kernel"][head])
        np.testing.assert_allclose(out[head], want, atol=1e-10)


def test_shape_factors_are_those_of_the_blocks():
    x = {"c_attn": draw(4, 4, 24)}
    tx = muon(
        1.0,
        shape_scale="spectral",
        orthogonalize=orth.svd(),
        split={"c_attn": (16, 4, 4)},
        matrices=None,
    )
    tree = {"c_attn": {"kernel": x["c_attn"]}}
    with jax.enable_x64(True):
        updates, _ = tx.update(tree, tx.init(tree), tree)
    blocks = np.split(np.asarray(updates["c_attn"]["kernel"]), [16, 20], axis=1)
    norms = [np.linalg.norm(block, 2) for block in blocks]
    np.testing.assert_allclose(norms, [2.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("split", [5, (3, 2), Split(3, "in"), Split((4, 5), "in")])
def test_sizes_that_do_not_fit_are_told_at_init(split):
    with pytest.raises(ValueError, match="'q/kernel'"):
        scale_by_muon(split={"q": split}).init({"q": {"kernel": jnp.ones((4, 6))}})


@pytest.mark.parametrize("split", [0, (), (3, -3), Split(2, "rows")])
def test_splits_that_make_no_sense(split):
    with pytest.raises(ValueError, match="no way to split"):
        find_split("q", {"q": split})


@pytest.mark.parametrize("split", [Split(3), Split((2, 4)), Split(2, "in"), Split((1, 3), "in")])
@pytest.mark.parametrize("spec", [P(None, "x", None), P(None, None, "x"), P("x", None, None), P()])
def test_cut_and_join_keep_an_explicit_sharding(split, spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    x = jnp.asarray(draw(5, 2, 4, 6), jnp.float32)
    axes = MatrixAxes((0,), (1,), (2,))
    placed = jax.device_put(x, NamedSharding(mesh, spec))

    @jax.jit
    def there_and_back(x):
        parts = cut(x, axes, split)
        return join([2 * part for part in parts], x, axes, split)

    got = there_and_back(placed)
    np.testing.assert_array_equal(got, 2 * x)
    assert got.sharding.is_equivalent_to(placed.sharding, 3)


# The hook


def normuon_loop(directions, beta2=0.95, eps=1e-10):
    """The update rule on (in, out) matrices, one step after the other."""
    v = np.zeros(directions[0].shape[1])
    for o in directions:
        v = beta2 * v + (1 - beta2) * np.mean(o**2, axis=0)
        scaled = o / (np.sqrt(v) + eps)
        yield scaled * np.linalg.norm(o) / np.linalg.norm(scaled)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_normuon_reference(shape):
    grads = [draw(i, 2, *shape) for i in range(4)]
    tx = scale_by_muon(0.0, nesterov=False, orthogonalize=orth.svd(), post=normuon())
    with jax.enable_x64(True):
        state, got = tx.init({"w": grads[0]}), []
        for g in grads:
            updates, state = tx.update({"w": g}, state)
            got.append(updates["w"])
    for i in range(2):
        want = list(normuon_loop([polar(g[i]) for g in grads]))
        np.testing.assert_allclose([step[i] for step in got], want, atol=1e-9)
    assert state.post[0].shape == (2, 1, shape[1])


def test_normuon_on_split_heads_and_zeros():
    tx = scale_by_muon(post=normuon(), split={"q": 2})
    x = {"q": jnp.asarray(draw(6, 4, 6), jnp.float32), "w": jnp.zeros((3, 3))}
    updates, state = tx.update(x, tx.init(x))
    assert [v.shape for v in state.post] == [(1, 2, 3), (1, 3)]
    assert np.all(updates["w"] == 0) and np.all(np.isfinite(updates["q"]))
    with pytest.raises(ValueError, match="beta2"):
        normuon(1.0)


def test_any_step_may_follow():
    """Muon+ as a user would write it: columns to unit norm, no state."""

    def update(o, axes, state):
        return o / jnp.linalg.norm(o, axis=axes.fan_in, keepdims=True), state

    post = Post(lambda leaf, axes: (), update)
    got = direction({"w": draw(7, 5, 4)}, post=post)["w"]
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), 1.0, rtol=1e-10)
