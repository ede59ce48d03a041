"""The retain side: the kinds of loss that keep what is not forgotten, as a table.

A row with a retain side reads ``options.retain``, the name of a :class:`RetainKind`. The kind's
streams, questions and references become those of the row (``objectives.resolve``), and
:func:`retain_terms` computes its loss. A new kind is one more entry of ``RETAIN``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn import losses
from jaxlib_unlearn.losses import Term
from jaxlib_unlearn.objectives.base import (
    Compat,
    Options,
    Reference,
    Terms,
    asked_reference,
    weight,
)
from jaxlib_unlearn.objectives.context import LABELS, Batch, Context
from jaxlib_unlearn.options import option

# The published forms that rows share. They are names of a row's `compat` like its own ones.
MEAN_OF_MEANS = {
    "mean_of_means": Compat(
        "mean over the micro-batches of each one's own mean (transformers up to 4.45); the value "
        "depends on the split",
        additive=True,
        per_micro_batch=True,
    )
}
RETAIN_KL = {
    "kl_all_positions": Compat(
        "retain KL over all positions, prompt and padding too (TOFU, OpenUnlearning)",
        additive=False,
        reference={"retain": "hidden_all"},
        sets={"retain": "kl"},
    ),
    "kl_sequence_mean": Compat(
        "retain KL as the mean over rows of each row's mean over labels (ASU's code)",
        additive=True,
        sets={"retain": "kl"},
    ),
}
SHARED_COMPAT = {**MEAN_OF_MEANS, **RETAIN_KL}


def nll_term(context: Context, batch: Batch) -> Term:
    """Token-mean NLL of a stream's labels."""
    return losses.nll_from_log_probs(context.model.log_probs(batch), batch["target_mask"])


def reference_kl(logits: jax.Array, reference_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``KL(reference || model)`` per label, in the argument order of ``compare``."""
    del targets
    return losses.token_kl(reference_logits, logits)


def at_every_slot(batch: Batch) -> Batch:
    """A batch of unpacked, right-padded rows in which every slot, padding too, is a label.

    A padded slot sees its row up to its own position, and no slot sees it, as under a padding mask
    on the keys. Segment id -1 marks it.

    Args:
        batch: a batch with ``tokens (B, T)``, ``positions``, ``segment_ids``.

    Returns:
        The batch with label columns ``(B, T)``; its targets have no meaning.

    Raises:
        ValueError: examples share rows of tokens.

    Example:
        >>> batch = {"tokens": jnp.array([[5, 6, 0]]), "positions": jnp.array([[0, 1, 0]]),
        ...          "segment_ids": jnp.array([[1, 1, 0]])}
        >>> every = at_every_slot(batch)
        >>> every["label_index"].tolist(), every["segment_ids"].tolist()
        ([[0, 1, 2]], [[1, 1, -1]])
    """
    if "label_source" in batch:
        raise ValueError("every slot of a row needs rows of one example each, not packed ones")
    tokens = jnp.asarray(batch["tokens"])
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = jnp.asarray(batch["segment_ids"])
    return {
        **batch,
        "positions": jnp.where(segment_ids == 0, slots, jnp.asarray(batch["positions"])),
        "segment_ids": jnp.where(segment_ids == 0, -1, segment_ids),
        "label_index": slots,
        "targets": tokens,
        "target_mask": jnp.ones(tokens.shape, jnp.float32),
    }


class RetainKind(NamedTuple):
    """One kind of loss on the retain side.

    Args:
        loss: ``loss(context, batches, options) -> {term: (sum, weight)}``; the name of each term
            begins with ``retain``.
        summary: one phrase for ``--help``.
        streams: the streams that it reads, which take the place of ``retain`` in the row.
        asks: the questions that it asks of each of its streams; a stream that is not named is
            asked for log-probabilities.
        reference: the quantities of the frozen model that it needs, by stream.
        columns: the columns that the data of a stream must have; a stream that is not named needs
            those that the row names for it.
    """

    loss: Callable[[Context, Mapping[str, Batch], Any], Terms]
    summary: str
    streams: tuple[str, ...] = ("retain",)
    asks: Mapping[str, tuple[str, ...]] = {}
    reference: Mapping[str, str] = {}
    columns: Mapping[str, tuple[str, ...]] = {}


def _nll(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    del options
    return {"retain": nll_term(context, batches["retain"])}


def _kl(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    """KL as a mean over labels; ``RETAIN_KL`` has the other published forms."""
    batch = batches["retain"]
    batch = at_every_slot(batch) if options.compat == "kl_all_positions" else batch
    values = context.compare(batch, reference_kl)
    by_row = options.compat == "kl_sequence_mean"
    reduce = losses.sequence_mean if by_row else losses.masked_sum
    return {"retain": reduce(values, batch["target_mask"])}


def _none(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    del context, batches, options
    return {}


RETAIN: dict[str, RetainKind] = {
    "nll": RetainKind(_nll, "the token-mean NLL"),
    "kl": RetainKind(_kl, "KL to the frozen model", reference={"retain": "hidden"}),
    "none": RetainKind(_none, "no loss", streams=()),
}
"""Every kind of retain loss by name."""


if TYPE_CHECKING:
    Retain = str
else:
    Retain = Literal[tuple(RETAIN)]  # so that a command line refuses other words


def retains(default: str | None = None, **own: str) -> Any:
    """The field ``retain`` of a row's options.

    Args:
        default: the kind; None means ``nll``, or the kind that ``compat`` is a form of.
        own: kinds that the row computes itself, each with its phrase for ``--help``.
    """
    told = own | {name: kind.summary for name, kind in RETAIN.items()}
    doc = "The loss on the retain side: " + ", ".join(f"{k} ({v})" for k, v in told.items()) + "."
    if default is None:
        doc += " None means nll, or the kind that compat is a form of."
    return option(default, doc, choices=tuple(told), none="nll" if default is None else "")


@dataclasses.dataclass(frozen=True)
class Sided(Options):
    """Options of an objective with a forget and a retain side."""

    retain: Retain | None = retains()
    forget_weight: float = weight("forget", 1.0)
    retain_weight: float = weight("retain", 1.0)
    reference: Reference = asked_reference()


def with_kind(row: Any, kind: RetainKind) -> Any:
    """The row with the streams, columns, questions and references of a retain kind."""
    place = row.streams.index("retain")
    streams = (*row.streams[:place], *kind.streams, *row.streams[place + 1 :])
    reference = {s: quantity for s, quantity in row.reference.items() if s != "retain"}
    asks = {s: asked for s, asked in row.asks.items() if s != "retain"}
    return dataclasses.replace(
        row,
        streams=streams,
        columns={**row.columns, **kind.columns},
        reference=reference | dict(kind.reference),
        asks=asks | {s: kind.asks.get(s, (LABELS,)) for s in kind.streams},
    )


def retain_terms(context: Context, batches: Mapping[str, Batch], options: Any) -> Terms:
    """The terms of the retain side, by ``options.retain``; a form that drops the option has NLL."""
    return RETAIN[options.retain or "nll"].loss(context, batches, options)
