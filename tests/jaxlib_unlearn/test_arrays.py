"""Decompositions of batches: the same numbers as XLA's, and no LAPACK call that waits for others.

A batched LAPACK call blocks a worker of XLA's CPU pool until other workers took its matrices; two
at once on two cores hang now and then. A test that waits for that is no test: what is looked at is
the compiled program.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import merging, optim
from jaxlib_unlearn.optim import arrays, fusion, subspace

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
