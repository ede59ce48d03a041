"""Singular bases: the exact ones against numpy, the iteration against the exact ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.optim.spectral import subspace


def with_spectrum(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return (u[:, : len(values)] * values) @ vt[: len(values)]


def sine(basis, columns):
    """The sine of the largest angle between the span of orthonormal columns and that of a basis."""
    q = np.linalg.qr(np.asarray(basis))[0]
    return np.linalg.norm(columns - q @ (q.T @ columns), 2)


@pytest.mark.parametrize("shape, rank", [((5, 9), 3), ((2, 9, 5), 5)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_exact_equals_numpy(shape, rank, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*shape, 2)) @ np.array([1, 1j])
    x = x.astype(dtype) if dtype == np.complex128 else x.real
    with jax.enable_x64(True):
        u, s, v = (np.asarray(a) for a in subspace.top_singular(jnp.asarray(x), rank))
    want_u, want_s, want_vh = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(s, want_s[..., :rank], rtol=1e-12)
    want = (want_u[..., :rank] * want_s[..., None, :rank]) @ want_vh[..., :rank, :]
    np.testing.assert_allclose(
        u * s[..., None, :] @ np.conj(np.swapaxes(v, -1, -2)), want, atol=1e-12
    )


def exact(x, rank):
    return subspace.top_singular(x, rank)


def iterated(x, rank):
    start = jax.random.normal(jax.random.key(1), (*x.shape[:-1], min(rank + 2, *x.shape[-2:])))
    return subspace.subspace_iteration(x, start, rank, 4)


@pytest.mark.parametrize("bases", [exact, iterated])
def test_null_directions_are_zero(bases):
    """Zero, rank one, and both tiny: LAPACK's arbitrary vectors for s = 0 do not come out."""
    one = np.outer(np.arange(1.0, 7), [1.0, -2, 0, 3, 1, 1, 0, 2])
    x = np.stack([0 * one, one, 1e-30 * one]).astype(np.float32)
    u, s, v = (np.asarray(a) for a in bases(jnp.asarray(x), 3))
    assert np.count_nonzero(s, axis=-1).tolist() == [0, 1, 1]
    for vectors in (u, v):
        lengths = np.linalg.norm(vectors, axis=-2)
        np.testing.assert_allclose(lengths, [[0, 0, 0], [1, 0, 0], [1, 0, 0]], atol=1e-6)
    norm = np.linalg.norm(one)
    np.testing.assert_allclose(s[1:, 0], [norm, 1e-30 * norm], rtol=1e-5)


def test_error_shrinks_as_stated():
    """sin <= tan <= ratio^passes times the start's tangent, ratio = (s_(k+1) / s_k)^2."""
    k, values = 4, 0.8 ** np.arange(24)
    x = with_spectrum((24, 40), values)
    start = np.random.default_rng(1).standard_normal((24, k))
    u, _, vt = np.linalg.svd(x)
    inside, outside = u[:, :k].T @ start, u[:, k:].T @ start
    tangent = np.linalg.norm(outside @ np.linalg.inv(inside), 2)
    ratio = (values[k] / values[k - 1]) ** 2
    run = subspace.subspace_iteration
    with jax.enable_x64(True):
        for passes in (1, 4, 16, 48):
            got_u, s, got_v = run(x, start, k, passes)
            assert sine(got_u, u[:, :k]) <= tangent * ratio**passes * (1 + 1e-6) + 1e-12
            # The right vectors come from half a pass earlier.
            assert sine(got_v, vt[:k].T) <= tangent * ratio ** (passes - 0.5) * (1 + 1e-6) + 1e-12
            # Paired, converged or not: u^T X v is diagonal.
            pairing = np.asarray(got_u).T @ x @ np.asarray(got_v)
            np.testing.assert_allclose(pairing, np.diag(s), atol=1e-10)
    np.testing.assert_allclose(s, values[:k], rtol=1e-6)


def test_slowly_drifting_momentum():
    """One warm pass per step follows a rotating momentum; one cold pass per step does not.

    A step rotates the leading subspace of this momentum by up to 0.17; in numpy's float64 the same
    recursion is at most 0.0173 away from it when warm, and 0.2 on average when cold.
    """
    rng = np.random.default_rng(0)
    k, extra, shape = 4, 4, (32, 48)
    m = np.zeros(shape)
    left, right = (np.linalg.qr(rng.standard_normal((n, k)))[0] for n in shape)
    basis = rng.standard_normal((shape[0], k))
    run = subspace.subspace_iteration
    warm, cold, turns, before = [], [], [], None
    for _ in range(25):
        q, r = np.linalg.qr(left + 0.02 * rng.standard_normal(left.shape))
        left = q * np.sign(np.diag(r))  # without it columns change sign and cancel in m
        signal = (left * [4, 3.5, 3, 2.5]) @ right.T
        m = 0.9 * m + signal + 0.3 * rng.standard_normal(shape)
        true = np.linalg.svd(m)[0][:, :k]
        turns.append(0 if before is None else sine(before, true))
        before = true
        fresh = rng.standard_normal((shape[0], extra))
        basis, _, _ = run(jnp.float32(m), jnp.float32(np.hstack([basis, fresh])), k, 1)
        start = jnp.float32(rng.standard_normal((shape[0], k + extra)))
        warm.append(sine(basis, true))
        cold.append(sine(run(jnp.float32(m), start, k, 1)[0], true))
    assert 0.1 < max(turns[5:]) < 0.2
    assert max(warm[5:]) < 0.02
    assert np.mean(cold[5:]) > 10 * np.mean(warm[5:])


def test_fresh_columns_find_new_directions():
    """A stronger block appears in rows and columns that the old basis does not cover."""
    old, new = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    old[:4, :4] = np.diag([4.0, 3, 2, 1])
    new[4:, 4:] = np.diag([9.0, 8, 7, 6])
    u, _, _ = subspace.top_singular(jnp.asarray(old), 2)
    both = jnp.asarray(old + new)
    _, s, _ = subspace.subspace_iteration(both, u, 2, 8)
    np.testing.assert_allclose(s, [4, 3], rtol=1e-5)
    fresh = jax.random.normal(jax.random.key(0), (8, 2))
    _, s, _ = subspace.subspace_iteration(both, jnp.concatenate([u, fresh], -1), 2, 8)
    np.testing.assert_allclose(s, [9, 8], rtol=1e-2)


def test_gram_inverse_root():
    x = np.random.default_rng(0).standard_normal((3, 9, 4))
    with jax.enable_x64(True):
        y = x @ np.asarray(subspace.gram_inverse_root(jnp.asarray(x), np.full(3, 1e-8)))
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(y, u @ vt, atol=1e-12)  # the nearest orthonormal columns
    parallel = jnp.ones((4, 2)) / 2
    root = subspace.gram_inverse_root(parallel)
    np.testing.assert_allclose(np.linalg.svd(parallel @ root)[1], [1, 0], atol=1e-6)


def test_random_blocks():
    def draw(*args):
        return np.asarray(subspace.random_block(*args, (3, 2), jnp.float32))

    first = draw(0, "a", 1)
    assert np.array_equal(first, draw(0, "a", 1))
    for other in ((1, "a", 1), (0, "b", 1), (0, "a", 2)):
        assert not np.array_equal(first, draw(*other))


@pytest.mark.parametrize(
    "rank, start", [(0, None), (5, None), (3, (4, 2)), (2, (5, 2)), (2, (4, 5))]
)
def test_bad_arguments(rank, start):
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="rank"):
        if start is None:
            subspace.top_singular(x, rank)
        else:
            subspace.subspace_iteration(x, jnp.ones(start), rank)
