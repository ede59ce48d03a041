"""Muon on eight devices: any sharding, kernels of rank 3, other orthogonalisers, eager calls.

The update of a whole tree, its shardings and its collectives: test_optimizer_sharding.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import orthogonalize
from jaxlib_unlearn.optim.spectral import buckets
from train.costs.collectives import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)


def test_eager_update_keeps_shardings():
    where = NamedSharding(make_mesh(AxisType.Auto), P("fsdp", "tp"))
    x = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    grads = {"kernel": jax.device_put(x, where)}
    tx = optim.scale_by_muon()
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates["kernel"].sharding.is_equivalent_to(where, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "spec",
    [
        P(),
        P(None, None, ("fsdp", "tp")),
        P(None, None, "fsdp"),
        P(None, "tp"),
        P("fsdp", None, "tp"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 16, 32), (4, 32, 16)], ids=str)
def test_any_sharding(kind, spec, shape):
    mesh = make_mesh(kind)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    grads = {"a": x, "b": x + 1}
    tx = optim.scale_by_muon()
    want, _ = tx.update(grads, tx.init(grads))
    placed = jax.device_put(grads, NamedSharding(mesh, spec))
    got, _ = jax.jit(tx.update)(placed, tx.init(placed))
    for name in grads:
        np.testing.assert_allclose(got[name], want[name], atol=1e-4)
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_dense_general_sharded_by_heads(kind):
    mesh = make_mesh(kind)
    rng = np.random.default_rng(0)
    grads = {
        "attn": {
            "query": {"kernel": rng.standard_normal((16, 4, 8)).astype(np.float32)},
            "out": {"kernel": rng.standard_normal((4, 8, 16)).astype(np.float32)},
        }
    }
    where = {
        "attn": {
            "query": {"kernel": NamedSharding(mesh, P("fsdp", "tp", None))},
            "out": {"kernel": NamedSharding(mesh, P("tp", None, "fsdp"))},
        }
    }
    tx = optim.muon(1.0)
    want, _ = tx.update(grads, tx.init(grads), grads)
    placed = jax.device_put(grads, where)
    got, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), got, want)
    same = jax.tree.map(lambda g, w: g.sharding.is_equivalent_to(w, g.ndim), got, where)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "ortho", [orthogonalize.svd(), orthogonalize.gram_newton_schulz()], ids=["svd", "gram"]
)
def test_other_orthogonalisers(kind, ortho):
    mesh = make_mesh(kind)
    x = np.random.default_rng(0).standard_normal((8, 16, 32)).astype(np.float32)
    tx = optim.scale_by_muon(orthogonalize=ortho)
    want, _ = tx.update(x, tx.init(x))
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "fsdp", "tp")))
    fn = jax.jit(tx.update)
    got, _ = fn(placed, tx.init(placed))
    np.testing.assert_allclose(got, want, atol=1e-4)
    found = collectives(fn.lower(placed, tx.init(placed)).compile())
    assert {c.kind for c in found} == {"all-to-all"}


def test_mixed_meshes_are_refused():
    kinds = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("a", "b")))
    with pytest.raises(ValueError, match="mixes Auto and Explicit"):
        buckets.map_matrices(lambda z: z, [x], [optim.matrices.MatrixAxes((), (0,), (1,))])
