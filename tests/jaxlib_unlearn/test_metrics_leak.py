"""leak@k: the estimator against brute force, exact integers and simulation."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlib_unlearn.metrics import leak_at_k
from jaxlib_unlearn.metrics.leak import leak_weights

GRID = (1, 2, 4, 8, 16, 32, 64, 128)
scores_of = st.lists(st.sampled_from([0.0, 0.25, 0.3, 0.3000001, 0.9, 1.0]), min_size=1, max_size=9)


@pytest.mark.parametrize("n", [1, 2, 5, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_mean_of_maximum_over_all_subsets(n, tied):
    rng = np.random.default_rng(n)
    scores = rng.integers(0, 4, n) / 3 if tied else rng.random(n)
    for k in range(1, n + 1):
        brute = np.mean([max(subset) for subset in itertools.combinations(scores, k)])
        assert leak_at_k(scores, k) == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("n, k, c", [(500, 128, 3), (500, 500, 1), (200, 128, 1), (200, 1, 40),
                                     (17, 5, 12), (17, 5, 13), (300, 64, 299)])  # fmt: skip
def test_binary_form_with_exact_integers(n, k, c):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert leak_at_k(np.arange(n) < c, k) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 200, 500])
def test_weights(n):
    ks = sorted({1, 2, n // 2, n} & set(range(1, n + 1)))
    weights = leak_weights(n, ks)
    assert weights.shape == (n, len(ks)) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-12)
    for column, k in zip(weights.T, ks, strict=True):
        assert not column[: k - 1].any()
        exact = [math.comb(j - 1, k - 1) / math.comb(n, k) for j in range(1, n + 1)]
        np.testing.assert_allclose(column, exact, rtol=1e-11, atol=0)
        np.testing.assert_array_equal(column, leak_weights(n, k))


def test_first_is_mean_and_last_is_maximum():
    scores = np.random.default_rng(0).random((3, 4, 50))
    curve = leak_at_k(scores, [1, 50])
    assert curve.shape == (3, 4, 2) and leak_at_k(scores, 7).shape == (3, 4)
    np.testing.assert_allclose(curve[..., 0], scores.mean(-1), atol=1e-14)
    np.testing.assert_array_equal(curve[..., 1], scores.max(-1))


@given(scores_of, st.randoms())
def test_monotone_concave_bounded_and_permutation_invariant(scores, random):
    n = len(scores)
    curve = leak_at_k(scores, range(1, n + 1))
    steps = np.diff(curve)
    assert (steps >= -1e-14).all() and (np.diff(steps) <= 1e-14).all()
    assert curve.min() >= np.mean(scores) - 1e-14 and curve.max() <= max(scores)
    raised = np.array(scores)
    raised[random.randrange(n)] = 1.0
    assert (leak_at_k(raised, range(1, n + 1)) >= curve - 1e-14).all()
    random.shuffle(scores)
    np.testing.assert_array_equal(leak_at_k(scores, range(1, n + 1)), curve)


@given(scores_of, st.floats(0, 0.5), st.floats(0, 0.5))
def test_affine(scores, a, b):
    ks = range(1, len(scores) + 1)
    shifted = leak_at_k(a * np.array(scores) + b, ks)
    np.testing.assert_allclose(shifted, a * leak_at_k(scores, ks) + b, atol=1e-14)


def test_unbiased_where_the_plug_in_is_biased_low():
    rng = np.random.default_rng(1)
    trials, n, k, q = 20_000, 12, 6, 0.1
    hits = (rng.random((trials, n)) < q).astype(float)
    estimates, truth = leak_at_k(hits, k), 1 - (1 - q) ** k
    error = 4 * estimates.std() / math.sqrt(trials)
    assert abs(estimates.mean() - truth) < error
    plug_in = 1 - (1 - hits.mean(-1)) ** k
    assert plug_in.mean() < truth - error
    uniform = leak_at_k(rng.random((trials, n)), k)
    assert abs(uniform.mean() - k / (k + 1)) < 4 * uniform.std() / math.sqrt(trials)


def test_variance_is_below_that_of_k_draws():
    scores = np.random.default_rng(2).random((4000, 40)) ** 3
    for k in (1, 4, 16):
        assert leak_at_k(scores, k).var() < scores[:, :k].max(-1).var()


def test_spread_over_seeds_is_that_of_the_published_protocol():
    rng = np.random.default_rng(3)
    rates = rng.beta(0.2, 1.0, 400)  # leak rates of 400 prompts, most of them near 0
    counts = rng.binomial(200, rates, (24, 400))
    hits = np.arange(200) < counts[..., None]
    assert 0.002 < leak_at_k(hits, 128).mean(-1).std() < 0.01  # published: 0.0066


def test_float32_and_extreme_sizes():
    scores = np.random.default_rng(4).random((20, 200)).astype(np.float32)
    weights = leak_weights(200, GRID)
    traced = jnp.sort(jnp.asarray(scores), -1) @ jnp.asarray(weights, jnp.float32)
    np.testing.assert_allclose(np.asarray(traced), leak_at_k(scores, GRID), atol=1e-6, rtol=0)
    assert np.isfinite(leak_weights(1000, 500)).all()
    assert np.isfinite(leak_at_k(np.linspace(0, 1, 1000), 500))


@pytest.mark.parametrize("k", [1, 3, 128, 200])
def test_never_and_always_are_exact(k):
    assert leak_at_k(np.zeros(200), k) == 0
    assert leak_at_k(np.arange(200) < 200 - k + 1, k) == 1  # n - c < k
    assert leak_at_k(np.full(200, 0.3), k) == 0.3


@pytest.mark.parametrize("scores, k", [([0.1, 0.2], 3), ([0.1, 0.2], 0), ([0.1, 0.2], [1, 3]),
                                       ([], 1), ([0.1, np.nan], 1), ([0.1, 1.1], 1),
                                       ([-0.1, 0.2], 1), (0.5, 1)])  # fmt: skip
def test_bad_input_raises(scores, k):
    with pytest.raises(ValueError, match=r"leak@k needs"):
        leak_at_k(scores, k)


def test_fractional_k_is_a_type_error():
    with pytest.raises(TypeError):
        leak_at_k([0.1, 0.2], 1.5)  # pyright: ignore
