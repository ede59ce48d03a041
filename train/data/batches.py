"""Batches of fixed shape, and the choice of the rows of a step.

Two rules keep numbers the same on any number of processes: the rows of a step follow from (seed,
purpose, step) for the *global* batch, of which each process takes its slice; and the padded length
follows from the global batch alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from train.data.examples import Example, Group
from train.data.stream import Order

Batch = dict[str, np.ndarray]


def item_size(item: Example | Group) -> tuple[int, int]:
    """Number of tokens and of labels."""
    if isinstance(item, Group):
        return len(item.tokens), len(item.targets)
    return len(item.tokens), len(item.tokens) - max(item.num_prompt, 1)


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`.

    Args:
        length: tokens or labels.
        buckets: allowed lengths, ascending.

    Returns:
        One of `buckets`.

    Raises:
        ValueError: longer than the last bucket.

    Example:
        >>> bucket_length(33, (32, 64, 128))
        64
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"length {length} is above the last bucket of {tuple(buckets)}")


def make_buckets(lengths: Sequence[int], count: int = 4, multiple: int = 16) -> tuple[int, ...]:
    """The padded lengths that waste least: they minimise the sum of all padded lengths.

    Args:
        lengths: the lengths of all examples, in tokens or labels.
        count: the largest number of buckets (each is a compilation).
        multiple: the number that divides every bucket.

    Returns:
        Ascending buckets; the last holds the longest.

    Example:
        >>> make_buckets([10, 20, 30, 70], count=2)
        (32, 80)
    """
    if not len(lengths):
        raise ValueError("buckets of no lengths")
    sizes, members = np.unique(
        [-(-max(n, 1) // multiple) * multiple for n in lengths], return_counts=True
    )
    padded, below = sizes.tolist(), np.cumsum(members).tolist()
    # best[j]: the least sum for all lengths up to padded[j], the last bucket; and the buckets.
    best = [(n * size, (size,)) for n, size in zip(below, padded, strict=True)]
    for _ in range(min(count, len(padded)) - 1):  # padded[i]: the last but one
        best = [
            min(
                [best[j]]
                + [
                    (best[i][0] + (below[j] - below[i]) * size, (*best[i][1], size))
                    for i in range(j)
                ]
            )
            for j, size in enumerate(padded)
        ]
    return best[-1][1]


def batch_shape(
    items: Sequence[Example | Group], length_buckets: Sequence[int], label_buckets: Sequence[int]
) -> tuple[int, int]:
    """The padded `(length, label_length)` of a global batch: call it before slicing by process.

    Args:
        items: all examples of the global batch.
        length_buckets: allowed lengths.
        label_buckets: allowed label lengths.

    Returns:
        `(T, W)`.
    """
    sizes = [item_size(item) for item in items]
    return (
        bucket_length(max(tokens for tokens, _ in sizes), length_buckets),
        bucket_length(max(labels for _, labels in sizes), label_buckets),
    )


def empty_batch(rows: int, size: int, length: int, label_length: int, pad_id: int) -> Batch:
    """The columns of a batch that is all padding: `rows` of tokens, labels of `size` examples."""
    return {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "row_id": np.full((size,), -1, np.int32),
        "label_index": np.zeros((size, label_length), np.int32),
        "targets": np.zeros((size, label_length), np.int32),
        "target_mask": np.zeros((size, label_length), np.float32),
    }


def collate(
    examples: Sequence[Example | Group],
    row_ids: Sequence[int],
    length: int,
    label_length: int,
    *,
    batch_size: int | None = None,
    pad_id: int = 0,
) -> Batch:
    """Stack examples into one right-padded batch.

    targets[b, w] is predicted by the hidden state at slot label_index[b, w]; for a single example
    with p prompt tokens label_index[b, w] = p - 1 + w.

    Args:
        examples: all `Example`, or all `Group`.
        row_ids: row number of each example, for random keys and logs.
        length: T, the padded number of tokens.
        label_length: W, the padded number of labels.
        batch_size: B, filled up with padding rows; None: the number of examples.
        pad_id: token id in padded slots (never attended to).

    Returns:
        `tokens`, `positions`, `segment_ids` (B, T) int32, `row_id` (B,) int32 (-1 in padding rows),
        `label_index`, `targets` (B, W) int32, `target_mask` (B, W) float32; for groups also
        `answer` (B, W) int32, -1 where masked.

    Raises:
        ValueError: an example longer than `length` or `label_length`, or more of them than
            `batch_size`.
    """
    size = len(examples) if batch_size is None else batch_size
    if len(examples) > size or len(examples) != len(row_ids):
        raise ValueError(
            f"{len(examples)} examples and {len(row_ids)} row ids for a batch of {size}"
        )
    batch = empty_batch(size, size, length, label_length, pad_id)
    if examples and isinstance(examples[0], Group):
        batch["answer"] = np.full((size, label_length), -1, np.int32)
    for b, (item, row_id) in enumerate(zip(examples, row_ids, strict=True)):
        n, w = item_size(item)
        if n > length or w > label_length:
            raise ValueError(
                f"row {row_id}: {n} tokens and {w} labels do not fit {length} and {label_length}"
            )
        batch["tokens"][b, :n] = item.tokens
        batch["row_id"][b] = row_id
        batch["target_mask"][b, :w] = 1.0
        if isinstance(item, Group):
            batch["positions"][b, :n] = item.positions
            batch["segment_ids"][b, :n] = item.segment_ids
            batch["label_index"][b, :w] = item.label_index
            batch["targets"][b, :w] = item.targets
            batch["answer"][b, :w] = item.answer
        else:
            batch["positions"][b, :n] = np.arange(n)
            batch["segment_ids"][b, :n] = 1
            batch["label_index"][b, :w] = np.arange(n - w - 1, n - 1)
            batch["targets"][b, :w] = item.tokens[n - w :]
    return batch


def _joined(by_bucket: Mapping[int, list[int]], batch_tokens: int) -> dict[int, list[int]]:
    """Buckets, longest first, but those that fit into one batch together are one.

    A batch of another shape is another program, and costs more to compile than the padding does.
    """
    found: dict[int, list[int]] = {}
    for length, members in by_bucket.items():
        longest = next(reversed(found), length)
        together = found.get(longest, []) + members
        if len(together) * longest <= batch_tokens:
            found[longest] = together
        else:
            found[length] = members
    return found


def score_batches(
    items: Sequence[Example | Group],
    *,
    row_ids: Sequence[int] | None = None,
    batch_size: int | None = None,
    batch_tokens: int = 4096,
    row_multiple: int = 1,
    length_buckets: Sequence[int] | None = None,
    label_multiple: int = 16,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Cover all items once, longest first, in batches of few shapes.

    Items are sorted by length (so that a batch too large for memory fails at once) and grouped by
    length bucket, and buckets that fit into one batch together are one; a bucket has one batch
    shape, its last batch filled up with padding rows.

    Args:
        items: examples or groups.
        row_ids: the row numbers of the items; None: 0, 1, 2, ...
        batch_size: the rows of a batch; None: as many as `batch_tokens` slots hold.
        batch_tokens: the largest product of rows and length of a batch (one row at least).
        row_multiple: the number that divides the rows of a batch (the data axis of a mesh).
        length_buckets: allowed lengths; None: made from the items.
        label_multiple: the number that divides label lengths.
        pad_id: token id in padded slots.

    Yields:
        Batches as `collate` makes them.
    """
    if not items:
        return
    ids = list(range(len(items))) if row_ids is None else list(row_ids)
    sizes = [item_size(item) for item in items]
    buckets = length_buckets or make_buckets([tokens for tokens, _ in sizes])
    by_bucket: dict[int, list[int]] = {}
    for index in sorted(range(len(items)), key=lambda i: (-sizes[i][0], i)):
        by_bucket.setdefault(bucket_length(sizes[index][0], buckets), []).append(index)
    for length, members in _joined(by_bucket, batch_tokens if batch_size is None else 0).items():
        widest = max(sizes[i][1] for i in members)
        label_length = -(-max(widest, 1) // label_multiple) * label_multiple
        rows = batch_size or max(1, batch_tokens // length)
        if batch_size is None:
            # Items are spread evenly, so that the last batch is not mostly padding.
            rows = -(-len(members) // -(-len(members) // rows))
        rows = -(-rows // row_multiple) * row_multiple
        for start in range(0, len(members), rows):
            chosen = members[start : start + rows]
            yield collate(
                [items[i] for i in chosen],
                [ids[i] for i in chosen],
                length,
                label_length,
                batch_size=rows,
                pad_id=pad_id,
            )


def random_bits(seed: int, purpose: str, index: int) -> np.random.Philox:
    """Random bits that belong to (seed, purpose, index), the same on every platform and process."""
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    return np.random.Philox(np.random.SeedSequence([seed, key, index]))


def shuffled(seed: int, stream: str, epoch: int, num_rows: int) -> np.ndarray:
    """The order of one epoch of a stream that fits in memory: a permutation, (num_rows,) int64.

    Example:
        >>> sorted(shuffled(0, "forget", 0, 4).tolist())
        [0, 1, 2, 3]
    """
    # Raw bits and a stable sort: numpy never changes those, but may `Generator.permutation`.
    bits = random_bits(seed, f"epoch/{stream}", epoch).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


def training_indices(
    order: Callable[[int], Order], step: int, batch_size: int, num_rows: int
) -> np.ndarray:
    """Rows of the global batch at `step`: every row once per epoch, in a new order each time.

    i = step * batch_size + b;  index_b = order(i // num_rows)[i % num_rows].

    Args:
        order: `epoch -> order`, such as `shuffled`.
        step: the number of the step, from 0; nothing else is needed to resume.
        batch_size: rows of the global batch (a batch may reach into the next epoch).
        num_rows: rows of the stream.

    Returns:
        (batch_size,) int64.

    Example:
        >>> def order(epoch):
        ...     return shuffled(0, "forget", epoch, 6)
        >>> sorted(int(i) for s in range(2) for i in training_indices(order, s, 3, 6))
        [0, 1, 2, 3, 4, 5]
    """
    if num_rows < 1:
        raise ValueError("indices of a stream without rows")
    place = step * batch_size + np.arange(batch_size)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(place // num_rows):
        here = place // num_rows == epoch
        indices[here] = order(int(epoch))[place[here] % num_rows]
    return indices


def paired_indices(seed: int, stream: str, step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """Rows of a stream that accompanies another one: uniform with replacement at each step.

    Args:
        seed: the run's seed.
        stream: the name of the stream that the draw is for, such as `"retain"`.
        step: the number of the step, from 0.
        batch_size: rows of the global batch.
        num_rows: rows of the stream.

    Returns:
        (batch_size,) int64, the same on every process.

    Pairing: OpenUnlearning (arXiv 2506.12618), data/unlearn.py, drawn for the global batch.
    """
    if num_rows < 1:
        raise ValueError("indices of a stream without rows")
    draws = random_bits(seed, f"paired/{stream}", step).random_raw(batch_size)
    return (draws % np.uint64(num_rows)).astype(np.int64)
