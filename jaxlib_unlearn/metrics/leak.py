"""leak@k: how likely the best of k sampled answers is to leak."""

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def leak_weights(n: int, k: int | Sequence[int]) -> np.ndarray:
    """Weights of the sorted scores in the unbiased estimate of the best of k.

        w_j = C(j-1, k-1) / C(n, k)   for j = k..n, 0 below
        w_n = k/n,   w_{j-1} = w_j (j-k)/(j-1)

    A subset of k has its maximum at rank j iff its other k-1 members come from the j-1 lower
    ranks. The recurrence multiplies factors in [0, 1], so nothing overflows at any n.
    The weights also work in traced code: `jnp.sort(scores) @ leak_weights(n, k)`.

    Args:
        n: number of samples.
        k: subset size, 1 <= k <= n, or a sequence of K sizes.

    Returns:
        float64 (n,), or (n, K) for a sequence; row j-1 weighs the j-th smallest score.

    Raises:
        ValueError: a size is below 1 or above n.

    Example:
        >>> leak_weights(4, 2)
        array([0.        , 0.16666667, 0.33333333, 0.5       ])

    Leak@k, arXiv 2511.04934.
    """
    if np.ndim(k):
        return np.stack([leak_weights(n, size) for size in np.asarray(k)], axis=-1)
    size = operator.index(k)  # pyright: ignore[reportArgumentType]
    if not 1 <= size <= n:
        raise ValueError(f"leak@k needs 1 <= k <= n: k = {size}, n = {n} samples")
    ranks = np.arange(n, size, -1)
    weights = np.zeros(n)
    weights[n - 1] = size / n
    weights[size - 1 : n - 1] = (size / n * np.cumprod((ranks - size) / (ranks - 1)))[::-1]
    return weights


def leak_at_k(scores: ArrayLike, k: int | Sequence[int]) -> np.ndarray:
    """Unbiased estimate of the expected best score among k sampled answers.

        leak@k = E[max_{j<=k} S_j],   estimated by   sum_{j=k}^n w_j S_(j)

    i.e. the mean of the maximum over all C(n, k) subsets. With 0/1 scores and c hits it is
    1 - C(n-c, k)/C(n, k). One set of n samples serves every k <= n.

    Args:
        scores: (..., n) scores in [0, 1], n sampled answers of each prompt.
        k: the number of answers that the attacker draws, 1 <= k <= n, or a sequence of K of them.

    Returns:
        float64 (...) for one k, (..., K) for a sequence. Average it over prompts to report.

    Raises:
        ValueError: k < 1 or k > n, or a score is NaN or outside [0, 1].

    Example:
        >>> leak_at_k([0.0, 0.0, 0.0, 1.0], [1, 2, 4])
        array([0.25, 0.5 , 1.  ])

    Leak@k, arXiv 2511.04934.
    """
    if np.ndim(scores) == 0:
        raise ValueError("leak@k needs scores with a sample axis: (..., n)")
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    if not np.all((ordered >= 0) & (ordered <= 1)):
        raise ValueError("leak@k needs scores in [0, 1] without NaN")
    if np.ndim(k):
        return np.stack([_best_of(ordered, size) for size in np.asarray(k)], axis=-1)
    return _best_of(ordered, k)  # pyright: ignore[reportArgumentType]


def _best_of(ordered: np.ndarray, k: int) -> np.ndarray:
    weights = leak_weights(ordered.shape[-1], k)[k - 1 :]
    # The weights sum to 1 only up to rounding. Measured from the k-th smallest score (the least
    # possible maximum) that error is multiplied by 0, so "never" and "always" come out exact.
    floor = ordered[..., k - 1]
    excess = (ordered[..., k - 1 :] - floor[..., None]) @ weights
    return np.minimum(floor + excess, ordered[..., -1])
