"""Distances of sets of images and success of attacks against their definitions."""

import numpy as np
import pytest
import scipy.linalg

from jaxlib_unlearn.metrics.images import attack_success, frechet_distance


def features(rows, seed, scale=1.0, width=5):
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((width, width))
    return scale * draw.standard_normal((rows, width)) @ mixing + seed


def test_the_distance_is_that_of_its_formula():
    a, b = features(30, 0), features(40, 1, 2.0)
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second)
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-8)


def test_where_it_is_known():
    a = features(30, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + 2) == pytest.approx(5 * 4)
    # Spread twice as far around the same mean: |sigma - 2 sigma|^2 = tr(cov).
    wide = 2 * (a - a.mean(0)) + a.mean(0)
    assert frechet_distance(a, wide) == pytest.approx(np.trace(np.cov(a.T)))
    rotated = a @ np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    b = features(20, 3)
    turned = b @ np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    assert frechet_distance(rotated, turned) == pytest.approx(frechet_distance(a, b))


def test_fewer_images_than_features():
    a, b = features(3, 0, width=12), features(4, 1, width=12)
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_success_counts_what_was_drawn_before():
    drawn = [True, True, False, False, False]
    attacked = [[False, False, True, False, False], [False, False, True, True, False]]
    assert attack_success(drawn, attacked) == (0.4, 0.8)
    assert attack_success(drawn, np.zeros((0, 5), bool)) == (0.4, 0.4)
    assert attack_success(drawn, np.zeros((3, 5), bool)) == (0.4, 0.4)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: frechet_distance(np.ones((3, 2)), np.ones((3, 4))), r"\(3, 2\) and \(3, 4\)"),
        (lambda: frechet_distance(np.ones((1, 2)), np.ones((3, 2))), "got 1 and 3"),
        (lambda: frechet_distance(np.full((3, 2), np.nan), np.ones((3, 2))), "not finite"),
        (lambda: attack_success([], np.zeros((2, 0))), r"got \(0,\), \(2, 0\)"),
        (lambda: attack_success([True], [True, False]), r"\(2,\)"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call()
