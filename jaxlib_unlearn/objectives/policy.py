"""Bring your own model: a policy from any ``apply_fn``, a batch from tokens and labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxlib_unlearn import losses
from jaxlib_unlearn.objectives.base import Batch, TokenFn


class ApplyPolicy(NamedTuple):
    """A policy over a model that returns all logits; made by :func:`policy_from_apply`."""

    apply_fn: Callable[[Any, Batch], jax.Array]
    params: Any
    ref_logits_fn: Callable[[Batch], jax.Array] | None = None

    def log_probs(self, batch: Batch) -> jax.Array:
        """Log-probabilities of the targets, ``(B, W)``; 0 where there is no label."""
        values = losses.token_log_probs(self._logits(batch), jnp.asarray(batch["targets"]))
        return jnp.where(jnp.asarray(batch["target_mask"]) > 0, values, 0)

    def reduce_logits(self, batch: Batch, fn: TokenFn, reference: bool | str = False) -> Any:
        """``fn(logits, [reference_logits, [plain_logits,]] targets)`` on every label."""
        targets = jnp.asarray(batch["targets"])
        if not reference:
            return fn(self._logits(batch), targets)
        frozen = [self._reference_logits(batch)]
        if reference == "pair":
            frozen.append(self._plain_logits(batch))
        return fn(self._logits(batch), *frozen, targets)

    def _logits(self, batch: Batch) -> jax.Array:
        return _at_labels(self.apply_fn(self.params, batch), batch)

    def _reference_logits(self, batch: Batch) -> jax.Array:
        if "ref_logits" in batch:
            logits = jnp.asarray(batch["ref_logits"])
        elif self.ref_logits_fn is not None:
            logits = _at_labels(self.ref_logits_fn(batch), batch)
        else:
            raise ValueError(
                "this objective compares with a frozen model: give policy_from_apply a "
                "ref_logits_fn, or the batch a column ref_logits (B, W, V)"
            )
        return jax.lax.stop_gradient(logits)

    def _plain_logits(self, batch: Batch) -> jax.Array:
        if "ref_plain_logits" not in batch:
            raise ValueError(
                "this objective compares two frozen models: give the batch the columns ref_logits "
                "and ref_plain_logits, each (B, W, V)"
            )
        return jax.lax.stop_gradient(jnp.asarray(batch["ref_plain_logits"]))


def _at_labels(logits: jax.Array, batch: Batch) -> jax.Array:
    """``(B, T, V) -> (B, W, V)``, zeros where there is no label."""
    index = jnp.asarray(batch["label_index"])[..., None]
    picked = jnp.take_along_axis(losses.upcast(logits), index, axis=1)
    # Zeros, not what the model says there: a NaN at a padding position must not reach a gradient.
    return jnp.where(jnp.asarray(batch["target_mask"])[..., None] > 0, picked, 0)


def policy_from_apply(
    apply_fn: Callable[[Any, Batch], jax.Array],
    params: Any,
    ref_logits_fn: Callable[[Batch], jax.Array] | None = None,
) -> ApplyPolicy:
    """A policy for a model of your own (linen, nnx, equinox, bare arrays).

    Args:
        apply_fn: ``apply_fn(params, batch) -> logits (B, T, V)``; ``batch["tokens"]`` is
            ``(B, T)``.
        params: the tree to differentiate.
        ref_logits_fn: ``ref_logits_fn(batch) -> (B, T, V)`` of the frozen model, for KL and ASU. A
            batch column ``ref_logits (B, W, V)`` goes before it; use that to give ASU's forget
            stream a smoothed teacher and the retain stream a plain one.

    Returns:
        A :class:`Policy`. Its ``log_probs`` under the frozen parameters is what NPO and DPO expect
        in the batch column ``ref_log_probs``.

    Example:
        >>> bigram = lambda params, batch: params[batch["tokens"]]
        >>> batch = batch_from_labels([[3, 1, 2]], [[-100, 1, 2]])
        >>> log_probs = policy_from_apply(bigram, jnp.zeros((4, 4))).log_probs(batch)
        >>> log_probs.shape, round(log_probs[0, 0].item(), 4)
        ((1, 2), -1.3863)
    """
    return ApplyPolicy(apply_fn, params, ref_logits_fn)


def batch_from_labels(
    tokens: ArrayLike,
    labels: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    ignore: int = -100,
    width: int | None = None,
) -> dict[str, np.ndarray]:
    """A batch from the usual ``tokens`` and ``labels`` pair, labels aligned with tokens.

    ``labels[b, t]`` is predicted from the slot before it, ``t - 1``; a label at slot 0 has none and
    does not count.

    Args:
        tokens: ``(B, T)`` int.
        labels: ``(B, T)`` int, ``ignore`` on prompt and padding.
        attention_mask: ``(B, T)`` 0/1, padding on either side; None = no padding.
        ignore: the value that marks "no label".
        width: number of label columns W; None = the most labels any row has (at least 1).

    Returns:
        Numpy columns ``tokens, positions, segment_ids, row_id, label_index, targets, target_mask``.

    Raises:
        ValueError: shapes differ, or a row has more than ``width`` labels.

    Example:
        >>> batch = batch_from_labels([[5, 6, 7]], [[-100, 6, 7]])
        >>> batch["label_index"].tolist(), batch["targets"].tolist()
        ([[0, 1]], [[6, 7]])
    """
    tokens, labels = np.asarray(tokens, np.int32), np.asarray(labels, np.int32)
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if not tokens.shape == labels.shape == mask.shape or tokens.ndim != 2:
        raise ValueError(
            f"tokens {tokens.shape}, labels {labels.shape} and attention_mask {mask.shape} must "
            "have one shape (B, T)"
        )
    is_label = labels[:, 1:] != ignore
    most = max(int(is_label.sum(1).max(initial=0)), 1)
    width = most if width is None else width
    if most > width:
        raise ValueError(f"a row has {most} labels and width is {width}")
    rows = tokens.shape[0]
    index, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    target_mask = np.zeros((rows, width), np.float32)
    for row in range(rows):
        slots = np.flatnonzero(is_label[row])
        index[row, : len(slots)] = slots
        targets[row, : len(slots)] = labels[row, slots + 1]
        target_mask[row, : len(slots)] = 1
    return {
        "tokens": tokens,
        "positions": np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32),
        "segment_ids": mask,
        "row_id": np.arange(rows, dtype=np.int32),
        "label_index": index,
        "targets": targets,
        "target_mask": target_mask,
    }
