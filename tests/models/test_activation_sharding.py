"""Embedding lookup and padding for tensor parallelism, on a mesh and without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models.activation_sharding import (
    batch_sharded,
    batch_ways,
    lookup,
    padded_over_tp,
    tensor_ways,
)

AXES = ("data", "fsdp", "tp")


def placed(x, sizes, spec):
    """An array on a mesh of these sizes."""
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.device_put(x, NamedSharding(mesh, spec))


def test_without_a_mesh_nothing_is_constrained_or_padded():
    x = jnp.ones((3, 5))
    assert (batch_ways(x), tensor_ways(x)) == (1, 1)
    assert batch_sharded(x, x) is x and padded_over_tp(x, 1) is x


@pytest.mark.parametrize(
    ("sizes", "axis", "size"),
    [((1, 2, 2), 1, 6), ((1, 1, 4), 1, 8), ((1, 1, 4), 0, 4), ((2, 2, 1), 1, 5), ((1, 1, 3), 0, 3)],
)
def test_padding_to_the_next_multiple_of_tp(sizes, axis, size):
    x = placed(jnp.arange(15.0).reshape(3, 5), sizes, P())
    assert tensor_ways(x) == sizes[2] and batch_ways(x) == sizes[0] * sizes[1]
    found = np.asarray(jax.jit(padded_over_tp, static_argnums=1)(x, axis))
    wanted = np.zeros(tuple(size if i == axis else n for i, n in enumerate(x.shape)))
    wanted[:3, :5] = x
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_batch_axis_is_split_and_the_others_are_whole(axis):
    x = placed(jnp.ones((4, 4)), (2, 2, 1), P())
    found = jax.jit(lambda x: batch_sharded(x + 1, x, axis))(x)
    wanted = NamedSharding(x.sharding.mesh, P(*[None] * axis, ("data", "fsdp")))
    assert found.sharding.is_equivalent_to(wanted, 2)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_lookup_on_a_mesh_equals_indexing(sizes):
    table = jax.random.normal(jax.random.key(0), (12, 8))
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 12)
    rows = placed(tokens, sizes, P(("data", "fsdp")))
    columns = placed(table, sizes, P("tp", "fsdp"))
    found = jax.jit(lookup, static_argnums=2)(columns, rows, jnp.float32)
    np.testing.assert_array_equal(found, table[tokens])
    wanted = NamedSharding(rows.sharding.mesh, P(("data", "fsdp")))
    assert found.sharding.is_equivalent_to(wanted, 3)


def test_narrow_compute_sums_the_embedding_gradient_wide():
    """A token that occurs 4096 times: its row's gradient is not rounded at every addition."""
    table = 0.02 * jax.random.normal(jax.random.key(0), (61, 32))
    tokens = jnp.zeros((64, 64), jnp.int32)

    def total(table):
        return jnp.sum(lookup(table, tokens, jnp.bfloat16).astype(jnp.float32))

    gradient = jax.grad(total)(table)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[0], 4096.0)
