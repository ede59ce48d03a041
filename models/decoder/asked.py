"""Models as objectives ask them: a decoder that is trained, the frozen one, a classifier.

Answers are kept: a forward pass serves all questions to a batch, and streams that are asked the
same share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.objectives.context import TokenFn
from models.decoder.labels import (
    at_labels,
    forward_joined,
    gather,
    label_states,
    reduce_states,
    target_log_prob,
)
from models.decoder.model import Decoder
from models.learner import Batch, Frozen


class _Found(NamedTuple):
    """The known answers about a batch: its label states and its hidden states by block.

    `mates` are the batches of the pass that gave them, this one included, in their order there.
    """

    batch: Batch
    states: Any
    hidden: dict[int, jax.Array]
    mates: Sequence[Batch] = ()


@dataclass(frozen=True)
class AskedDecoder:
    """A decoder and its parameters, as objectives ask it.

    Args:
        decoder: the model.
        params: its parameters.
        options: keyword options of `forward` for every call.
        head: the parameters that `unembed` reads, `head_copies` of `params`.
        blocks: the blocks whose output is collected where hidden states are asked for.
        known: answers so far; they are added as they are asked for.
    """

    decoder: Decoder
    params: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    head: Any = None
    blocks: tuple[int, ...] = ()
    known: list[_Found] = field(default_factory=list)

    def states(self, batch: Batch) -> jax.Array:
        """Final hidden states where labels are predicted, as `at_labels` returns them."""
        for other in self.known:
            if other.batch is batch and other.states is not None:
                return other.states
        return self.learn([batch], labels=True, hidden=False)[0].states

    def log_probs(self, batch: Batch) -> jax.Array:
        """Log-probability of every target, float32 `(B, W)`, 0 where masked."""
        values = self.reduce_logits(batch, target_log_prob)
        return jnp.where(batch["target_mask"] > 0, values, 0.0)

    def reduce_logits(self, batch: Batch, fn: TokenFn) -> Any:
        """`fn(logits, targets)` over label chunks: `(B, W)`, or a tree of such."""
        head = self.params if self.head is None else self.head
        return reduce_states(self.decoder, head, self.states(batch), batch, fn)

    def hidden(self, batch: Batch, block: int) -> tuple[jax.Array, jax.Array]:
        """The residual stream after a block, `(R, T, d)`, and where a token is, `(R, T)`."""
        mask = batch["segment_ids"] > 0
        for other in self.known:
            if other.batch is batch and block in other.hidden:
                return other.hidden[block], mask
        blocks = tuple(sorted({*self.blocks, block}))
        found = self.learn([batch], labels=False, hidden=True, blocks=blocks)[0]
        return found.hidden[block], mask

    def learn(
        self, batches: Sequence[Batch], *, labels: bool, hidden: bool, blocks: Any = None
    ) -> list[_Found]:
        """Run one forward pass for several batches; it ends where nothing more is asked."""
        if not hidden:
            states = label_states(self.decoder, self.params, batches, **self.options)
            made = [_Found(b, s, {}, batches) for b, s in zip(batches, states, strict=True)]
        else:
            blocks = self.blocks if blocks is None else blocks
            made = self._learn_hidden(batches, labels, blocks)
        self.known.extend(made)
        return made

    def _learn_hidden(
        self, batches: Sequence[Batch], labels: bool, blocks: tuple[int, ...]
    ) -> list[_Found]:
        depth = None if labels else max(blocks) + 1
        final, collected = forward_joined(
            self.decoder, self.params, batches, **self.options, hidden_at=blocks, depth=depth
        )
        made = []
        for i, batch in enumerate(batches):
            states = at_labels(final[:, i], batch) if labels else None
            hidden_here = {b: x[:, i] for b, x in collected.items()}
            made.append(_Found(batch, states, hidden_here, batches))
        return made

    def mates(self, batch: Batch) -> Sequence[Batch]:
        """The batches that shared the pass of a batch that was asked for hidden states alone."""
        for other in self.known:
            if other.batch is batch and other.states is None:
                return other.mates
        return [batch]


@dataclass(frozen=True)
class AskedReference:
    """The frozen model: cached columns of a batch, or a forward pass of its own.

    The pass of a fork has the batches of the model's: as long as the two have the same parameters,
    they compute the same bits, and every measure of their distance is exactly 0. The price is that
    the blocks from `train_from` on also run for batches about which nothing is asked. A whole copy
    of the model runs only the batches that it is asked about.

    Args:
        decoder: the model.
        frozen: its parameters, those that are available.
        model: the model that is trained, whose blocks below `train_from` are the frozen model's.
        train_from: the first block in which the two differ.
        blocks: the blocks whose output is asked for.
        options: keyword options of `forward` for every call.
        special: the batches whose pass has options of its own: `(batch, first, options)`, with the
            first block at which they make a difference.
        known: the answers so far to hidden states.
        states_of: the answers so far to labels, with the column that would hold them.
    """

    decoder: Decoder
    frozen: Frozen
    model: AskedDecoder
    train_from: int = 0
    blocks: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    special: Sequence[tuple[Batch, int, Mapping[str, Any]]] = ()
    known: list[_Found] = field(default_factory=list)
    states_of: list[tuple[Batch, str, Any]] = field(default_factory=list)

    def log_probs(self, batch: Batch) -> jax.Array:
        """Log-probability of every target, float32 `(B, W)`, 0 where masked."""
        if "ref_log_probs" in batch:
            return batch["ref_log_probs"]
        values = self.reduce_logits(batch, target_log_prob)
        return jnp.where(batch["target_mask"] > 0, values, 0.0)

    def reduce_logits(self, batch: Batch, fn: TokenFn) -> Any:
        """`fn(logits, targets)` over label chunks: `(B, W)`, or a tree of such."""
        values = reduce_states(self.decoder, self.head, self.states(batch), batch, fn)
        return jax.lax.stop_gradient(values)

    def hidden(self, batch: Batch, block: int) -> tuple[jax.Array, jax.Array]:
        """The residual stream after a block, `(R, T, d)`, and where a token is, `(R, T)`."""
        if block < self.train_from:
            states, mask = self.model.hidden(batch, block)
            return jax.lax.stop_gradient(states), mask
        for other in self.known:
            if other.batch is batch and block in other.hidden:
                return other.hidden[block], batch["segment_ids"] > 0
        blocks = tuple(sorted({*(b for b in self.blocks if b >= self.train_from), block}))
        mates, _, collected = self._forward(batch, hidden_at=blocks, depth=max(blocks) + 1)
        for i, mate in enumerate(mates):
            self.known.append(_Found(mate, None, {b: x[:, i] for b, x in collected.items()}))
        return self.hidden(batch, block)

    @property
    def head(self) -> Any:
        """The parameters that unembed its hidden states."""
        return self.frozen.params if self.frozen.head is None else self.frozen.head

    def states(self, batch: Batch, column: str = "ref_hidden") -> jax.Array:
        """Final hidden states at the labels: a cached column, or of a forward pass.

        The pass that stands for `ref_plain_hidden` has none of the options of its stream.
        """
        if column in batch:
            return gather(batch, batch[column])
        for other, name, states in self.states_of:
            if other is batch and name == column:
                return states
        mates, final, _ = self._forward(batch, plain=column == "ref_plain_hidden")
        for i, mate in enumerate(mates):
            self.states_of.append((mate, column, at_labels(final[:, i], mate)))
        return self.states(batch, column)

    def _forward(
        self, batch: Batch, *, plain: bool = False, **options: Any
    ) -> tuple[Sequence[Batch], jax.Array, dict[int, jax.Array]]:
        if self.frozen.params is None:
            raise ValueError(
                "the frozen model is asked for what its row's reference neither caches nor forks"
            )
        mates: Sequence[Batch] = [batch]
        first, more = self.train_from, {}
        for other, differs, own in self.special:
            if other is batch and not plain:
                first, more = min(first, differs), own
        if first:
            mates = mates if more else self.model.mates(batch)
            below = [self.model.hidden(mate, first - 1)[0] for mate in mates]
            rows = jnp.stack(below, 1)  # as `forward_joined` arranges them
            options["enter"] = (first, rows.reshape(-1, *rows.shape[2:]))
        options = {**self.options, **more, **options}
        found = forward_joined(self.decoder, self.frozen.params, mates, **options)
        return mates, *jax.lax.stop_gradient(found)
