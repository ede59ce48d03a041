"""Streams of examples, and the batches of several streams, step by step.

A batch is a pure function of (seed, stream, step), so resuming needs nothing but the step.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from train.data.batches import (
    batch_shape,
    collate,
    make_buckets,
    paired_indices,
    shuffled,
    training_indices,
)
from train.data.examples import Example
from train.data.packing import SHAPES, Packing, balanced, collate_packed, fits, make_packing
from train.data.stream import Order, Packable, Stream


@dataclass(frozen=True)
class Examples:
    """A stream of examples and, per example, the cached reference columns.

    Args:
        examples: tokenised rows.
        pad_id: token in padded slots.
        length_buckets: padded lengths.
        label_buckets: padded numbers of labels.
        references: column name -> one array per example, first axis its labels.
        packing: the way examples share rows of tokens; None: each has its own.
        every_slot: whether references are stored for every slot of a padded row, not per label.
        follows: the name of the stream whose rows these belong to, or None.
        sized_by: the examples whose sizes determine the padding, so that streams of similar
            examples share compiled steps; None: its own.
        columns: further columns of a batch: name -> a number for each example.
    """

    examples: Sequence[Example]
    pad_id: int
    length_buckets: tuple[int, ...]
    label_buckets: tuple[int, ...]
    references: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    packing: Packing | None = None
    every_slot: bool = False
    follows: str | None = None
    sized_by: Sequence[Example] | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def identity(self) -> str:
        """sha256 of the examples: their lengths, the starts of their answers, and their tokens."""
        sizes = np.array([[len(e.tokens), e.num_prompt] for e in self.examples], "<i8")
        found = hashlib.sha256(sizes.tobytes())
        for example in self.examples:
            found.update(np.asarray(example.tokens, "<i4").tobytes())
        for name, values in sorted(self.columns.items()):
            found.update(name.encode() + np.asarray(values, "<i4").tobytes())
        return found.hexdigest()

    @property
    def longest(self) -> int:
        """Positions of the longest example."""
        return max(len(example.tokens) for example in self.examples)

    def epoch_order(self, seed: int, name: str, epoch: int) -> np.ndarray:
        """All rows, shuffled."""
        return shuffled(seed, name, epoch, len(self))

    def fits(self, together: int, length: int) -> bool:
        """Whether rows of `together` examples have at most `length` tokens on average."""
        return fits(self.sized_by or self.examples, together, length)

    def packed(self, together: int, batch_size: int, shapes: int = SHAPES) -> Examples:
        """The stream with `together` examples in each row of tokens."""
        return replace(
            self,
            label_buckets=self.label_buckets[-1:],  # costs nothing, and saves compilations
            packing=make_packing(self.sized_by or self.examples, together, batch_size, shapes),
        )

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """These rows, ordered so that the rows of tokens that they share are filled evenly."""
        if self.packing is None:
            return rows
        sizes = [len(self.examples[i].tokens) for i in rows]
        return rows[balanced(sizes, self.packing.together)]

    def shape(self, rows: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The padded sizes of a batch of these rows: tokens, labels; and labels of packed rows."""
        chosen = [self.examples[i] for i in rows]
        length, width = batch_shape(chosen, self.length_buckets, self.label_buckets)
        if self.packing is None:
            return length, width
        length, slots = self.packing.shape(chosen)
        return length, width, slots

    def batch(
        self, rows: Sequence[int] | np.ndarray, shape: tuple[int, ...] | None = None, step: int = 0
    ) -> dict[str, np.ndarray]:
        """The padded batch of these rows, the same at every step."""
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
        for column, values in self.columns.items():
            batch[column] = values[np.asarray(rows, int)].astype(np.int32)
        return batch


def make_stream(
    examples: Sequence[Example],
    pad_id: int,
    buckets: int = 2,
    batch_size: int = 1,
    follows: str | None = None,
    sized_by: Sequence[Example] | None = None,
) -> Examples:
    """A stream with at most `buckets` padded lengths (each pair of lengths is a compilation).

    The lengths are quantiles of the longest of `batch_size` examples: its quantile q is the
    quantile `q^(1/batch_size)` of one example.
    """

    def marks(sizes: list[int]) -> tuple[int, ...]:
        ordered = sorted(sizes)
        shares = [((i + 1) / buckets) ** (1 / batch_size) for i in range(buckets)]
        return make_buckets([ordered[math.ceil(q * len(ordered)) - 1] for q in shares], buckets)

    measured = sized_by or examples
    lengths = marks([len(e.tokens) for e in measured])
    labels = marks([len(e.tokens) - e.num_prompt for e in measured])
    return Examples(examples, pad_id, lengths, labels, follows=follows, sized_by=sized_by)


def pack_streams(
    streams: Mapping[str, Stream],
    batch_size: int,
    divides: int,
    length: int,
    shapes: int = SHAPES,
) -> dict[str, Stream]:
    """The streams with as many examples per row as fill about `length` tokens.

    Unpacked short rows leave slots empty (the longest of a batch sets their length), and each
    recomputes the common prefix of all prompts; packed rows do neither. The losses are the same.
    One forward pass may serve all streams: all of them are packed, or none.

    Args:
        streams: the streams of one stage, by name.
        batch_size: the number of examples of a global batch.
        divides: a multiple of the number of examples per row: the number of examples of a
            micro-batch on one device.
        length: the number of tokens that a row should hold; 0 leaves one example in each.
        shapes: the largest number of padded lengths of a stream, each of which is compiled.
    """
    able = {name: stream for name, stream in streams.items() if isinstance(stream, Packable)}
    fitting = [
        k
        for k in range(2, divides + 1)
        if divides % k == 0 and all(stream.fits(k, length) for stream in able.values())
    ]
    if not fitting or len(able) < len(streams):
        return dict(streams)
    return {name: stream.packed(max(fitting), batch_size, shapes) for name, stream in able.items()}


def batches_of(
    streams: Mapping[str, Stream],
    main: str,
    seed: int,
    batch_size: int,
    here: np.ndarray | None = None,
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """`step -> {stream: batch}`: `main` is iterated epoch by epoch, other streams are sampled.

    A stream that follows another goes with it row by row; where it has several rows for each, the
    steps use them in turn. Indices and shape are those of the global batch, of which only the rows
    `here` (`sharding.rows_here`; None: all) are built. Examples that share rows are ordered so that
    the rows of a batch have similar lengths.

    Raises:
        ValueError: a stream follows none of the others, or has not equally many rows for each.
    """
    turns = _turns(streams, main)

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch: int) -> Order:
        return streams[main].epoch_order(seed, main, epoch)

    def drawn(name: str, step: int) -> np.ndarray:
        stream = streams[name]
        if name == main:
            index = training_indices(order, step, batch_size, len(stream))
        else:
            index = paired_indices(seed, name, step, batch_size, len(stream))
        return stream.arranged(index) if isinstance(stream, Packable) else index

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        rows = {name: drawn(name, step) for name in streams if name not in turns}
        for name, (leader, each) in turns.items():
            rows[name] = rows[leader] * each + step % each
        rows = {name: rows[name] for name in streams}
        shapes = _common({name: streams[name].shape(index) for name, index in rows.items()})
        mine = {name: index if here is None else index[here] for name, index in rows.items()}
        return {
            name: streams[name].batch(index, shapes[name], step) for name, index in mine.items()
        }

    return batches


def _turns(streams: Mapping[str, Stream], main: str) -> dict[str, tuple[str, int]]:
    """The streams that follow another: its name, and the number of rows for each of its rows."""
    leaders = {
        name: stream.follows
        for name, stream in streams.items()
        if name != main and stream.follows is not None
    }
    found = {}
    for name, leader in leaders.items():
        if leader not in streams or leader in leaders:
            able = ", ".join(other for other in streams if other not in leaders)
            raise ValueError(f"stream {name} follows {leader}, but can follow only {able}")
        each, rest = divmod(len(streams[name]), len(streams[leader]))
        if rest or not each:
            raise ValueError(
                f"stream {name} follows {leader}, but its {len(streams[name])} rows are not a "
                f"multiple of the {len(streams[leader])} there"
            )
        found[name] = (leader, each)
    return found


def _common(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """One shape for all streams with equally many sizes: few combinations to compile."""
    largest: dict[int, tuple[int, ...]] = {}
    for shape in shapes.values():
        known = largest.get(len(shape), shape)
        largest[len(shape)] = tuple(max(pair) for pair in zip(shape, known, strict=True))
    return {name: largest[len(shape)] for name, shape in shapes.items()}
