"""Choosing among given answers: an answer's score, and the cross-entropy over the scores."""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import Term, upcast


def option_scores(log_probs: ArrayLike, answer: ArrayLike, num_options: int) -> jax.Array:
    """Score of every option: ``s_k = (1 / n_k) sum_w log p_w`` over the n_k labels of option k.

    It is the mean, not the sum, so that an option is not less likely merely because it is longer.

    Args:
        log_probs: ``(B, W)`` log-probabilities of the labels of all options, in nats.
        answer: ``(B, W)`` int, the option that each label belongs to; -1 where there is no label.
        num_options: K; options of a row that have no label score 0.

    Returns:
        ``(B, K)`` float32 (float64 for float64 log-probabilities).

    Example:
        >>> option_scores(jnp.array([[-1.0, -3.0, -4.0, 7.0]]), jnp.array([[0, 0, 1, -1]]), 2)
        Array([[-2., -4.]], dtype=float32)

    MeZO (arXiv 2305.17333), section 3 and its code.
    """
    log_probs, answer = upcast(log_probs), jnp.asarray(answer)
    chex.assert_equal_shape([log_probs, answer])
    mine = answer[..., None] == jnp.arange(num_options)
    total = jnp.sum(jnp.where(mine, log_probs[..., None], 0), 1)
    return total / jnp.maximum(jnp.sum(mine, 1), 1).astype(total.dtype)


def choice(scores: ArrayLike, options: ArrayLike, gold: ArrayLike) -> Term:
    """Cross-entropy of the right option: ``sum_b (log sum_k exp s_bk - s_b,gold)``.

    Args:
        scores: ``(B, K)``, the result of `option_scores`, or any logits of classes.
        options: ``(B, K)`` 0/1, 1 where a row has an option.
        gold: ``(B,)`` int, the right option; rows with -1 are padding and do not count.

    Returns:
        Scalars ``(sum, weight)``; the weight is the number of rows.

    Example:
        >>> total, rows = choice(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([1, -1]))
        >>> round(total.item(), 4), rows.item()
        (1.0986, 1.0)
    """
    scores, gold = upcast(scores), jnp.asarray(gold)
    chex.assert_equal_shape([scores, jnp.asarray(options)])
    real = gold >= 0
    # Missing options get a large negative score, which softmax turns into probability 0.
    scores = jnp.where(jnp.asarray(options) > 0, scores, -1e30)
    right = gold[:, None] == jnp.arange(scores.shape[1])
    picked = jnp.sum(jnp.where(right, scores, 0), 1)
    losses = jax.nn.logsumexp(scores, 1) - picked
    return jnp.sum(jnp.where(real, losses, 0)), jnp.sum(real.astype(scores.dtype))
