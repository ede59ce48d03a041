"""Losses that compare the model's whole next-token distribution with a teacher's: KL and ASU.

The teacher always comes first, ``KL(teacher || student)``, is read at temperature 1 (a smoothed
teacher is smoothed inside its attention, not here), and receives no gradient.
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import (
    Term,
    keep_mask,
    labelled_rows,
    masked_sum,
    row_lengths,
    row_sums,
    upcast,
)


def token_kl(teacher_logits: ArrayLike, student_logits: ArrayLike) -> jax.Array:
    """``KL(p || q) = sum_v p_v (log p_v - log q_v)`` per position, p teacher and q student.

    The gradient with respect to the student's logits is ``q - p``.

    Args:
        teacher_logits: ``(..., V)``; no gradient. An entry of ``-inf`` has probability 0 and adds
            nothing.
        student_logits: ``(..., V)``.

    Returns:
        ``(...)`` nats, not negative (up to rounding).

    Example:
        >>> teacher, student = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.7, 0.2, 0.1])
        >>> round(token_kl(jnp.log(teacher), jnp.log(student)).item(), 4)
        0.092
    """
    teacher, student = jax.lax.stop_gradient(upcast(teacher_logits)), upcast(student_logits)
    chex.assert_equal_shape([teacher, student])
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    p = jnp.exp(log_p)
    # 0 * (-inf - -inf) is NaN, and the limit is 0.
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_p - log_q, 0), 0), -1)


def contrast(smoothed: ArrayLike, plain: ArrayLike, amount: ArrayLike) -> jax.Array:
    """A smoothed teacher that also lowers the tokens that smoothing made less likely.

    ``log p = log p_T - a relu(log p_0 - log p_T)``, renormalised: a token whose probability fell
    when attention was smoothed depends on the knowledge to forget, and falls further; the others
    gain its probability. ``a = 0`` is the smoothed teacher.

    Args:
        smoothed: ``(..., V)`` logits ``p_T`` of the frozen model with smoothed attention.
        plain: ``(..., V)`` logits ``p_0`` of the frozen model without smoothing.
        amount: ``a``, 0 or more.

    Returns:
        ``(..., V)`` log-probabilities, float32 (float64 when given float64).

    Example:
        >>> smoothed, plain = jnp.log(jnp.array([0.4, 0.6])), jnp.log(jnp.array([0.8, 0.2]))
        >>> jnp.exp(contrast(smoothed, plain, 1.0)).round(4).tolist()
        [0.25, 0.75]
    """
    log_t, log_0 = jax.nn.log_softmax(upcast(smoothed)), jax.nn.log_softmax(upcast(plain))
    chex.assert_equal_shape([log_t, log_0])
    # A token that the smoothed teacher rules out stays out: -inf - -inf would be NaN.
    fall = jnp.where(jnp.isneginf(log_t), 0, jax.nn.relu(log_0 - log_t))
    return jax.nn.log_softmax(log_t - amount * fall)


def _masked_token_kl(
    teacher_logits: ArrayLike, student_logits: ArrayLike, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    teacher, student = upcast(teacher_logits), upcast(student_logits)
    chex.assert_equal_shape([teacher, student])
    keep = keep_mask(mask, student[..., 0])
    # Masked logits are replaced first: a NaN there must not reach the gradient.
    teacher = jnp.where(keep[..., None], teacher, 0)
    student = jnp.where(keep[..., None], student, 0)
    return token_kl(teacher, student), keep


def kl(teacher_logits: ArrayLike, student_logits: ArrayLike, mask: ArrayLike | None = None) -> Term:
    """Mean over labels of ``KL(teacher || student)``: the KL retain regulariser.

    Args:
        teacher_logits: ``(..., W, V)`` of the frozen model; no gradient.
        student_logits: ``(..., W, V)``.
        mask: ``(..., W)``, 1 at labels. None takes all positions, prompt and padding too: the form
            of TOFU's and OpenUnlearning's code, whose value depends on the padding.

    Returns:
        ``(sum of nats, number of positions)``.

    Example:
        >>> kl(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)), jnp.array([[1, 0]]))[1].item()
        1.0

    Reference: Maini et al. 2024, "TOFU", the unlearning baselines (arXiv 2401.06121).
    """
    return masked_sum(*_masked_token_kl(teacher_logits, student_logits, mask))


def skip_first_label(mask: ArrayLike) -> jax.Array:
    """The mask without the first label of each row.

    ASU combined with IDK leaves the first answer token to the refusal alone.

    Example:
        >>> skip_first_label(jnp.array([[0, 1, 1], [1, 0, 0]])).astype(int).tolist()
        [[0, 0, 1], [0, 0, 0]]
    """
    mask = jnp.asarray(mask)
    keep = mask > 0
    return jnp.where(jnp.cumsum(keep, -1) > 1, mask, jnp.zeros_like(mask))


def sequence_mean(values: ArrayLike, mask: ArrayLike) -> Term:
    """Mean over the labels of each row, then over the rows that have labels.

    ``sum_b (sum_w m v / n_b)`` with weight ``#{b : n_b > 0}``: it adds up over rows.

    Args:
        values: ``(B, W)``, one sequence per row.
        mask: ``(B, W)`` labels.

    Returns:
        ``(sum over rows, number of rows with a label)``.

    Example:
        >>> values, mask = jnp.array([[1.0, 3.0], [5.0, 9.0]]), jnp.array([[1, 1], [1, 0]])
        >>> total, rows = sequence_mean(values, mask)
        >>> (total.item(), rows.item())
        (7.0, 2.0)
    """
    sums = row_sums(values, mask)
    return masked_sum(sums / jnp.maximum(row_lengths(mask, sums.dtype), 1), labelled_rows(mask))


def asu_forget(
    teacher_logits: ArrayLike,
    student_logits: ArrayLike,
    mask: ArrayLike,
    *,
    reduction: str = "seq_mean",
    skip_first: bool = False,
) -> Term:
    """ASU's forget loss: KL to the frozen model run with smoothed attention.

    ``k[b,w] = KL(p_teacher || p_student)``; ``seq_mean``: ``mean_b (sum_w m k / n_b)``;
    ``token_mean``: ``sum m k / sum m``. Never negative, so it cannot diverge as ascent does.

    Args:
        teacher_logits: ``(B, W, V)`` of the initial model with attention scores divided by the
            temperature in the smoothed layers; no gradient.
        student_logits: ``(B, W, V)`` of the model, attention as usual.
        mask: ``(B, W)``, 1 on answer tokens and the final end-of-sequence token.
        reduction: ``"seq_mean"`` (the official TOFU code) or ``"token_mean"`` (its MUSE fork).
        skip_first: leave out each row's first label (ASU with IDK).

    Returns:
        ``(sum, number of rows with labels)``, or number of labels for ``"token_mean"``.

    Raises:
        ValueError: unknown reduction.

    Example:
        >>> asu_forget(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 5)), jnp.ones((2, 3)))[1].item()
        2.0

    Reference: Zare Zade et al. 2026, "Attention Smoothing Is All You Need For Unlearning"
    (arXiv 2603.01285).
    """
    if skip_first:
        mask = skip_first_label(mask)
    values, keep = _masked_token_kl(teacher_logits, student_logits, mask)
    if reduction == "seq_mean":
        return sequence_mean(values, keep)
    if reduction == "token_mean":
        return masked_sum(values, keep)
    raise ValueError(f"unknown reduction {reduction!r}; use 'seq_mean' or 'token_mean'")
