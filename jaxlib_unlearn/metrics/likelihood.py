"""Scores of one text from its token log-probabilities, and ratios between texts."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Keeps the published quotients finite; part of their definition.
EPSILON = 1e-10


class Scored(NamedTuple):
    """Results of one forward pass at the n label tokens of a text, the final eos included.

    logp: (n,) log-probability of each label, natural log. match: (n,) bool, label is the argmax.
    mu: (n,) sum_v p_v log p_v. var: (n,) sum_v p_v (log p_v)^2 - mu^2.
    text: the decoded labels without special tokens.
    """

    logp: np.ndarray
    match: np.ndarray
    mu: np.ndarray
    var: np.ndarray
    text: str


def avg_loss(item: Scored) -> float:
    """Mean negative log-likelihood per label token, in nats.

        L = -(1/T) sum_t log p(y_t | y_<t)

    Args:
        item: a scored text of T labels.

    Returns:
        L, or NaN for a text without labels.

    Example:
        >>> half = np.log(np.full(3, 0.5))
        >>> round(avg_loss(Scored(half, half > -1, half, half, "")), 4)
        0.6931

    TOFU, arXiv 2401.06121.
    """
    return float(-np.mean(item.logp, dtype=np.float64)) if len(item.logp) else float("nan")


def probability(item: Scored) -> float:
    """Geometric mean of the token probabilities, exp(-avg_loss).

    Args:
        item: a scored text.

    Returns:
        A probability in [0, 1], or NaN for a text without labels.

    Example:
        >>> half = np.log(np.full(3, 0.5))
        >>> round(probability(Scored(half, half > -1, half, half, "")), 4)
        0.5

    TOFU, arXiv 2401.06121.
    """
    return float(np.exp(-avg_loss(item)))


def exact_memorization(item: Scored) -> float:
    """Share of labels that are the model's argmax, the last label (eos) left out.

        EM = (1/n) sum_t 1[argmax p(. | y_<t) = y_t]

    Args:
        item: a scored text of n + 1 labels.

    Returns:
        EM in [0, 1], or NaN if n = 0.

    Example:
        >>> match = np.array([True, False, True, True, True])
        >>> exact_memorization(Scored(-np.ones(5), match, -np.ones(5), np.ones(5), ""))
        0.75

    OpenUnlearning, arXiv 2506.12618.
    """
    hits = item.match[:-1]
    return float(np.mean(hits)) if len(hits) else float("nan")


def extraction_strength(item: Scored) -> float:
    """Share of the text that the model completes by itself, the last label (eos) left out.

        ES = 1 - k*/n,   k* = min {k in 0..n-1 : labels k+1..n are all the argmax}

    k* stops at n - 1 even when the last label is wrong, so the least value is 1/n.

    Args:
        item: a scored text of n + 1 labels.

    Returns:
        ES in [1/n, 1], or 0 if n = 0.

    Example:
        >>> match = np.array([True, False, True, True, True])
        >>> extraction_strength(Scored(-np.ones(5), match, -np.ones(5), np.ones(5), ""))
        0.5

    OpenUnlearning, arXiv 2506.12618.
    """
    hits = item.match[:-1]
    run = int(np.sum(np.cumprod(hits[::-1])))
    return max(run, 1) / len(hits) if len(hits) else 0.0


def loss_score(item: Scored) -> float:
    """Membership score by the mean loss; larger means less likely a member.

    Args:
        item: a scored text.

    Returns:
        `avg_loss(item)`, or 0 for a text without labels.

    Example:
        >>> loss_score(Scored(-np.ones(2), np.ones(2, bool), -np.ones(2), np.ones(2), "a"))
        1.0

    OpenUnlearning, arXiv 2506.12618.
    """
    return avg_loss(item) if len(item.logp) else 0.0


def zlib_score(item: Scored) -> float:
    """Membership score by loss per compressed byte; larger means less likely a member.

        avg_loss / len(zlib(utf8(text)))

    Args:
        item: a scored text.

    Returns:
        The score in nats per byte, or 0 for a text without labels.

    Example:
        >>> item = Scored(-np.ones(2), np.ones(2, bool), -np.ones(2), np.ones(2), "a" * 20)
        >>> zlib_score(item) == 1 / len(zlib.compress(b"a" * 20))
        True

    OpenUnlearning, arXiv 2506.12618.
    """
    return loss_score(item) / len(zlib.compress(item.text.encode("utf-8")))


def min_k(item: Scored, k: float = 0.4) -> float:
    """Membership score by the least likely tokens; larger means less likely a member.

        -mean of the m lowest log p(y_t),   m = max(1, floor(k n)), last label left out

    Args:
        item: a scored text of n + 1 labels.
        k: share of the tokens, in (0, 1].

    Returns:
        The score in nats, or 0 if n = 0.

    Raises:
        ValueError: k is not in (0, 1].

    Example:
        >>> logp = -np.array([1.0, 4.0, 2.0, 3.0, 9.0])
        >>> min_k(Scored(logp, logp > 0, logp, logp, ""), k=0.5)
        3.5

    OpenUnlearning, arXiv 2506.12618.
    """
    return _lowest(np.asarray(item.logp[:-1], np.float64), k)


def min_k_plus_plus(item: Scored, k: float = 0.4) -> float:
    """Min-k on log-probabilities standardised over the vocabulary.

        z_t = (log p(y_t) - mu_t) / sqrt(max(var_t, 1e-6)),   -mean of the m lowest z_t

    Args:
        item: a scored text of n + 1 labels.
        k: share of the tokens, in (0, 1].

    Returns:
        The score (no unit), or 0 if n = 0.

    Raises:
        ValueError: k is not in (0, 1].

    Example:
        >>> logp, mu, var = np.array([-3.0, -9.0]), np.array([-1.0, 0.0]), np.array([4.0, 0.0])
        >>> min_k_plus_plus(Scored(logp, logp > 0, mu, var, ""))
        1.0

    OpenUnlearning, arXiv 2506.12618.
    """
    logp, mu, var = (np.asarray(x, np.float64)[:-1] for x in (item.logp, item.mu, item.var))
    return _lowest((logp - mu) / np.sqrt(np.maximum(var, 1e-6)), k)


def _lowest(tokens: np.ndarray, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"min-k needs 0 < k <= 1, got {k}")
    if not len(tokens):
        return 0.0
    return float(-np.mean(np.sort(tokens)[: max(1, int(k * len(tokens)))]))


# Attack name -> item score. All are signed so that larger means less likely a member.
ATTACKS: dict[str, Callable[[Scored], float]] = {
    "loss": loss_score,
    "zlib": zlib_score,
    "min_k": min_k,
    "min_k_plus_plus": min_k_plus_plus,
}


def truth_ratio(correct_loss: ArrayLike, wrong_losses: ArrayLike) -> np.ndarray:
    """Probability of the wrong answers relative to the correct one.

        R = P_w / (P_c + 1e-10),   P_w = exp(-mean_j L_j),   P_c = exp(-L_c)

    P_w is the geometric mean over wrong answers; an arithmetic one is not compatible with the
    published numbers.

    Args:
        correct_loss: (...) average loss of the correct (or paraphrased) answer, in nats.
        wrong_losses: (..., J) average losses of the J wrong answers, in nats.

    Returns:
        float64 (...). 1 = the model cannot tell them apart, below 1 = it knows the answer.

    Example:
        >>> truth_ratio([1.0], [[1.0, 3.0]]).round(4)
        array([0.3679])

    TOFU, arXiv 2401.06121.
    """
    correct, wrong = _correct_and_wrong(correct_loss, wrong_losses)
    return wrong / (correct + EPSILON)


def _correct_and_wrong(correct_loss: ArrayLike, wrong_losses: ArrayLike):
    correct = np.asarray(correct_loss, np.float64)
    wrong = np.mean(np.asarray(wrong_losses, np.float64), axis=-1)
    return np.exp(-correct), np.exp(-wrong)


def closer_to_one(ratio: ArrayLike) -> float:
    """Aggregate of truth ratios on the forget set: the mean of min(R, 1/(R + 1e-10)).

    Args:
        ratio: (n,) truth ratios.

    Returns:
        A number in [0, 1]. The target is the retrained model's value, not 1.

    Example:
        >>> round(closer_to_one([0.5, 2.0]), 6)
        0.5

    TOFU, arXiv 2401.06121.
    """
    ratio = np.asarray(ratio, np.float64)
    return float(np.mean(np.minimum(ratio, 1 / (ratio + EPSILON))))


def true_better(ratio: ArrayLike) -> float:
    """Aggregate of truth ratios on the other sets: the mean of max(0, 1 - R).

    Args:
        ratio: (n,) truth ratios.

    Returns:
        A number in [0, 1]; higher is better.

    Example:
        >>> true_better([0.5, 2.0])
        0.25

    TOFU, arXiv 2401.06121.
    """
    return float(np.mean(np.maximum(0.0, 1 - np.asarray(ratio, np.float64))))


def normalised_probability(correct: ArrayLike, wrong: ArrayLike) -> np.ndarray:
    """Probability of the correct answer among the offered ones.

        p = P(correct) / (P(correct) + sum_j P(wrong_j) + 1e-10)

    Args:
        correct: (...) probability of the correct answer.
        wrong: (..., J) probabilities of the wrong answers.

    Returns:
        float64 (...) in [0, 1].

    Example:
        >>> normalised_probability([0.2], [[0.1, 0.1]]).round(4)
        array([0.5])

    TOFU, arXiv 2401.06121.
    """
    correct = np.asarray(correct, np.float64)
    return correct / (correct + np.sum(np.asarray(wrong, np.float64), axis=-1) + EPSILON)
