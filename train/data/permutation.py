r"""An order of any number of rows that is computed for one row at a time.

Sorting 10 million random numbers takes seconds, and an array of them 80 MB. A keyed permutation
needs neither: it computes the row at a place from the place alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from train.data.batches import random_bits

ROUNDS = 4  # each mixes both digits


def permuted(key: int, index: int | np.ndarray, count: int) -> np.ndarray:
    r"""The image of ``index`` under a permutation of ``0, ..., count - 1``.

    A Feistel network on two digits: ``i = left * n + right`` with ``n = ceil(sqrt(count))`` and
    ``m = ceil(count / n)``,

        ``left = (left + F(right)) mod m;  right = (right + F(left)) mod n``

    four times, with another hash F each time. It permutes ``m n >= count`` numbers; a number of
    ``count`` or more is permuted again until it is smaller, so that the result is a permutation.

    Args:
        key: 64 bits that choose the permutation.
        index: places, of any shape.
        count: number of rows.

    Returns:
        int64 of the shape of `index`.

    Raises:
        IndexError: a place outside ``0, ..., count - 1``.

    Example:
        >>> sorted(permuted(7, np.arange(10), 10).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]

    Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002).
    """
    places = np.asarray(index, np.int64)
    if places.size and not (places.min() >= 0 and places.max() < count):
        raise IndexError(f"a place outside the {count} rows of an epoch")
    found = places.astype(np.uint64).reshape(-1)
    outside = np.arange(found.size)
    while outside.size:
        found[outside] = _sent(key, found[outside], count)
        outside = outside[found[outside] >= count]
    return found.astype(np.int64).reshape(places.shape)


def _sent(key: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """The network, once."""
    n = math.isqrt(count - 1) + 1
    m = -(-count // n)
    left, right = numbers // np.uint64(n), numbers % np.uint64(n)
    for turn in range(0, 2 * ROUNDS, 2):
        left = (left + _hash(key, turn, right) % np.uint64(m)) % np.uint64(m)
        right = (right + _hash(key, turn + 1, left) % np.uint64(n)) % np.uint64(n)
    return left * np.uint64(n) + right


def _hash(key: int, turn: int, numbers: np.ndarray) -> np.ndarray:
    """64 bits for each number (splitmix64), different for every turn of every key."""
    x = numbers
    for constant in (key, turn):
        x = x + np.uint64((constant * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


@dataclass(frozen=True)
class KeyedOrder:
    """The order of an epoch (`stream.Order`) as a keyed permutation of `count` rows."""

    key: int
    count: int

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The rows at `places`."""
        return permuted(self.key, places, self.count)


def keyed_order(seed: int, name: str, epoch: int, count: int) -> KeyedOrder:
    """The order of an epoch of a large source, for `Stream.epoch_order`.

    Example:
        >>> order = keyed_order(0, "blocks", 0, 10_000_000)
        >>> order[np.array([9_999_999])].shape
        (1,)
    """
    return KeyedOrder(int(random_bits(seed, f"epoch/{name}", epoch).random_raw()), count)
