"""Token likelihoods and the losses built from them: NLL, gradient ascent, IDK.

Shapes: ``(..., V)`` logits where ``logits[..., w, :]`` predicts ``targets[..., w]``; the shift by
one position has already been done. ``mask`` is 1 (or True) at labels and has the shape of
``targets``. Losses over sequences take ``B`` rows (one sequence each) of ``W`` labels.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Term = tuple[jax.Array, jax.Array]
"""``(sum, weight)``: the value is ``sum / weight``, and both add up over disjoint sets of rows."""


def upcast(x: ArrayLike) -> jax.Array:
    """``x`` in float32, or in float64 when it already is float64."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def keep_mask(mask: ArrayLike | None, like: jax.Array) -> jax.Array:
    """``mask`` as bool, checked to have the shape of ``like``; all True for None."""
    if mask is None:
        return jnp.ones(like.shape, bool)
    mask = jnp.asarray(mask)
    # Broadcasting (B,) against (B, 1) is a known bug of published code: shapes must agree.
    chex.assert_equal_shape([mask, like])
    return mask > 0


def token_log_probs(logits: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Log-probability of each target: ``z_y - log sum_v exp z_v``.

    Args:
        logits: ``(..., V)``, any float dtype; upcast before anything else.
        targets: ``(...)`` int, in ``[0, V)`` (any value where masked later on).

    Returns:
        ``(...)`` float32 (float64 for float64 logits), at most 0.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> round(token_log_probs(logits, jnp.array(1)).item(), 4)
        -1.3863
    """
    logits = upcast(logits)
    targets = jnp.asarray(targets)
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    # A comparison with iota instead of a gather: it fuses, its gradient needs no scatter, and a
    # vocabulary sharded over devices costs one small reduction.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(is_target, shifted, 0), -1)
    return picked - jnp.log(jnp.sum(jnp.exp(shifted), -1))


def masked_sum(values: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """``(sum of the unmasked values, their number)``; ``mask=None`` counts every entry.

    Args:
        values: any shape.
        mask: the same shape, 0/1 or bool, or None.

    Returns:
        Scalars ``(sum, weight)``.

    Example:
        >>> total, weight = masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1, 1, 0]))
        >>> (total.item(), weight.item())
        (3.0, 2.0)
    """
    values = upcast(values)
    keep = keep_mask(mask, values)
    return jnp.sum(jnp.where(keep, values, 0)), jnp.sum(keep.astype(values.dtype))


def merge_terms(*terms: Term) -> Term:
    """One mean over several sets: sums and weights added.

    TOFU's IDK takes one token mean over ``[refusals ; retain]``, so long retain answers outweigh
    short refusals; ``merge_terms(idk, retain)`` is that form.

    Example:
        >>> merge_terms((6.0, 2.0), (1.0, 5.0))
        (7.0, 7.0)
    """
    return functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), terms)


def negate(term: Term) -> Term:
    """``(-sum, weight)``: minimising the result maximises the loss.

    Example:
        >>> negate((6.0, 2.0))
        (-6.0, 2.0)
    """
    return -term[0], term[1]


def row_sums(values: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Sum over the labels of each row: ``(B, W) -> (B,)``; 0 for a row without labels.

    Applied to token log-probabilities it gives ``log pi(y | x)`` of each sequence.

    Example:
        >>> row_sums(jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([[1, 1], [1, 0]])).tolist()
        [-3.0, -3.0]
    """
    values = upcast(values)
    return jnp.sum(jnp.where(keep_mask(mask, values), values, 0), -1)


def row_lengths(mask: ArrayLike, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Number of labels of each row, ``(B, W) -> (B,)``.

    Example:
        >>> row_lengths(jnp.array([[1, 1], [0, 0]])).tolist()
        [2.0, 0.0]
    """
    return jnp.sum((jnp.asarray(mask) > 0).astype(dtype), -1)


def without_last(mask: ArrayLike, count: int) -> jax.Array:
    """The mask without the last ``count`` labels of each row, ``(B, W) -> (B, W)`` bool.

    Args:
        mask: ``(B, W)``, positive at labels.
        count: the number of labels left out; rows with at most that many keep none.

    Example:
        >>> without_last(jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]]), 1).tolist()
        [[True, True, False, False], [False, False, False, False]]
    """
    labels = jnp.asarray(mask) > 0
    following = jnp.cumsum(labels[..., ::-1], -1)[..., ::-1]
    return labels & (following > count)


def labelled_rows(mask: ArrayLike) -> jax.Array:
    """Whether each row has a label, ``(B, W) -> (B,)`` bool: padding rows have none.

    Example:
        >>> labelled_rows(jnp.array([[0, 1], [0, 0]])).tolist()
        [True, False]
    """
    return jnp.any(jnp.asarray(mask) > 0, -1)


def nll_from_log_probs(log_probs: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """Negative log-likelihood of labels whose log-probabilities are known: ``-sum m log p``.

    Args:
        log_probs: ``(..., W)`` from :func:`token_log_probs` or a policy.
        mask: ``(..., W)`` labels, or None for all.

    Returns:
        ``(sum of nats, number of labels)``.

    Example:
        >>> total, weight = nll_from_log_probs(jnp.array([[-1.0, -3.0]]))
        >>> (total / weight).item()
        2.0
    """
    return negate(masked_sum(log_probs, mask))


def nll(logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """Token-mean negative log-likelihood, the fine-tuning and retain loss.

    ``NLL = sum_{b,w} m (log sum_v exp z_v - z_y) / sum_{b,w} m``, in nats per label token. The
    gradient at a label is ``softmax(z) - onehot(y)``, over the weight.

    Args:
        logits: ``(..., W, V)``.
        targets: ``(..., W)`` int.
        mask: ``(..., W)``, 1 at labels; None for all.

    Returns:
        ``(sum of nats, number of labels)``.

    Example:
        >>> total, weight = nll(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]), jnp.array([[1, 0]]))
        >>> (round(total.item(), 4), weight.item())
        (1.3863, 1.0)
    """
    logits, targets = upcast(logits), jnp.asarray(targets)
    keep = keep_mask(mask, targets)
    # Masked logits are replaced before the log-softmax: a NaN there must not reach the gradient.
    return nll_from_log_probs(token_log_probs(jnp.where(keep[..., None], logits, 0), targets), keep)


def gradient_ascent(logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """Gradient ascent on forget data: ``L = -NLL``. Unbounded below; it diverges if left alone.

    Args:
        logits: ``(..., W, V)``.
        targets: ``(..., W)`` int.
        mask: ``(..., W)``, 1 at labels; None for all.

    Returns:
        ``(-sum of nats, number of labels)``.

    Example:
        >>> round(gradient_ascent(jnp.zeros((1, 4)), jnp.array([0]))[0].item(), 4)
        -1.3863

    Reference: Jang et al. 2022, "Knowledge Unlearning for Mitigating Privacy Risks in Language
    Models" (arXiv 2210.01504).
    """
    return negate(nll(logits, targets, mask))


def idk(logits: ArrayLike, targets: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """NLL of a refusal ("I don't know") as the answer to a forget question.

    TOFU itself takes one token mean over refusals and retain answers together: that is
    ``merge_terms(idk(...), nll(retain...))``. Here, as in later code, they are separate means.

    Args:
        logits: ``(..., W, V)`` on the forget question followed by the refusal.
        targets: ``(..., W)`` int, the refusal's tokens.
        mask: ``(..., W)``, 1 on the refusal's tokens; None for all.

    Returns:
        ``(sum of nats, number of labels)``.

    Example:
        >>> idk(jnp.zeros((1, 4)), jnp.array([0]))[1].item()
        1.0

    Reference: Maini et al. 2024, "TOFU", the unlearning baselines (arXiv 2401.06121).
    """
    return nll(logits, targets, mask)
