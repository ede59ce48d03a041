"""Scores of one text: hand cases, brute force, and the properties of their definitions."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlib_unlearn.metrics import likelihood as lk
from jaxlib_unlearn.metrics.likelihood import Scored

matches = st.lists(st.booleans(), min_size=2, max_size=12)


def scored(logp, match=None, mu=None, var=None, text="some answer"):
    logp = np.asarray(logp, np.float32)
    fill = lambda x, other: np.asarray(other if x is None else x)  # noqa: E731
    return Scored(logp, fill(match, np.ones(len(logp), bool)), fill(mu, logp),
                  fill(var, np.ones(len(logp), np.float32)), text)  # fmt: skip


def test_uniform_model():
    vocab = 50
    item = scored(np.full(7, -math.log(vocab)), var=np.zeros(7))  # mu = log p
    assert lk.probability(item) == pytest.approx(1 / vocab, rel=1e-6)
    assert lk.avg_loss(item) == pytest.approx(math.log(vocab), rel=1e-6)
    assert lk.min_k_plus_plus(item) == 0  # through the clamp of the variance


def test_from_logits_by_direct_sum():
    logits = np.random.default_rng(0).normal(size=(6, 9))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p, labels = np.exp(logp), np.array([0, 3, 8, 1, 1, 5])
    mu, own = (p * logp).sum(-1), logp[np.arange(6), labels]
    var = (p * logp**2).sum(-1) - mu**2
    item = Scored(own, logp.argmax(-1) == labels, mu, var, "x")
    z = sorted((own[t] - mu[t]) / math.sqrt(var[t]) for t in range(5))
    assert lk.min_k_plus_plus(item, k=0.4) == pytest.approx(-(z[0] + z[1]) / 2)
    np.testing.assert_allclose(mu, [-sum(-q * math.log(q) for q in row) for row in p])


@given(matches)
def test_extraction_strength_by_double_loop(match):
    labels = match[:-1]
    n = len(labels)
    for start in range(n):  # `start` stays at n - 1 when even the last label is wrong
        if all(labels[start:]):
            break
    item = scored(-np.ones(len(match)), match)
    strength, exact = lk.extraction_strength(item), lk.exact_memorization(item)
    assert strength == pytest.approx(1 - start / n)
    assert exact == pytest.approx(sum(labels) / n)
    assert 1 / n <= strength <= max(exact, 1 / n) + 1e-12
    if n >= 2:
        assert (strength == 1) == (exact == 1)
    for index in range(len(match)):
        better = [*match[:index], True, *match[index + 1 :]]
        assert lk.extraction_strength(scored(-np.ones(len(match)), better)) >= strength


@pytest.mark.parametrize("labels", [0, 1])
def test_texts_without_tokens_left(labels):
    item = scored(-np.ones(labels))
    assert math.isnan(lk.exact_memorization(item))
    assert lk.extraction_strength(item) == 0
    assert lk.min_k(item) == 0 and lk.min_k_plus_plus(item) == 0
    if not labels:
        assert math.isnan(lk.avg_loss(item)) and math.isnan(lk.probability(item))
        assert lk.loss_score(item) == 0 and lk.zlib_score(item) == 0


def test_min_k():
    logp = -np.array([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert lk.min_k(scored(logp), k=1.0) == pytest.approx(3.0)  # mean loss without the eos
    assert lk.min_k(scored(logp)) == pytest.approx(4.5)  # floor(0.4 * 5) = 2
    assert lk.min_k(scored(logp), k=0.1) == pytest.approx(5.0)  # at least one
    for k in (0.0, 1.5):
        with pytest.raises(ValueError, match="0 < k <= 1"):
            lk.min_k(scored(logp), k=k)


def test_loss_and_zlib_keep_the_last_label():
    item = scored([-1.0, -3.0], text="Éa" * 30)
    assert lk.loss_score(item) == 2
    assert lk.zlib_score(item) == 2 / len(zlib.compress(("Éa" * 30).encode()))


def test_truth_ratio_of_equal_losses_is_one():
    ratio = lk.truth_ratio(np.full(4, 2.0), np.full((4, 5), 2.0))
    np.testing.assert_allclose(ratio, 1, atol=1e-8)
    assert lk.true_better(ratio) == pytest.approx(0, abs=1e-8)
    assert lk.closer_to_one(ratio) == pytest.approx(1, abs=1e-8)


def test_truth_ratio_is_geometric_and_shift_invariant():
    rng = np.random.default_rng(1)
    correct, wrong = rng.uniform(0, 4, 20), rng.uniform(0, 4, (20, 5))
    ratio = lk.truth_ratio(correct, wrong)
    np.testing.assert_allclose(ratio, np.exp(correct - wrong.mean(1)), rtol=1e-7)
    np.testing.assert_allclose(lk.truth_ratio(correct + 1.5, wrong + 1.5), ratio, rtol=1e-6)


def test_truth_ratio_stays_finite_for_a_collapsed_model():
    assert lk.truth_ratio([900.0], [[1.0, 1.0]]) == pytest.approx(math.exp(-1) / 1e-10)
    assert lk.truth_ratio([900.0], [[900.0, 900.0]]) == 0
    assert lk.closer_to_one([0.0]) == 0


def test_normalised_probability():
    values = lk.normalised_probability([0.5, 0.0], [[0.25, 0.25, 0.5], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(values, [1 / 3, 0], rtol=1e-9)
