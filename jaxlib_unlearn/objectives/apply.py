"""Bring your own model: a context from any ``apply_fn``, a batch from tokens and labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxlib_unlearn import losses
from jaxlib_unlearn.objectives.context import Batch, Context, TokenFn, row_keys

HiddenFn = Callable[[Any, Batch, int], jax.Array]


class ApplyModel(NamedTuple):
    """A model that returns all logits, as objectives ask it; see :func:`context_from_apply`.

    ``frozen``: it is the reference, so cached columns of the batch go before its own answers, and
    no gradient flows back.
    """

    apply_fn: Callable[[Any, Batch], jax.Array] | None
    params: Any
    hidden_fn: HiddenFn | None = None
    frozen: bool = False

    def log_probs(self, batch: Batch) -> jax.Array:
        """Log-probabilities of the targets, ``(B, W)``; 0 where there is no label."""
        if self.frozen and "ref_log_probs" in batch:
            return jnp.asarray(batch["ref_log_probs"])
        values = losses.token_log_probs(self._logits(batch), jnp.asarray(batch["targets"]))
        return jnp.where(jnp.asarray(batch["target_mask"]) > 0, values, 0)

    def reduce_logits(self, batch: Batch, fn: TokenFn) -> Any:
        """``fn(logits, targets)`` on every label."""
        return fn(self._logits(batch), jnp.asarray(batch["targets"]))

    def hidden(self, batch: Batch, block: int) -> tuple[jax.Array, jax.Array]:
        """The residual stream after a block, ``(B, T, d)``, and where a token is, ``(B, T)``."""
        if self.hidden_fn is None or (self.frozen and self.params is None):
            raise ValueError(
                "this objective asks for hidden states: give context_from_apply a hidden_fn, and "
                "for those of the frozen model its parameters as reference"
            )
        found = self.hidden_fn(self.params, batch, block)
        mask = jnp.asarray(batch["segment_ids"]) > 0
        return (jax.lax.stop_gradient(found) if self.frozen else found), mask

    def _logits(self, batch: Batch) -> jax.Array:
        if self.frozen and "ref_logits" in batch:
            return jax.lax.stop_gradient(jnp.asarray(batch["ref_logits"]))
        if self.apply_fn is None:
            raise ValueError(
                "this objective compares with a frozen model: give context_from_apply its "
                "parameters as reference or a ref_logits_fn, or the batch a column ref_logits "
                "(B, W, V) or ref_log_probs (B, W), whichever it reads"
            )
        logits = _at_labels(self.apply_fn(self.params, batch), batch)
        return jax.lax.stop_gradient(logits) if self.frozen else logits


def _at_labels(logits: jax.Array, batch: Batch) -> jax.Array:
    """``(B, T, V) -> (B, W, V)``, zeros where there is no label."""
    index = jnp.asarray(batch["label_index"])[..., None]
    picked = jnp.take_along_axis(losses.upcast(logits), index, axis=1)
    # Zeros instead of the model's answers: a NaN at a padding position must not reach a gradient.
    return jnp.where(jnp.asarray(batch["target_mask"])[..., None] > 0, picked, 0)


def context_from_apply(
    apply_fn: Callable[[Any, Batch], jax.Array],
    params: Any,
    ref_logits_fn: Callable[[Batch], jax.Array] | None = None,
    *,
    reference: Any = None,
    hidden_fn: HiddenFn | None = None,
    key: jax.Array | None = None,
    step: Any = 0,
    state: Any = (),
) -> Context:
    """A context for a model of your own (linen, nnx, equinox, bare arrays).

    Args:
        apply_fn: ``apply_fn(params, batch) -> logits (B, T, V)``; ``batch["tokens"]`` is
            ``(B, T)``.
        params: the tree to differentiate.
        ref_logits_fn: ``ref_logits_fn(batch) -> (B, T, V)`` of the frozen model, for KL and ASU. A
            batch column ``ref_logits (B, W, V)`` goes before it; use that to give ASU's forget
            stream a smoothed teacher and the retain stream a plain one.
        reference: the frozen model's parameters, for ``apply_fn`` and ``hidden_fn``, in place of
            ``ref_logits_fn``.
        hidden_fn: ``hidden_fn(params, batch, block) -> (B, T, d)``, the residual stream after a
            block, for RMU.
        key: a key of ``jax.random``, for rows that draw numbers.
        step: the number of the step, for the same.
        state: the state of a row that has one (``row.init_state``).

    Returns:
        A :class:`Context`. ``context.model.log_probs`` under the frozen parameters is what NPO and
        DPO expect in the batch column ``ref_log_probs``, unless ``reference`` is given.

    Example:
        >>> bigram = lambda params, batch: params[batch["tokens"]]
        >>> batch = batch_from_labels([[3, 1, 2]], [[-100, 1, 2]])
        >>> log_probs = context_from_apply(bigram, jnp.zeros((4, 4))).model.log_probs(batch)
        >>> log_probs.shape, round(log_probs[0, 0].item(), 4)
        ((1, 2), -1.3863)
    """
    model = ApplyModel(apply_fn, params, hidden_fn)
    if ref_logits_fn is not None:
        reader = ref_logits_fn

        def read(_: Any, batch: Batch) -> jax.Array:
            return reader(batch)

        frozen = ApplyModel(read, None, hidden_fn, True)
    else:
        known = reference is not None
        frozen = ApplyModel(apply_fn if known else None, reference, hidden_fn, True)

    def compare(batch: Batch, fn: TokenFn, plain: bool = False) -> Any:
        """``fn(logits, reference_logits, [plain_logits,] targets)`` on every label."""
        others = [frozen.reduce_logits(batch, lambda logits, _: logits)]
        if plain:
            others.append(_plain_logits(batch))
        return model.reduce_logits(batch, lambda logits, targets: fn(logits, *others, targets))

    context = Context(model, frozen, compare, state=state)
    return context if key is None else context._replace(row_keys=row_keys(key, step))


def _plain_logits(batch: Batch) -> jax.Array:
    if "ref_plain_logits" not in batch:
        raise ValueError(
            "this objective compares two frozen models: give the batch the columns ref_logits "
            "and ref_plain_logits, each (B, W, V)"
        )
    return jax.lax.stop_gradient(jnp.asarray(batch["ref_plain_logits"]))


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
