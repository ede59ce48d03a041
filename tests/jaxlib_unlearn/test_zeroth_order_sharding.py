"""Queries on a mesh axis of their own: only scalars cross it, and no result depends on it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import random_tree

from jaxlib_unlearn.optim.zeroth_order import methods
from jaxlib_unlearn.optim.zeroth_order.zo_muon import zo_muon
from train.costs.collectives import collectives

X = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)


def tree():
    shapes = {"up": {"kernel": (2, 16, 32)}, "down": {"kernel": (2, 32, 16)}}
    return {"layers": jax.tree.map(jnp.asarray, random_tree(0, shapes=shapes, size=0.2))}


SPECS = {"layers": {"up": {"kernel": P(None, None, "tp")}, "down": {"kernel": P(None, "tp", None)}}}


def loss(params):
    def body(x, layer):
        return x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

    return jnp.mean(jnp.square(jax.lax.scan(body, jnp.asarray(X), params["layers"])[0]))


def place(params, mesh):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS)


METHODS = {
    "zo_muon": lambda **options: zo_muon(0.1, rank=4, num_queries=4, eps=0.1, **options),
    "mezo": lambda **options: methods.mezo(0.1, num_queries=2, eps=0.1, **options),
}


def step_of(tx, value_fn=loss):
    return jax.jit(lambda s, p: tx.update(None, s, p, value_fn=value_fn))


@pytest.mark.parametrize("name", METHODS)
def test_queries_over_a_mesh_axis_equal_the_serial_ones(name):
    params = tree()
    plain = METHODS[name]()
    want, serial = step_of(plain)(plain.init(params), params)

    mesh = jax.make_mesh((4, 2), ("query", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = METHODS[name](query_axis="query")
    placed = place(params, mesh)
    compiled = step_of(tx).lower(tx.init(params), placed).compile()
    got, state = compiled(tx.init(params), placed)
    # Losses agree to 1e-6; eps = 0.1 magnifies that by ten.
    np.testing.assert_allclose(state.coeffs, serial.coeffs, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for update, spec in zip(jax.tree.leaves(got), jax.tree.leaves(SPECS), strict=True):
        assert update.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)

    # What crosses "query" (groups larger than tp's two) are the losses, all together once.
    crossing = [c for c in collectives(compiled) if max(map(len, c.groups), default=8) > 2]
    jobs = 4
    assert [c.kind for c in crossing].count("all-gather") == 1
    assert all(c.bytes <= 4 * jobs for c in crossing), crossing
    # No device draws or holds a whole kernel: every array of a layer is one device's part.
    arrays = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    whole = [s for s in arrays if s in ("16,32", "2,16,32")]
    if name == "mezo":
        assert not whole


def elementwise(params):
    return sum(jnp.mean(jnp.sin(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", METHODS)
def test_explicit_axes(name):
    params = tree()
    plain = METHODS[name]()
    want, serial = step_of(plain, elementwise)(plain.init(params), params)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))
    placed = place(params, mesh)
    got, state = step_of(plain, elementwise)(plain.init(params), placed)
    np.testing.assert_allclose(state.coeffs, serial.coeffs, rtol=1e-5, atol=1e-5)
    for a, b, p in zip(*map(jax.tree.leaves, (got, want, placed)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert a.sharding == p.sharding


def test_an_axis_that_does_not_divide_is_told():
    mesh = jax.make_mesh((4, 2), ("query", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = zo_muon(0.1, rank=4, num_queries=3, query_axis="query")
    params = place(tree(), mesh)
    with pytest.raises(ValueError, match="query_axis"):
        jax.eval_shape(lambda p: tx.update(None, tx.init(p), p, value_fn=loss), params)
