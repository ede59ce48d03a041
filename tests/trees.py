"""Random trees and what tests of optimizers do with them."""

import functools

import jax
import numpy as np
import optax

SHAPES = {"layers": {"up": (3, 4, 5), "bias": (3, 5)}, "tall": (7, 2), "gain": ()}


def is_shape(x):
    return isinstance(x, tuple)


def random_tree(seed, dtype=np.float32, shapes=SHAPES, size=1.0):
    """A NumPy tree of normal numbers, drawn in the order of the leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.asarray(size * rng.standard_normal(s), dtype), shapes, is_leaf=is_shape
    )


def run(tx, params, grads):
    """The parameters after every gradient."""
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def assert_trees_close(a, b, **limits):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **limits), a, b)
