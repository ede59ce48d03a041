"""Losses with a log-sigmoid around sequence log-probabilities: NPO, SimNPO, DPO, AP.

Everything here takes *log-probability sums per row*, ``(B,)``: ``log pi(y|x)`` summed over the
label tokens (``losses.row_sums``), so at most 0. The literature's ``S = -log pi`` is its negative.
``mask`` is ``(B,)``: 1 for a row that counts (``losses.labelled_rows``), None for all.

Forms with a batch mean *inside* the log-sigmoid do not add up over micro-batches. They are kept
under the name ``compat=...`` because published code uses them; ``NON_ADDITIVE`` lists those names.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlib_unlearn.losses.likelihood import Term, keep_mask, masked_sum, upcast

NON_ADDITIVE = ("batch_mean", "token_mean")


def _frozen(x: ArrayLike) -> jax.Array:
    return jax.lax.stop_gradient(upcast(x))


def _mean_where(values: jax.Array, keep: jax.Array) -> jax.Array:
    total, weight = masked_sum(values, keep)
    return total / jnp.maximum(weight, 1)


def _token_mean(values: jax.Array, lengths: ArrayLike | None, keep: jax.Array) -> jax.Array:
    if lengths is None:
        raise ValueError("compat='token_mean' needs lengths, the number of labels of each row")
    count = masked_sum(jnp.asarray(lengths, values.dtype), keep)[0]
    return masked_sum(values, keep)[0] / jnp.maximum(count, 1)


def _one_for_all(value: jax.Array, keep: jax.Array) -> Term:
    # One number for the whole batch, returned with the weight the additive form has.
    weight = jnp.sum(keep.astype(value.dtype))
    return value * weight, weight


def _soft_log_sigmoid(margin: jax.Array, scale: float, beta: float) -> jax.Array:
    return -(scale / beta) * jax.nn.log_sigmoid(beta * margin)


def npo(
    log_probs: ArrayLike,
    ref_log_probs: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    beta: float = 0.1,
    compat: str | None = None,
    lengths: ArrayLike | None = None,
) -> Term:
    """Negative preference optimisation: make answers less likely than under the frozen model.

    ``L = -(2/beta) mean_b log sigma(-beta (log pi_b - log pi_ref,b))``. Its gradient is that of
    gradient ascent on the sequence sum, weighted by ``2 sigma(beta (log pi - log pi_ref))``: 1 at
    the reference, tending to 0 once a sequence is forgotten.

    Args:
        log_probs: ``(B,)`` sums under the model, nats.
        ref_log_probs: ``(B,)`` sums under the frozen initial model; no gradient.
        mask: ``(B,)`` rows that count.
        beta: inverse temperature, 1/nats; towards 0 it becomes gradient ascent.
        compat: None, or ``"batch_mean"`` (BLUR's TOFU code: the log-sigmoid of the batch mean), or
            ``"token_mean"`` (Unlearn-Simple's WMDP code: of the token-mean log-ratio). Neither adds
            up over micro-batches.
        lengths: ``(B,)`` labels per row, for ``"token_mean"`` only.

    Returns:
        ``(sum over rows, number of rows)``.

    Raises:
        ValueError: unknown ``compat``, or ``"token_mean"`` without ``lengths``.

    Example:
        >>> total, rows = npo(jnp.array([-5.0, -9.0]), jnp.array([-4.0, -6.0]), beta=0.1)
        >>> round((total / rows).item(), 3)
        11.988

    Reference: Zhang et al. 2024, "Negative Preference Optimization" (arXiv 2404.05868).
    """
    policy, reference = upcast(log_probs), _frozen(ref_log_probs)
    keep = keep_mask(mask, policy)
    margin = jnp.where(keep, reference - policy, 0)
    if compat is None:
        return masked_sum(_soft_log_sigmoid(margin, 2.0, beta), keep)
    if compat == "batch_mean":
        return _one_for_all(_soft_log_sigmoid(_mean_where(margin, keep), 2.0, beta), keep)
    if compat == "token_mean":
        return _one_for_all(_soft_log_sigmoid(_token_mean(margin, lengths, keep), 2.0, beta), keep)
    raise ValueError(f"npo has no compat form {compat!r}; use 'batch_mean' or 'token_mean'")


def npo_raw_logits(logits: ArrayLike, ref_logits: ArrayLike, *, beta: float = 0.1) -> jax.Array:
    """MUSE's NPO, on raw logits: ``-(2/beta) mean_v log sigma(beta (z_ref - z))`` per position.

    Kept for parity with MUSE-bench: it ignores the labels and changes when a constant is added to
    the logits, which leaves every probability as it was.

    Args:
        logits: ``(..., V)``.
        ref_logits: ``(..., V)`` of the frozen model; no gradient.
        beta: inverse temperature, 1/logits.

    Returns:
        ``(...)``, one value per position, for ``masked_sum``.

    Example:
        >>> round(npo_raw_logits(jnp.zeros(3), jnp.zeros(3), beta=2.0).item(), 4)
        0.6931

    Reference: Shi et al. 2024, "MUSE", appendix (arXiv 2407.06460), and its released code.
    """
    margin = _frozen(ref_logits) - upcast(logits)
    return jnp.mean(_soft_log_sigmoid(margin, 2.0, beta), -1)


def simnpo(
    log_probs: ArrayLike,
    lengths: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    compat: str | None = None,
) -> Term:
    """SimNPO: NPO without a reference model, normalised by length.

    ``L = -(2/beta) mean_b log sigma(beta (-log pi_b / n_b - delta))``. The paper writes its margin
    as ``gamma = beta * delta``.

    Args:
        log_probs: ``(B,)`` sums under the model, nats.
        lengths: ``(B,)`` labels per row; a row of length 0 does not count.
        mask: ``(B,)`` rows that count.
        beta: inverse temperature, token/nats.
        delta: margin, nats per token.
        compat: None, or ``"token_mean"`` (Unlearn-Simple's WMDP code: log-sigmoid of the batch's
            token-mean NLL), which does not add up over micro-batches.

    Returns:
        ``(sum over rows, number of rows)``.

    Raises:
        ValueError: unknown ``compat``.

    Example:
        >>> total, rows = simnpo(jnp.array([-8.0]), jnp.array([4]), beta=2.5, delta=0.5)
        >>> round((total / rows).item(), 4)
        0.0186

    Reference: Fan et al. 2024, "Simplicity Prevails" (arXiv 2410.07163).
    """
    policy = upcast(log_probs)
    count = jnp.asarray(lengths, policy.dtype)
    keep = keep_mask(mask, policy) & (keep_mask(None, count) & (count > 0))
    if compat is None:
        margin = jnp.where(keep, -policy, 0) / jnp.maximum(count, 1) - delta
        return masked_sum(_soft_log_sigmoid(margin, 2.0, beta), keep)
    if compat == "token_mean":
        margin = _token_mean(-policy, count, keep) - delta
        return _one_for_all(_soft_log_sigmoid(margin, 2.0, beta), keep)
    raise ValueError(f"simnpo has no compat form {compat!r}; use 'token_mean'")


def simnpo_raw_logits(logits: ArrayLike, *, beta: float = 0.7, delta: float = 0.0) -> jax.Array:
    """SimNPO as in its MUSE code: ``-(2/beta) mean_v log sigma(beta (-z - delta))`` per position.

    Kept for parity, with the caveats of :func:`npo_raw_logits`.

    Args:
        logits: ``(..., V)``.
        beta: inverse temperature, 1/logits.
        delta: margin, logits.

    Returns:
        ``(...)``, one value per position.

    Example:
        >>> round(simnpo_raw_logits(jnp.zeros(3), beta=2.0).item(), 4)
        0.6931

    Reference: Fan et al. 2024, released MUSE code (arXiv 2410.07163).
    """
    return jnp.mean(_soft_log_sigmoid(-upcast(logits) - delta, 2.0, beta), -1)


def dpo(
    chosen: ArrayLike,
    rejected: ArrayLike,
    ref_chosen: ArrayLike,
    ref_rejected: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    beta: float = 0.1,
    compat: str | None = None,
) -> Term:
    """Direct preference optimisation: prefer a refusal (chosen) to the forget answer (rejected).

    ``L = -(2/beta) mean_b log sigma(beta [(log pi - log pi_ref)(chosen) - (same)(rejected)])``.
    The factor ``2/beta`` is that of the later unlearning literature: the gradient at the reference
    model does not depend on ``beta``.

    Args:
        chosen: ``(B,)`` log-probability sums of the refusals.
        rejected: ``(B,)`` sums of the forget answers to the same questions.
        ref_chosen: ``(B,)`` sums of the refusals under the frozen model; no gradient.
        ref_rejected: ``(B,)`` sums of the forget answers under the frozen model; no gradient.
        mask: ``(B,)`` rows that count.
        beta: inverse temperature, 1/nats.
        compat: None, or ``"no_factor"`` (TOFU's code and the DPO paper: without ``2/beta``, so that
            the gradient at the reference is ``beta / 2`` times as large).

    Returns:
        ``(sum over rows, number of rows)``.

    Raises:
        ValueError: unknown ``compat``.

    Example:
        >>> one = lambda x: jnp.array([x])
        >>> round(dpo(one(-3.0), one(-5.0), one(-6.0), one(-4.0), beta=0.1)[0].item(), 3)
        10.26

    Reference: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7 (arXiv 2305.18290);
    as an unlearning baseline: Zhang et al. 2024 (arXiv 2404.05868); without the factor: Maini et
    al. 2024 (arXiv 2401.06121).
    """
    if compat not in (None, "no_factor"):
        raise ValueError(f"dpo has no compat form {compat!r}; use 'no_factor'")
    scale = 2.0 if compat is None else beta
    chosen, rejected = upcast(chosen), upcast(rejected)
    keep = keep_mask(mask, chosen)
    margin = (chosen - _frozen(ref_chosen)) - (rejected - _frozen(ref_rejected))
    return masked_sum(_soft_log_sigmoid(jnp.where(keep, margin, 0), scale, beta), keep)


def answer_preservation(
    answer: ArrayLike, refusal: ArrayLike, mask: ArrayLike | None = None, *, beta: float = 0.1
) -> Term:
    """Answer preservation (AP): on retain questions, prefer the true answer to a refusal.

    ``L = -(1/beta) mean_b log sigma(beta (log pi(answer) - log pi(refusal)))``; a retain
    regulariser for IDK, without a reference model.

    Args:
        answer: ``(B,)`` log-probability sums of the true answers.
        refusal: ``(B,)`` sums of refusals to the same retain questions.
        mask: ``(B,)`` rows that count.
        beta: inverse temperature, 1/nats.

    Returns:
        ``(sum over rows, number of rows)``.

    Example:
        >>> round(answer_preservation(jnp.array([-4.0]), jnp.array([-6.0]))[0].item(), 3)
        5.981

    Reference: Yuan et al. 2024, "A Closer Look at Machine Unlearning for LLMs"
    (arXiv 2410.08109).
    """
    answer = upcast(answer)
    keep = keep_mask(mask, answer)
    margin = jnp.where(keep, answer - upcast(refusal), 0)
    return masked_sum(_soft_log_sigmoid(margin, 1.0, beta), keep)
