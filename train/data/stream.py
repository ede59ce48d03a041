"""The protocol of a stream: rows of any kind that training reads in batches.

The trainer knows streams by this protocol alone. Examples of questions and answers are one kind
(`train.data.streams.Examples`); arrays of any shape may be another, in a file of its own.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


class Order(Protocol):
    """The rows of one epoch by place: `order[places]` are the rows at these places.

    An array is an order. A source too large to be sorted gives `permutation.KeyedOrder`, which
    computes the requested rows and stores none.
    """

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray:
        """The rows at `places`, of the same shape."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Rows to train on, numbered from 0."""

    @property
    def follows(self) -> str | None:
        """The name of the stream whose rows these belong to, k to each in its order; or None."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def identity(self) -> str:
        """sha256 of all inputs of its batches, or of the manifest of a large source."""
        ...

    def epoch_order(self, seed: int, name: str, epoch: int) -> Order:
        """A permutation of the rows that belongs to (seed, name, epoch); asked once an epoch."""
        ...

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """The padded sizes of a global batch of these rows; () where nothing is padded.

        Streams with equally many sizes are padded to the largest of a step.
        """
        ...

    def batch(self, rows: np.ndarray, shape: tuple[int, ...], step: int) -> dict[str, np.ndarray]:
        """The columns of these rows, part of a global batch of that shape.

        Noise that it draws belongs to row and step and does not depend on the other rows.
        """
        ...


@runtime_checkable
class Positioned(Stream, Protocol):
    """A stream of rows with positions, of which a model may have learned a limited number."""

    @property
    def longest(self) -> int:
        """Positions of its longest row."""
        ...


@runtime_checkable
class Packable(Stream, Protocol):
    """A stream whose rows are so short that several may share one row of tokens."""

    def fits(self, together: int, length: int) -> bool:
        """Whether `together` of its rows have at most `length` tokens on average."""
        ...

    def packed(self, together: int, batch_size: int, shapes: int) -> Packable:
        """The stream with `together` rows in each row of tokens, in so many shapes at most."""
        ...

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a global batch, ordered so that the rows of tokens they share fill evenly."""
        ...
