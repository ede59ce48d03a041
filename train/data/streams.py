"""Streams of training batches: which rows a step sees, tokenised, padded, with cached references.

A batch is a pure function of (seed, stream, step), so resuming needs nothing but the step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from train.data.batches import batch_shape, collate, make_buckets, paired_indices, training_indices
from train.data.examples import Example
from train.data.packing import Packing, balanced, collate_packed, fits, make_packing

FOLLOWERS = ("idk", "alternate")  # streams of other answers to the questions of the main stream


@dataclass(frozen=True)
class Stream:
    """The examples of one stream and, per example, the cached reference columns.

    Args:
        examples: tokenised rows.
        pad_id: token in padded slots.
        length_buckets: padded lengths.
        label_buckets: padded numbers of labels.
        references: column name -> one array per example, first axis its labels.
        packing: how examples share rows of tokens; None: each has its own.
        every_slot: references are stored for every slot of a padded row, not for its labels.
    """

    examples: Sequence[Example]
    pad_id: int
    length_buckets: tuple[int, ...]
    label_buckets: tuple[int, ...]
    references: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    packing: Packing | None = None
    every_slot: bool = False

    def identity(self) -> str:
        """sha256 of the examples: of their lengths, of where answers begin, and of their tokens."""
        sizes = np.array([[len(e.tokens), e.num_prompt] for e in self.examples], "<i8")
        found = hashlib.sha256(sizes.tobytes())
        for example in self.examples:
            found.update(np.asarray(example.tokens, "<i4").tobytes())
        return found.hexdigest()

    def order(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """An order of these rows in which examples that share a row fill it evenly."""
        if self.packing is None:
            return np.arange(len(rows))
        return balanced([len(self.examples[i].tokens) for i in rows], self.packing.together)

    def shape(self, rows: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The padded sizes of a batch of these rows: tokens, labels; and labels of packed rows."""
        chosen = [self.examples[i] for i in rows]
        length, width = batch_shape(chosen, self.length_buckets, self.label_buckets)
        if self.packing is None:
            return length, width
        length, slots = self.packing.shape(chosen)
        return length, width, slots

    def batch(
        self, rows: Sequence[int] | np.ndarray, shape: tuple[int, ...] | None = None
    ) -> dict[str, np.ndarray]:
        """The padded batch of these rows."""
        chosen, ids = [self.examples[i] for i in rows], [int(i) for i in rows]
        length, width, *slots = self.shape(rows) if shape is None else shape
        if self.packing is None:
            batch = collate(chosen, ids, length, width, pad_id=self.pad_id)
        else:
            together, sizes = self.packing.together, (length, slots[0])
            batch = collate_packed(chosen, ids, together, sizes, width, self.pad_id)
        for column, values in self.references.items():
            tail = values[0].shape[1:]
            places = length if self.every_slot else width
            padded = np.zeros((len(chosen), places, *tail), np.float32)
            for b, row in enumerate(rows):
                padded[b, : len(values[row])] = values[row][:places]
            batch[column] = padded
        return batch


def make_stream(
    examples: Sequence[Example], pad_id: int, buckets: int = 2, batch_size: int = 1
) -> Stream:
    """A stream with at most `buckets` padded lengths (each pair of lengths is a compilation).

    The lengths are quantiles of the longest of `batch_size` examples: its quantile q is the
    quantile `q^(1/batch_size)` of one example.
    """

    def marks(sizes: list[int]) -> tuple[int, ...]:
        ordered = sorted(sizes)
        shares = [((i + 1) / buckets) ** (1 / batch_size) for i in range(buckets)]
        return make_buckets([ordered[math.ceil(q * len(ordered)) - 1] for q in shares], buckets)

    lengths = [len(e.tokens) for e in examples]
    labels = [len(e.tokens) - e.num_prompt for e in examples]
    return Stream(examples, pad_id, marks(lengths), marks(labels))


def pack_streams(
    streams: Mapping[str, Stream], batch_size: int, divides: int, length: int
) -> dict[str, Stream]:
    """The streams with as many examples per row as fill about `length` tokens.

    Unpacked short rows leave slots empty (the longest of a batch sets their length), and each
    recomputes the common prefix of all prompts; packed rows do neither. The losses are the same.

    Args:
        streams: those of one stage.
        batch_size: examples of a global batch.
        divides: a multiple of the number of examples per row: the examples of a micro-batch on one
            device.
        length: tokens that a row should hold; 0 leaves one example in each.
    """
    fitting = [
        k
        for k in range(2, divides + 1)
        if divides % k == 0 and all(fits(s.examples, k, length) for s in streams.values())
    ]
    if not fitting:
        return dict(streams)
    together = max(fitting)
    return {
        name: replace(
            stream,
            label_buckets=stream.label_buckets[-1:],  # costs nothing, and saves compilations
            packing=make_packing(stream.examples, together, batch_size),
        )
        for name, stream in streams.items()
    }


def batches_of(
    streams: Mapping[str, Stream],
    main: str,
    seed: int,
    batch_size: int,
    here: np.ndarray | None = None,
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """`step -> {stream: batch}`: `main` is iterated epoch by epoch, other streams are sampled.

    `idk` and `alternate` follow `main` row by row; where one has several rows for each, the steps
    use them in turn. Indices and shape are those of the global batch, of which only the rows `here`
    (`sharding.rows_here`; None: all) are built. Examples that share rows are ordered so that the
    rows of a batch have similar lengths.
    """

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        rows = {}
        for name, stream in streams.items():
            if name == main or name in FOLLOWERS:
                leader = streams[main]
                count = len(leader.examples)
                index = training_indices(seed, main, step, batch_size, count)
                index = index[leader.order(index)]
                turns = len(stream.examples) // count
                rows[name] = index * turns + step % turns
            else:
                index = paired_indices(seed, name, step, batch_size, len(stream.examples))
                rows[name] = index[stream.order(index)]
        # One shape for all streams: few combinations to compile.
        shapes = [streams[name].shape(index) for name, index in rows.items()]
        shape = tuple(map(max, *shapes)) if len(shapes) > 1 else shapes[0]
        mine = {name: index if here is None else index[here] for name, index in rows.items()}
        return {name: streams[name].batch(index, shape) for name, index in mine.items()}

    return batches
