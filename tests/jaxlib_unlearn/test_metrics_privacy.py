"""Membership attacks and the KS test: brute force, identities, published saturation values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlib_unlearn.metrics.privacy import auc, ks_test, privleak

scores = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0]), min_size=1, max_size=9)


@given(scores, scores)
def test_auc_counts_pairs(members, nonmembers):
    pairs = [(o > i) + (o == i) / 2 for i in members for o in nonmembers]
    area = auc(members, nonmembers)
    assert area == pytest.approx(np.mean(pairs))
    assert auc(nonmembers, members) == pytest.approx(1 - area)
    assert auc(np.exp(members), np.exp(nonmembers)) == pytest.approx(area)


def test_auc_ends():
    assert auc([0.1, 0.2], [0.3, 0.4]) == 1  # memorised: members have the lower scores
    assert auc([0.3], [0.1]) == 0
    assert auc([1.0, 1.0], [1.0]) == 0.5


@pytest.mark.parametrize("retain", [0.3, 0.5, 0.61])
def test_privleak(retain):
    assert privleak(retain, retain) == 0
    assert privleak(1.0, retain) == pytest.approx(-100)
    assert privleak(0.0, retain) == pytest.approx(100 * retain / (1 - retain))


@pytest.mark.parametrize("n, p", [(40, 1.86e-23), (200, 1.94e-119), (300, 1.48e-179),
                                  (400, 1.06e-239)])  # fmt: skip
def test_ks_of_disjoint_supports(n, p):
    result = ks_test(np.arange(n), np.arange(n) + n)
    assert result.statistic == 1
    assert math.log10(result.p_value) == pytest.approx(math.log10(p), abs=0.002)


def test_ks_invariances():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 2, 60), rng.uniform(0.3, 2.5, 60)
    result = ks_test(a, b)
    assert ks_test(a, a) == (0, 1)
    assert ks_test(rng.permutation(a), b) == result
    np.testing.assert_allclose(ks_test(1 / a, 1 / b), result, rtol=1e-9)
    np.testing.assert_allclose(ks_test(np.log(a), np.log(b)), result, rtol=1e-9)


@pytest.mark.parametrize("a, b, what", [([], [1.0], "empty"), ([1.0], [], "empty"),
                                        ([1.0, math.nan], [1.0], "NaN")])  # fmt: skip
@pytest.mark.parametrize("function", [auc, ks_test])
def test_bad_samples_raise(function, a, b, what):
    with pytest.raises(ValueError, match=what):
        function(a, b)
