"""Packing of short examples into shared rows: the assignment, padded lengths, and the batch.

The common prefix of the prompts in a row is computed once (`examples.pack`), and its labels are
stored side by side: neither tokens nor labels are padded to the longest example of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.batches import (
    Batch,
    bucket_length,
    empty_batch,
    item_size,
    make_buckets,
    shuffled,
    training_indices,
)
from train.data.examples import Example, Group, pack, packed_length, shared_prefix

SAMPLE = 2048  # the number of examples in the random batches that padded lengths are fitted to
SHAPES = 3  # the largest number of padded lengths
WORTH = 50  # the number of steps that pay for the compilation of one more length


class Packing(NamedTuple):
    """The assignment of a stream's examples to shared rows.

    Args:
        together: the number of consecutive examples in a row.
        lengths: the padded lengths of rows, ascending.
        labels: the padded numbers of labels of rows, ascending.
    """

    together: int
    lengths: tuple[int, ...]
    labels: tuple[int, ...]

    def rows(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """The examples by row."""
        starts = range(0, len(examples), self.together)
        return [examples[i : i + self.together] for i in starts]

    def shape(self, examples: Sequence[Example]) -> tuple[int, int]:
        """The padded `(length, labels)` of the rows of a global batch."""
        rows = self.rows(examples)
        return (
            bucket_length(max(map(packed_length, rows)), self.lengths),
            bucket_length(max(map(num_labels, rows)), self.labels),
        )


def num_labels(examples: Sequence[Example]) -> int:
    """Labels of all examples."""
    return sum(item_size(example)[1] for example in examples)


def balanced(lengths: Sequence[int], together: int) -> np.ndarray:
    """An order in which groups of `together` consecutive items have similar total lengths.

    The longest ones are dealt out first, then the next ones in reverse order, and so on.

    Example:
        >>> balanced([1, 4, 2, 3], together=2).tolist()
        [1, 0, 3, 2]
    """
    dealt = np.argsort(-np.asarray(lengths), kind="stable").reshape(together, -1)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.reshape(-1)


def fits(examples: Sequence[Example], together: int, length: int) -> bool:
    """Whether rows of `together` examples have at most `length` tokens on average."""
    shared = shared_prefix(examples)
    own = sum(len(e.tokens) - 1 - shared for e in examples) / len(examples)
    return shared + together * own <= length


def sampled(lengths: Sequence[int], together: int, batch_size: int) -> Iterator[np.ndarray]:
    """Random batches as training sees them: indices of items of these lengths, k in a row.

    It always yields the same arrays, `(batch_size / together, together)`.
    """
    count = len(lengths)
    order = functools.cache(lambda epoch: shuffled(0, "packing", epoch, count))
    for step in range(max(16, SAMPLE // batch_size)):
        index = training_indices(order, step, batch_size, count)
        dealt = balanced([lengths[i] for i in index], together)
        yield index[dealt].reshape(-1, together)


def shapes_within(steps: int) -> int:
    """The number of padded lengths whose compilations so many steps pay for.

    Example:
        >>> [shapes_within(steps) for steps in (10, 100, 1000)]
        [1, 2, 3]
    """
    return max(1, min(SHAPES, steps // WORTH))


def make_packing(
    examples: Sequence[Example], together: int, batch_size: int, buckets: int = SHAPES
) -> Packing:
    """Padded sizes for rows of `together` examples (each pair of sizes is a compilation).

    They are the sizes with the least padding in random batches, and one that holds any batch.

    Args:
        examples: the examples of a stream.
        together: the number of examples in a row.
        batch_size: the number of examples of a global batch.
        buckets: the number of sizes, besides the one that holds any batch.

    Returns:
        The packing.
    """
    lengths, labels = [], []
    for dealt in sampled([len(e.tokens) for e in examples], together, batch_size):
        rows = [[examples[i] for i in row] for row in dealt]
        lengths.append(max(map(packed_length, rows)))
        labels.append(max(map(num_labels, rows)))
    shared = shared_prefix(examples)

    def sizes(found: list[int], most: int) -> tuple[int, ...]:
        return tuple(sorted({*make_buckets(found, buckets), *make_buckets([most], 1)}))

    own = max(len(e.tokens) for e in examples) - 1 - shared
    widest = max(num_labels([e]) for e in examples)
    return Packing(
        together, sizes(lengths, shared + together * own), sizes(labels, together * widest)
    )


def collate_packed(
    examples: Sequence[Any],
    row_ids: Sequence[int],
    together: int,
    shape: tuple[int, int],
    width: int,
    pad_id: int = 0,
    pack: Callable[[Sequence[Any]], Group] = pack,
) -> Batch:
    """A batch as `collate` makes it, with k examples in every row of tokens.

    Row r holds examples k r to k r + k - 1. Label columns have a row for every example, and the
    batch records where the labels are, so that nothing is computed for the padding between them.

    Args:
        examples: the examples; k divides their number.
        row_ids: row number of each example, for random keys and logs.
        together: k, the number of examples in a row.
        shape: the padded numbers of tokens T and labels N of a row.
        width: W, the padded number of labels of an example.
        pad_id: token id in padded slots (never attended to).
        pack: the function that makes a row of tokens from k examples.

    Returns:
        `tokens`, `positions`, `segment_ids` (B / k, T) int32, `row_id` (B,) int32; `label_index`,
        `targets` (B, W) int32, `target_mask` (B, W) float32; `label_source` (B / k, N) int32, the
        positions of a row's labels among its k W, and `label_place` (B, W) int32, the inverse.

    Raises:
        ValueError: rows that do not fit, or examples that do not fill rows.
    """
    (length, slots), size = shape, len(examples)
    if size % together or len(row_ids) != size:
        raise ValueError(
            f"{size} examples and {len(row_ids)} row ids do not make rows of {together}"
        )
    rows = size // together
    batch = empty_batch(rows, size, length, width, pad_id)
    batch["row_id"][:] = row_ids
    batch["label_source"] = np.zeros((rows, slots), np.int32)
    batch["label_place"] = np.zeros((size, width), np.int32)
    for row in range(rows):
        mine = slice(row * together, (row + 1) * together)
        group = pack(examples[mine])
        tokens, labels = len(group.tokens), len(group.targets)
        owner = np.array(group.answer)
        counts = np.bincount(owner, minlength=together)
        if tokens > length or labels > slots or max(counts) > width:
            raise ValueError(
                f"rows {list(row_ids[mine])}: {tokens} tokens and {labels} labels, at most "
                f"{max(counts)} of one, do not fit {length}, {slots} and {width}"
            )
        for name in ("tokens", "positions", "segment_ids"):
            batch[name][row, :tokens] = getattr(group, name)
        place = np.arange(labels)
        within = place - np.repeat(np.cumsum(counts) - counts, counts)  # number in its example
        here = (row * together + owner, within)
        batch["label_index"][here] = group.label_index
        batch["targets"][here] = group.targets
        batch["target_mask"][here] = 1.0
        batch["label_place"][here] = place
        batch["label_source"][row, :labels] = owner * width + within
    return batch
