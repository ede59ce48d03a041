"""Membership inference and distribution tests: can one tell that the data was trained on?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxlib_unlearn.metrics.likelihood import EPSILON


class KSTest(NamedTuple):
    """Outcome of a two-sample Kolmogorov-Smirnov test."""

    statistic: float
    p_value: float


def auc(members: ArrayLike, nonmembers: ArrayLike) -> float:
    """Area under the ROC curve of a membership attack.

        AUC = P(s_nonmember > s_member) + P(s_nonmember = s_member) / 2

    Scores are signed so that larger means less likely a member.

    Args:
        members: (n,) scores of the forget set.
        nonmembers: (m,) scores of texts that were never seen.

    Returns:
        1 = clearly memorised, 0.5 = indistinguishable, below 0.5 = over-forgotten (or the two
        sets differ in difficulty).

    Raises:
        ValueError: a sample is empty or holds NaN.

    Example:
        >>> auc([0.1, 0.5], [0.5, 0.9])
        0.875

    OpenUnlearning, arXiv 2506.12618.
    """
    inside, outside = _samples(members, nonmembers)
    ranks = stats.rankdata(np.concatenate([inside, outside]))[len(inside) :]
    pairs = len(inside) * len(outside)
    return float((ranks.sum() - len(outside) * (len(outside) + 1) / 2) / pairs)


def privleak(auc: float, auc_retain: float = 0.5) -> float:
    """The attack's success relative to that on a model that never saw the data, in percent.

        100 ((1 - A) - (1 - A_ret)) / ((1 - A_ret) + 1e-10)

    Args:
        auc: the AUC of the evaluated model, in the convention of `auc` (1 = memorised).
        auc_retain: the AUC of the model trained without the forget set; 0.5 if there is none.

    Returns:
        0 = as if never trained on it, -100 = fully memorised, positive = over-unlearned.

    Example:
        >>> round(privleak(0.75), 4)
        -50.0

    MUSE, arXiv 2407.06460, criterion C3.
    """
    return float(((1 - auc) - (1 - auc_retain)) / ((1 - auc_retain) + EPSILON) * 100)


def ks_test(a: ArrayLike, b: ArrayLike) -> KSTest:
    """Two-sided two-sample Kolmogorov-Smirnov test with the exact p-value.

        ``D = sup_x |F_a(x) - F_b(x)|``

    The asymptotic formula is off by a factor of two at the sizes of TOFU; scipy uses it only beyond
    10,000 values per sample.

    Args:
        a: (n,) values.
        b: (m,) values.

    Returns:
        `KSTest(statistic, p_value)`.

    Raises:
        ValueError: a sample is empty or holds NaN.

    Example:
        >>> result = ks_test([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
        >>> result.statistic, round(result.p_value, 6)
        (1.0, 0.1)

    TOFU, arXiv 2401.06121, forget quality.
    """
    result = stats.ks_2samp(*_samples(a, b))
    return KSTest(float(result.statistic), float(result.pvalue))  # pyright: ignore


def _samples(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(x, np.float64).ravel() for x in (a, b))
    if not len(first) or not len(second):
        raise ValueError("two samples are compared and one of them is empty")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("two samples are compared and one of them holds NaN")
    return first, second
