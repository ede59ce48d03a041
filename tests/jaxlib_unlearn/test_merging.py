"""Merging and interference against numpy, their identities, and the card's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import merging

FORGET = np.array([[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], float)
RETAIN = np.array([[-1, 1, 0, 0], [2, 0, 0, 1], [0, 0, -2, 0], [0, 1, 0, 1]], float)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def stacked(tasks, k):
    """Left vectors, values and right vectors of all tasks, concatenated."""
    parts = [np.linalg.svd(t, full_matrices=False) for t in tasks]
    u = np.hstack([u[:, :k] for u, _, _ in parts])
    s = np.concatenate([s[:k] for _, s, _ in parts])
    v = np.hstack([vt[:k].T for _, _, vt in parts])
    return u, s, v


def msign(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def sti(u, s, v):
    eye = np.eye(len(s))
    return np.abs((u.T @ u - eye) @ np.diag(s) @ (v.T @ v - eye)).sum()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_merge_equals_numpy(shape, count):
    tasks = random(count, *shape)
    k = min(shape) // count
    u, s, v = stacked(tasks, k)
    want = (msign(u) * s) @ msign(v).T
    with jax.enable_x64(True):
        for got in (merging.merge(tasks), merging.merge(list(tasks), k), merging.merge(tasks, 99)):
            np.testing.assert_allclose(got, want, atol=1e-10)
    assert sti(msign(u), s, msign(v)) < 1e-10 < sti(u, s, v)  # the purpose of merging


def test_merge_leaves_orthogonal_tasks_alone():
    one, two = np.zeros((6, 8)), np.zeros((6, 8))
    one[:3, :4], two[3:, 4:] = random(3, 4), random(3, 4, seed=1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(merging.merge([one, two], 3), one + two, atol=1e-12)
        assert float(merging.interference([one, two])) < 1e-12


def test_equal_and_opposite_tasks():
    """Shared directions are halved between the tasks, not lost in rounding."""
    task = random(8, 9)
    u, s, vt = np.linalg.svd(task, full_matrices=False)
    top = (u[:, :3] * s[:3]) @ vt[:3]
    # In float32 the Gram matrix has eigenvalues of 1e-7 where it should have zeros.
    np.testing.assert_allclose(merging.merge(np.float32([task, task]), 3), top, atol=1e-5)
    np.testing.assert_allclose(merging.merge(np.float32([task, -task]), 3), 0, atol=1e-5)


def test_layers_are_a_batch():
    tasks = random(2, 3, 6, 8)
    with jax.enable_x64(True):
        merged, disturbed = merging.merge(tasks, 2), merging.interference(tasks, 2)
        assert merged.shape == (3, 6, 8) and disturbed.shape == (3,)
        for i in range(3):
            np.testing.assert_allclose(merged[i], merging.merge(tasks[:, i], 2), atol=1e-12)
            np.testing.assert_allclose(disturbed[i], merging.interference(tasks[:, i], 2))


@pytest.mark.parametrize(
    "rank, raw, normalised", [(1, 1.3674029959, 0.6837014979), (2, 4.4312352289, 0.3692696024)]
)
def test_interference_of_the_card(rank, raw, normalised):
    with jax.enable_x64(True):
        got = merging.interference([FORGET, RETAIN], rank)
        np.testing.assert_allclose(got, raw, atol=1e-9)
        got = merging.interference([FORGET, RETAIN], rank, normalize=True)
        np.testing.assert_allclose(got, normalised, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_interference_equals_its_definition(count):
    tasks = random(count, 8, 11)
    u, s, v = stacked(tasks, 2)
    with jax.enable_x64(True):
        got = float(merging.interference(tasks, 2))
        whole = merging.interference(tasks, 99), merging.interference(tasks)
    np.testing.assert_allclose(got, sti(u, s, v), rtol=1e-10)
    np.testing.assert_allclose(*whole)
    if count == 2:  # the closed form
        x, y = u[:, :2].T @ u[:, 2:], v[:, :2].T @ v[:, 2:]
        closed = np.abs(x @ np.diag(s[2:]) @ y.T).sum() + np.abs(x.T @ np.diag(s[:2]) @ y).sum()
        np.testing.assert_allclose(got, closed, rtol=1e-10)


def test_no_interference_if_one_side_is_orthogonal():
    tasks = random(2, 6, 8)
    tasks[0, :, 4:] = tasks[1, :, :4] = 0  # other inputs, the same outputs
    with jax.enable_x64(True):
        assert 0 <= float(merging.interference(tasks)) < 1e-12


def test_half_precision_is_computed_in_float32():
    tasks = jnp.asarray(random(2, 6, 8), jnp.bfloat16)
    got = merging.merge(tasks, 2)
    assert got.dtype == jnp.bfloat16
    want = merging.merge(tasks.astype(jnp.float32), 2)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)
    assert merging.interference(tasks, 2).dtype == jnp.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: merging.merge([]), "at least one"),
        (lambda: merging.merge([np.ones((2, 3)), np.ones((3, 2))]), "one shape"),
        (lambda: merging.merge(np.ones((2, 3))), "matrices"),
        (lambda: merging.merge(np.ones((2, 3, 4)), 0), "rank is at least 1"),
        (lambda: merging.interference(np.ones((2, 3, 4)), -1), "rank is at least 1"),
        (lambda: merging.interference([np.eye(2)], 1, normalize=True), "no pair"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
