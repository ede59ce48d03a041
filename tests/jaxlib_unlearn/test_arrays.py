"""Decompositions of batches: the same numbers as XLA's, and no LAPACK call that waits for others.

A batched LAPACK call blocks a worker of XLA's CPU pool until other workers have taken its matrices;
two at once on two cores hang now and then. A test cannot wait for a hang, so the compiled program
is inspected instead.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import merging, optim
from jaxlib_unlearn.optim import arrays
from jaxlib_unlearn.optim.spectral import fusion, subspace

LAPACK = re.compile(r"\blapack_")
SHAPE = re.compile(r"\b[fc]\d+\[([\d,]+)\]")


def batched_calls(fn, *args) -> list[str]:
    """The LAPACK calls in a compiled program that get more than one matrix."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    calls = [line for line in text.splitlines() if LAPACK.search(line) and "custom-call(" in line]
    assert calls, "no LAPACK call at all: the pattern is out of date"
    sizes = [[tuple(map(int, s.split(","))) for s in SHAPE.findall(line)] for line in calls]
    return [
        line
        for line, shapes in zip(calls, sizes, strict=True)
        if any(len(s) > 2 and np.prod(s[:-2]) > 1 for s in shapes)
    ]


def stack(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
def test_same_numbers(lead):
    x = stack(*lead, 5, 4)
    gram = jnp.swapaxes(x, -1, -2) @ x
    for ours, theirs in (
        (arrays.thin_qr(x), jnp.linalg.qr(x)),
        (arrays.thin_svd(x), jnp.linalg.svd(x, full_matrices=False)),
        (arrays.eigh(gram), jnp.linalg.eigh(gram)),
    ):
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.shape == reference.shape
            np.testing.assert_allclose(mine, reference, atol=1e-6)
    if lead:
        for one, whole in zip(jax.vmap(arrays.thin_qr)(x), arrays.thin_qr(x), strict=True):
            np.testing.assert_array_equal(one, whole)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_qr_by_products(condition, dtype, scale):
    """Orthonormal and exact to rounding while float32 can tell the columns apart."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        x = rng.standard_normal(shape)
        return x + 1j * rng.standard_normal(shape) if dtype == jnp.complex64 else x

    u, v = np.linalg.qr(draw(2, 60, 12))[0], np.linalg.qr(draw(2, 12, 12))[0]
    x = jnp.asarray((u * np.geomspace(1.0, 1 / condition, 12)) @ v * scale, dtype)
    q, r = (np.asarray(part, np.complex128) for part in arrays.cholesky_qr(x))
    np.testing.assert_allclose(
        np.swapaxes(q, -1, -2).conj() @ q, np.broadcast_to(np.eye(12), (2, 12, 12)), atol=2e-5
    )
    assert np.abs(q @ r - np.asarray(x)).max() <= 1e-5 * np.abs(x).max()
    assert np.array_equal(r, np.triu(r)) and (np.diagonal(r, axis1=-2, axis2=-1).real > 0).all()
    exact = np.linalg.qr(np.asarray(x, np.complex128))[0]
    exact = exact * np.exp(1j * np.angle(np.sum(exact.conj() * q, axis=-2, keepdims=True)))
    np.testing.assert_allclose(q, exact, atol=3e-6 * condition)


def test_qr_by_products_of_columns_that_depend():
    """Zero columns stay zero, copies come out short, nothing is NaN; the product is exact."""
    x = stack(30, 4)
    x = jnp.concatenate([x, jnp.zeros((30, 2)), x[:, :1]], axis=1)
    q, r = arrays.cholesky_qr(x)
    assert bool(jnp.isfinite(q).all() & jnp.isfinite(r).all())
    assert not jnp.any(q[:, 4:6])
    np.testing.assert_allclose(q[:, :4].T @ q[:, :4], np.eye(4), atol=1e-5)
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    assert float(jnp.linalg.norm(q[:, 6])) <= 1.001


def test_subspaces_from_products_are_those_of_reflections(monkeypatch):
    """The path of other devices, run here: the same singular triplets."""
    x, start = stack(3, 40, 64), stack(3, 40, 10, seed=1)
    mine = subspace.subspace_iteration(x, start, 4, 6)
    monkeypatch.setattr(subspace, "thin_qr", arrays.cholesky_qr)
    jax.clear_caches()
    other = subspace.subspace_iteration(x, start, 4, 6)
    np.testing.assert_allclose(mine[1], other[1], rtol=1e-5)
    for a, b in ((mine[0], other[0]), (mine[2], other[2])):
        np.testing.assert_allclose(
            a @ jnp.swapaxes(a, -1, -2), b @ jnp.swapaxes(b, -1, -2), atol=1e-4
        )


def sift(bases, threshold, msign="gram"):
    tx = optim.scale_by_sift(rank=2, bases=bases, threshold=threshold, msign=msign)
    g = {"layers": {"up": {"kernel": stack(4, 6, 8)}, "down": {"kernel": stack(4, 8, 6)}}}
    return lambda g, s: tx.update(g, s, constraint_grads=jax.tree.map(jnp.negative, g)), g, tx


def zo_muon():
    tx = optim.zo_muon(0.1, num_queries=2, rank=3)
    p = {"layers": {"up": {"kernel": stack(4, 6, 8)}, "down": {"kernel": stack(4, 8, 6)}}}

    def loss(p):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))

    return lambda p, s: tx.update(None, s, p, value_fn=loss), p, tx


CASES = {
    "svd": lambda: (optim.orthogonalize.svd(), stack(4, 5, 3)),
    "top_singular": lambda: (lambda x: subspace.top_singular(x, 2), stack(4, 5, 3)),
    "subspace_iteration": lambda: (
        lambda x, y: subspace.subspace_iteration(x, y, 2),
        stack(4, 5, 6),
        stack(4, 5, 3),
    ),
    "gram_inverse_root": lambda: (subspace.gram_inverse_root, stack(2, 2, 5, 3)),
    "fuse": lambda: (lambda u: fusion.fuse(u, u, "svd"), stack(4, 2, 6, 2)),
    "merge": lambda: (lambda x: merging.merge(x, 2), stack(2, 4, 6, 5)),
    **{
        f"sift {bases} {threshold} {msign}": lambda b=bases, t=threshold, m=msign: sift(b, t, m)
        for bases in ("svd", "subspace")
        for threshold, msign in ((0.0, "gram"), (2.0, "gram"), (2.0, "svd"))
    },
    "zo_muon": zo_muon,
}


@pytest.mark.parametrize("name", CASES)
def test_no_call_waits_for_others(name):
    fn, *args = CASES[name]()
    if not isinstance(args[-1], jax.Array):
        args[-1] = args[-1].init(args[0])
    assert not batched_calls(fn, *args)


def test_the_look_sees_a_batch():
    assert batched_calls(lambda x: jnp.linalg.qr(x), stack(4, 5, 3))
    assert not batched_calls(lambda x: jnp.linalg.qr(x), stack(5, 3))
