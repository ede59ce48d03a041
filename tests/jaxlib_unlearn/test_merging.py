"""Merging against numpy, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import merging


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
        merged = merging.merge(tasks, 2)
        assert merged.shape == (3, 6, 8)
        for i in range(3):
            np.testing.assert_allclose(merged[i], merging.merge(tasks[:, i], 2), atol=1e-12)


def test_half_precision_is_computed_in_float32():
    tasks = jnp.asarray(random(2, 6, 8), jnp.bfloat16)
    got = merging.merge(tasks, 2)
    assert got.dtype == jnp.bfloat16
    want = merging.merge(tasks.astype(jnp.float32), 2)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: merging.merge([]), "at least one"),
        (lambda: merging.merge([np.ones((2, 3)), np.ones((3, 2))]), "one shape"),
        (lambda: merging.merge(np.ones((2, 3))), "matrices"),
        (lambda: merging.merge(np.ones((2, 3, 4)), 0), "rank is at least 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
