"""Derivatives of orthogonalisers and of the steps made of them, against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import orthogonalize as o
from jaxlib_unlearn.optim.arrays import polar_factor
from jaxlib_unlearn.optim.spectral.subspace import gram_inverse_root

PARAMS = {"layers": {"q": {"kernel": np.ones((2, 4, 4))}}, "up": {"kernel": np.ones((6, 4))}}


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def updates(tx, **extra):
    """The updates of a step as a function of one gradient."""

    def step(g):
        return tx.update(g, tx.init(PARAMS), PARAMS, **extra)[0]

    return step


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape), PARAMS)


WIDE, TALL = normal((2, 3, 5)), normal((5, 3))
CASES = {
    **{
        name: (o.newton_schulz(name), WIDE)
        for name in ("jordan", "polar_express", "aol4")  # one of each kind of table
    },
    "gram_newton_schulz": (o.gram_newton_schulz(), WIDE),
    "long": (o.newton_schulz("classical", 8), TALL),
    "svd": (o.svd(), WIDE),
    "svd tall": (o.svd(), TALL),
    "svd of equal values": (o.svd(), np.eye(3)),
    "root of equal values": (gram_inverse_root, np.eye(4)[:, :3]),
    "muon": (updates(optim.muon(0.1)), gradients(0)),
    "teon": (updates(optim.teon(0.1)), gradients(0)),
    **{
        f"sift {bases} {msign}": (
            updates(
                optim.sift(0.1, rank=1, threshold=2.0, bases=bases, msign=msign, first_passes=200),
                constraint_grads=gradients(1),
            ),
            gradients(0),
        )
        for bases, msign in (("svd", "gram"), ("subspace", "gram"), ("svd", "svd"))
    },
    "sift, Muon's step": (
        updates(optim.sift(0.1, threshold=-1.0), constraint_grads=gradients(1)),
        gradients(0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences(name):
    fn, x = CASES[name]
    rng = np.random.default_rng(7)
    along = jax.tree.map(lambda a: rng.standard_normal(a.shape), x)
    h = 1e-5

    def value(x):
        out = jax.tree.leaves(fn(x))
        return sum(jnp.sum(y * normal(y.shape, seed=50 + i)) for i, y in enumerate(out))

    @jax.jit
    def both(x):
        slope = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(value)(x), along)
        ends = [value(jax.tree.map(lambda a, d, s=s: a + s * h * d, x, along)) for s in (1, -1)]
        return sum(jax.tree.leaves(slope)), (ends[0] - ends[1]) / (2 * h)

    with jax.enable_x64(True):
        slope, difference = map(float, both(x))
    assert np.isfinite(slope) and abs(difference) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=2e-6, atol=1e-8)


def test_of_a_batch_and_of_zeros():
    """Under `vmap` as for every matrix alone; no NaN where there is no direction."""
    orthogonalize = o.newton_schulz()
    grad = jax.grad(lambda x: jnp.sum(orthogonalize(x) ** 3))
    with jax.enable_x64(True):
        x = jnp.asarray(normal((3, 2, 4)), jnp.float64)
        together = jax.jit(jax.vmap(grad))(x)
        np.testing.assert_allclose(together, [jax.jit(grad)(one) for one in x], atol=1e-12)
    for fn in (o.newton_schulz(), o.newton_schulz("aol4"), o.svd()):
        slope = jax.jit(jax.grad(lambda x, fn=fn: jnp.sum(fn(x))))(jnp.zeros((2, 3)))
        assert np.isfinite(slope).all()


def test_dropped_directions_have_no_part_in_it():
    """Beside a singular value far below the others: the derivative of the remaining part."""
    x, d = np.diag([2.0, 1.0, 1e-9]), normal((3, 3))
    with jax.enable_x64(True):
        _, got = jax.jit(lambda x: jax.jvp(lambda y: polar_factor(y, 1e-6), (x,), (d,)))(x)
        ends = [np.asarray(polar_factor(x + s * 1e-8 * d, 1e-6)) for s in (1, -1)]
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-8, atol=1e-6)
