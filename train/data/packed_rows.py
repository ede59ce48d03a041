"""Whole examples side by side in rows of one length, as a stream for supervised fine-tuning.

Examples of a row do not see each other: positions restart, attention stays inside an example, and
the first token of one is not predicted from the one before. Losses and gradients are those of the
examples alone; only padding is saved. (`packing` also shares the prompts of many short examples.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from train.data.batches import make_buckets, shuffled
from train.data.examples import Example

CHOPPED = 1000  # examples that are joined at once, as TRL 0.16 does


class Piece(NamedTuple):
    """Tokens that see each other, (n,) int32; the first `num_prompt` are no labels.

    The last token is a label only, so a piece takes n - 1 slots.
    """

    tokens: np.ndarray
    num_prompt: int

    @property
    def slots(self) -> int:
        """Slots that it takes in a row."""
        return len(self.tokens) - 1

    @property
    def labels(self) -> int:
        """Number of its labels."""
        return len(self.tokens) - max(self.num_prompt, 1)


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Items in rows: from the largest on, each goes into the first row that has room for it.

    Args:
        sizes: the sizes of the items, at most `room` each.
        room: the size of a row.

    Returns:
        The items of every row.

    Raises:
        ValueError: an item that fits no row.

    Example:
        >>> first_fit([3, 5, 2, 4], 7)
        [[1, 2], [3, 0]]
    """
    if sizes and max(sizes) > room:
        raise ValueError(f"an item of size {max(sizes)} does not fit rows of {room}")
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    # A tree of the most room that any row below a node has; the rows are its leaves.
    most = [room] * (2 * leaves)
    rows: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        node = 1
        while node < leaves:
            node = 2 * node + (most[2 * node] < sizes[item])
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(item)
        most[node] -= sizes[item]
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return rows


def _fitted(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    return [[pieces[i] for i in row] for row in first_fit([p.slots for p in pieces], length)]


def _chopped(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    """One long text of many examples, cut every `length` tokens.

    The trainer of EPiC's artefacts (TRL 0.16): examples are cut in two, attention crosses them,
    positions do not restart, and every token but the first of a row is a label.
    """
    rows = []
    for start in range(0, len(pieces), CHOPPED):
        text = np.concatenate([piece.tokens for piece in pieces[start : start + CHOPPED]])
        rows += [[Piece(text[i : i + length], 0)] for i in range(0, len(text), length)]
    return [row for row in rows if row[0].slots]  # a single token predicts nothing


def _alone(pieces: Sequence[Piece], length: int) -> list[list[Piece]]:
    return [[piece] for piece in pieces]


MODES: dict[str, Callable[[Sequence[Piece], int], list[list[Piece]]]] = {
    "first-fit": _fitted,
    "chop": _chopped,
    "none": _alone,
}


def pack_rows(
    examples: Sequence[Example | Piece],
    row_tokens: int,
    mode: str = "first-fit",
    *,
    mask_prompt: bool = False,
    pad_id: int = 0,
) -> PackedRows:
    """Examples as rows of at most `row_tokens` tokens.

    Args:
        examples: examples of at most `row_tokens` slots each (`len(tokens) - 1`).
        row_tokens: the number of slots of a row.
        mode: the way of packing: `first-fit`, whole examples; `chop`, examples that are cut, as the
            trainer of EPiC's artefacts does; `none`, an example a row, padded to the longest.
        mask_prompt: whether tokens of prompts are no labels; if not, every token but the first is.
        pad_id: the token in padded slots.

    Raises:
        ValueError: an example that does not fit a row, or masked prompts where examples are cut.
    """
    if mask_prompt and mode == "chop":
        raise ValueError("rows that cut examples in two have no prompts to mask")
    pieces = [
        Piece(np.asarray(e.tokens, np.int32), e.num_prompt if mask_prompt else 0) for e in examples
    ]
    rows = MODES[mode](pieces, row_tokens)
    length = max(p.slots for p in pieces) if mode == "none" else row_tokens
    widest = max(sum(piece.labels for piece in row) for row in rows)
    return PackedRows(rows, length, min(length, *make_buckets([widest], 1, 64)), pad_id)


@dataclass(frozen=True)
class PackedRows:
    """Rows of whole examples (a `stream.Stream`); all batches have one shape.

    Args:
        rows: the pieces of every row.
        length: slots of a row, T.
        width: labels of a row, W, padded.
        pad_id: token in padded slots.
        follows: None, since it follows no other stream.
    """

    rows: Sequence[Sequence[Piece]]
    length: int
    width: int
    pad_id: int = 0
    follows: str | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Positions of the longest piece (`stream.Positioned`)."""
        return max(piece.slots for piece in self.pieces())

    @property
    def used(self) -> int:
        """Slots that hold a token."""
        return sum(piece.slots for piece in self.pieces())

    @property
    def waste(self) -> float:
        """Share of the slots that are padding."""
        return 1 - self.used / (len(self) * self.length)

    def pieces(self) -> Iterator[Piece]:
        """All pieces, row by row."""
        return (piece for row in self.rows for piece in row)

    def identity(self) -> str:
        """sha256 of the tokens of every piece, of the start of its labels, and of its row."""
        sizes = [
            [i, len(piece.tokens), piece.num_prompt]
            for i, row in enumerate(self.rows)
            for piece in row
        ]
        shape = [self.length, self.width, self.pad_id]
        found = hashlib.sha256(np.array([shape, *sizes], "<i8").tobytes())
        for piece in self.pieces():
            found.update(piece.tokens.astype("<i4").tobytes())
        return found.hexdigest()

    def epoch_order(self, seed: int, name: str, epoch: int) -> np.ndarray:
        """All rows, shuffled."""
        return shuffled(seed, name, epoch, len(self))

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """Nothing is padded to other rows."""
        return ()

    def batch(self, rows: np.ndarray, shape: tuple[int, ...], step: int) -> dict[str, np.ndarray]:
        """The rows as the decoder reads them.

        Returns:
            `tokens`, `positions`, `segment_ids` (B, T), `label_index`, `targets` (B, W), `row_id`
            (B,) int32 and `target_mask` (B, W) float32.
        """
        size = len(rows)
        batch = {
            "tokens": np.full((size, self.length), self.pad_id, np.int32),
            "positions": np.zeros((size, self.length), np.int32),
            "segment_ids": np.zeros((size, self.length), np.int32),
            "row_id": np.asarray(rows, np.int32),
            "label_index": np.zeros((size, self.width), np.int32),
            "targets": np.zeros((size, self.width), np.int32),
            "target_mask": np.zeros((size, self.width), np.float32),
        }
        for b, row in enumerate(rows):
            slot = label = 0
            for segment, piece in enumerate(self.rows[row], 1):
                end, last = slot + piece.slots, label + piece.labels
                batch["tokens"][b, slot:end] = piece.tokens[:-1]
                batch["positions"][b, slot:end] = np.arange(piece.slots)
                batch["segment_ids"][b, slot:end] = segment
                batch["label_index"][b, label:last] = np.arange(end - piece.labels, end)
                batch["targets"][b, label:last] = piece.tokens[-piece.labels :]
                batch["target_mask"][b, label:last] = 1.0
                slot, label = end, last
        return batch
