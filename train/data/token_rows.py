"""A tokenised corpus as a stream of rows, in which documents do not see each other.

Row i holds the tokens from `i * context` on. A document that continues in the next row begins anew
there: attention and positions cross neither documents nor rows. A slot predicts the next token of
its document, so that each token is predicted once, in whatever row it lies, except the first token
of a document, which never is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data.permutation import KeyedOrder, keyed_order
from train.data.token_file import Tokens
from train.runtime.stages import digest


@dataclass(frozen=True)
class TokenRows:
    """Rows of `context` tokens of a corpus (a `stream.Stream`); the last one may be padded.

    Args:
        part: the tokens.
        context: the number of tokens of a row.
        follows: None, since it follows no other stream.
    """

    part: Tokens
    context: int
    follows: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row (`stream.Positioned`)."""
        return self.context

    def __len__(self) -> int:
        """Number of rows."""
        return -(-len(self.part.tokens) // self.context)

    def identity(self) -> str:
        """The digest of tokens, documents and context."""
        return digest([self.part.sha, self.context])

    def epoch_order(self, seed: int, name: str, epoch: int) -> KeyedOrder:
        """A keyed permutation: nothing is sorted."""
        return keyed_order(seed, name, epoch, len(self))

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """Nothing is padded to other rows."""
        return ()

    def batch(self, rows: np.ndarray, shape: tuple[int, ...], step: int) -> dict[str, np.ndarray]:
        """The rows as the decoder reads them; `target_mask` marks the labels.

        Returns:
            `tokens`, `positions`, `segment_ids`, `targets` (B, T) int32, `target_mask` (B, T)
            float32, `row_id` (B,) int32.
        """
        rows, length = np.asarray(rows), self.context
        read = np.zeros((len(rows), length + 1), np.int32)
        there = np.zeros(read.shape, bool)
        begins = np.zeros(read.shape, bool)
        for i, row in enumerate(rows):
            first = int(row) * length
            found = self.part.tokens[first : first + length + 1]
            read[i, : len(found)] = found
            there[i, : len(found)] = True
            low, high = np.searchsorted(self.part.starts, (first, first + len(found)))
            begins[i, self.part.starts[low:high] - first] = True
        begins[:, 0] = True  # also where a document continues
        here = there[:, :length]
        places = np.arange(length, dtype=np.int32)
        began = np.maximum.accumulate(np.where(begins[:, :length], places, 0), 1)
        return {
            "tokens": np.where(here, read[:, :length], 0),
            "positions": np.where(here, places - began, 0).astype(np.int32),
            "segment_ids": np.where(here, np.cumsum(begins[:, :length], 1), 0).astype(np.int32),
            "targets": read[:, 1:],
            "target_mask": (there[:, 1:] & ~begins[:, 1:]).astype(np.float32),
            "row_id": rows.astype(np.int32),
        }
