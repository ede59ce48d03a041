"""Combiners, grades, smoothing, hybrid and wrappers on eight devices: the single-device update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.optim.combine import blur, pcgrad, weighted_sum
from jaxlib_unlearn.optim.hybrid import alternate
from jaxlib_unlearn.optim.sharpness import randomised_smoothing, sam
from jaxlib_unlearn.optim.sign import quantize_updates, sign_momentum
from jaxlib_unlearn.optim.sophia import sophia
from jaxlib_unlearn.optim.wrappers import accumulate, clip_streams, finite
from train.costs.collectives import collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

SHAPES = {"layers": {"up": (2, 16, 32), "bias": (2, 32)}, "head": (32, 24)}
SPECS = {"layers": {"up": P(None, "fsdp", "tp"), "bias": P(None, "tp")}, "head": P("tp", "fsdp")}


def descend(rate):
    """A deterministic stand-in for a zeroth-order optimizer."""

    def update(updates, state, params, *, value_fn, **extra_args):
        change = value_fn(jax.tree.map(lambda p: p + 1e-2, params)) - value_fn(params)
        return jax.tree.map(lambda p: -rate * jnp.sign(change) * jnp.ones_like(p), params), state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


def value_fn(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def grad_fn(params):
    return jax.tree.map(lambda x: x**3, params)


# name: (transformation, extra arguments, whether it takes a constraint gradient)
TRANSFORMS = {
    "blur": (blur(0.5), {}, True),
    "blur per leaf": (blur(scope="per_leaf"), {}, True),
    "pcgrad": (pcgrad(), {}, True),
    "wrappers": (
        finite(accumulate(clip_streams(1.0, optax.chain(weighted_sum(), optax.adam(0.1))), 2)),
        {},
        True,
    ),
    "sophia": (sophia(0.1), {}, False),
    "sign": (sign_momentum(0.1), {}, False),
    "bits": (quantize_updates(4), {}, False),
    "sam": (sam(0.1), {"grad_fn": grad_fn}, False),
    "smoothing": (randomised_smoothing(0.5, 2), {"grad_fn": grad_fn}, False),
    "hybrid": (
        alternate(optax.adam(0.1), descend(0.1), 1),
        {"grad_fn": grad_fn, "value_fn": value_fn},
        False,
    ),
}
random_tree = functools.partial(trees.random_tree, shapes=SHAPES)


def shardings(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))
    return mesh, jax.tree.map(
        lambda s: NamedSharding(mesh, s), SPECS, is_leaf=lambda x: isinstance(x, P)
    )


def stepper(name):
    tx, extra, two_streams = TRANSFORMS[name]

    def step(g, state, params, c):
        streams = {"constraint_grads": c} if two_streams else {}
        return tx.update(g, state, params, **streams, **extra)

    return jax.jit(step)


@functools.cache
def on_one_device(name):
    params, state, out = random_tree(0), TRANSFORMS[name][0].init(random_tree(0)), []
    step = stepper(name)
    for i in (1, 2):
        updates, state = step(random_tree(i), state, params, random_tree(i + 10))
        out.append(updates)
    return out


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_equals_one_device(name, kind):
    mesh, where = shardings(kind)
    params = jax.device_put(random_tree(0), where)

    def place(x):
        return x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, P()))

    state = jax.tree.map(place, TRANSFORMS[name][0].init(params))
    types, step = jax.tree.map(jax.typeof, state), stepper(name)
    for i, want in zip((1, 2), on_one_device(name), strict=True):
        g, c = (jax.device_put(random_tree(j), where) for j in (i, i + 10))
        updates, state = step(g, state, params, c)
        for u, w, s in zip(*map(jax.tree.leaves, (updates, want, where)), strict=True):
            np.testing.assert_allclose(u, w, atol=1e-4, rtol=1e-5)
            assert u.sharding.is_equivalent_to(s, u.ndim), u.sharding
    assert jax.tree.map(jax.typeof, state) == types
    assert step._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["blur", "pcgrad"])
def test_only_inner_products_cross(name, kind):
    """Two largest entries and three inner products, at most a number each for a leaf and a mesh
    axis; no gradient."""
    _, where = shardings(kind)
    g, c = (jax.device_put(random_tree(i), where) for i in (1, 2))
    tx = TRANSFORMS[name][0]
    update = jax.jit(lambda g, c: tx.update(g, tx.init(g), constraint_grads=c))
    found = collectives(update.lower(g, c).compile())
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(c.bytes for c in found) <= 4 * (2 + 3) * len(jax.tree.leaves(g)) * 2
    assert not any(c.in_loop for c in found)
