"""SIFT's state on eight devices: which matrices were fused, cosines, both momenta, warm bases.

Its collectives: test_optimizer_sharding.py.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.spectral.sift import sift

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

MESHES = {"8": ((8,), ("fsdp",)), "4x2": ((4, 2), ("fsdp", "tp"))}
KINDS = [AxisType.Auto, AxisType.Explicit]
# Three layers on eight devices: every bucket is padded.
SHAPES = {
    "layers": {
        "o": {"kernel": (3, 16, 16)},
        "up": {"kernel": (3, 16, 32), "bias": (3, 32)},
        "down": {"kernel": (3, 32, 16)},
    }
}
random_tree = functools.partial(trees.random_tree, shapes=SHAPES)


def place(tree, mesh):
    tp = "tp" if "tp" in mesh.axis_names else None
    column, row = P(None, "fsdp", tp), P(None, tp, "fsdp")
    specs = {
        "layers": {
            "o": {"kernel": row},
            "up": {"kernel": column, "bias": P(None, tp)},
            "down": {"kernel": row},
        }
    }
    is_spec = functools.partial(lambda kind, x: isinstance(x, kind), P)
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    return jax.device_put(tree, where)


def make_mesh(name, kind):
    sizes, names = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


# A threshold that half of the random matrices pass; well away from any of their cosines.
def optimizer(bases):
    return sift(0.1, rank=4, threshold=0.0, bases=bases, weight_decay=0.1, adam_learning_rate=0.01)


@functools.cache
def on_one_device(bases):
    tx, params, out = optimizer(bases), random_tree(0), []
    state, update = tx.init(params), jax.jit(tx.update)
    for i in (1, 3):
        updates, state = update(random_tree(i), state, params, constraint_grads=random_tree(i + 1))
        out.append(updates)
    return out, inner(state)


def inner(state):
    return state.inner_states["muon"].inner_state[0]


# Any two of mesh, kind and bases meet by default; all three where there is time.
CASES = [
    ("8", AxisType.Auto, "svd"),
    ("8", AxisType.Explicit, "subspace"),
    ("4x2", AxisType.Auto, "subspace"),
    ("4x2", AxisType.Explicit, "svd"),
]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(MESHES, KINDS, ("svd", "subspace"))
    if case not in CASES
]


@pytest.mark.parametrize(("mesh_name", "kind", "bases"), CASES)
def test_update_equals_one_device(mesh_name, kind, bases):
    mesh, tx = make_mesh(mesh_name, kind), optimizer(bases)
    params = place(random_tree(0), mesh)

    def spread(x):
        return x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, P()))

    state, update = jax.tree.map(spread, tx.init(params)), jax.jit(tx.update)
    want, want_state = on_one_device(bases)
    for i, expected in zip((1, 3), want, strict=True):
        f, g = place(random_tree(i), mesh), place(random_tree(i + 1), mesh)
        updates, state = update(f, state, params, constraint_grads=g)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), updates, expected)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert u.sharding.is_equivalent_to(p.sharding, p.ndim)
    assert update._cache_size() <= 2  # the first state may be sharded differently
    got = inner(state)
    jax.tree.map(np.testing.assert_array_equal, got.fused, want_state.fused)
    flags = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got.fused)])
    assert 0 < flags.sum() < flags.size
    for name in ("cos", "mu", "mu_constraint"):
        pair = getattr(got, name), getattr(want_state, name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *pair)
    for m, p in zip(
        jax.tree.leaves((got.mu, got.mu_constraint)), matrices(params) * 2, strict=True
    ):
        assert m.sharding.is_equivalent_to(p.sharding, p.ndim)


def matrices(tree):
    return [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "kernel"]
