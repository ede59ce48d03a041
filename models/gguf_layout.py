"""The layout of a GGUF file, checked from end to end before anything believes it.

The reader of the package `gguf` follows every count and length that a header claims: a damaged one
makes it loop for ever, or map a tensor over its neighbour. Here each is held against the bytes that
are there, and the tensors must lie one behind the other up to the end of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

VERSIONS = (2, 3)
STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7
# Value type -> bytes of one.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, BOOL: 1, 10: 8, 11: 8, 12: 8}
LONGEST_NAME = 65535
# The reader makes an object of each: a list of 10 ** 9 bytes would never end.
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 2**16, 2**18, 2**22
MOST_DIMENSIONS = 4
ALIGNMENTS = [2**n for n in range(17)]


class Place(NamedTuple):
    """Where a tensor lies: first byte behind the header, and how many."""

    name: str
    offset: int
    size: int


class _Header:
    """A cursor through the header; every step stays inside the file."""

    def __init__(self, data: Any):
        self.data, self.size, self.at = data, len(data), 0
        self.items = 0

    def take(self, count: int, what: str) -> int:
        """Where the next `count` bytes start."""
        if count > self.size - self.at:
            raise ValueError(f"{what} at byte {self.at} reaches behind the end of the file")
        start, self.at = self.at, self.at + count
        return start

    def number(self, form: str, what: str) -> int:
        start = self.take(struct.calcsize("<" + form), what)
        return struct.unpack_from("<" + form, self.data, start)[0]

    def text(self, what: str, longest: int | None = None) -> str:
        size = self.number("Q", what)
        if longest is not None and size > longest:
            raise ValueError(f"{what} at byte {self.at} has {size} bytes")
        start = self.take(size, what)
        return self.data[start : start + size].decode("utf-8")

    def skip(self, kind: int, what: str) -> int | None:
        """Step over a value; the value of a 32-bit unsigned integer."""
        if kind == STRING:
            self.take(self.number("Q", what), what)
        elif kind == ARRAY:
            inner, count = self.number("I", what), self.number("Q", what)
            self.items += count
            if self.items > MOST_ITEMS:
                raise ValueError(f"{what} claims {count} items")
            if inner == STRING:
                for _ in range(count):
                    self.take(self.number("Q", what), what)
            elif inner in SIZES:
                self.take(count * SIZES[inner], what)
            else:
                raise ValueError(f"{what} is a list of values of type {inner}")
        elif kind in SIZES:
            start = self.take(SIZES[kind], what)
            if kind == BOOL and self.data[start] > 1:
                raise ValueError(f"{what} is neither true nor false")
            if kind == UINT32:
                return struct.unpack_from("<I", self.data, start)[0]
        else:
            raise ValueError(f"{what} has the unknown type {kind}")
        return None


def check(path: Path) -> list[Place]:
    """Hold the header of a GGUF file against its bytes.

    Args:
        path: the file.

    Returns:
        Where its tensors lie, in that order.

    Raises:
        ValueError: a count, length or type that cannot be, a name twice, or tensors that overlap,
            leave gaps or do not end where the file does.
        OSError: it cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _check(_Header(data))


def _check(header: _Header) -> list[Place]:
    start = header.take(4, "the magic number")
    if header.data[start : start + 4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = header.number("I", "the version")
    if version not in VERSIONS:
        raise ValueError(f"version {version} (or big-endian); versions 2 and 3 are read")
    tensors, keys = header.number("Q", "the counts"), header.number("Q", "the counts")
    # A key takes 13 bytes at least, a tensor 33.
    room = header.size - header.at
    if 13 * keys + 33 * tensors > room or keys > MOST_KEYS or tensors > MOST_TENSORS:
        raise ValueError(f"it claims {keys} keys and {tensors} tensors")
    alignment = 32
    seen: set[str] = set()
    for _ in range(keys):
        name = _new(header.text("a key", LONGEST_NAME), seen)
        kind = header.number("I", name)
        value = header.skip(kind, name)
        if name == "general.alignment":
            if value is None or value not in ALIGNMENTS:
                raise ValueError(f"the alignment {value} is no power of two")
            alignment = value
    places = [_tensor(header, seen) for _ in range(tensors)]
    return _contiguous(places, -(-header.at // alignment) * alignment, alignment, header.size)


def _new(name: str, seen: set[str]) -> str:
    if name in seen:
        raise ValueError(f"{name} stands twice in it")
    seen.add(name)
    return name


def _tensor(header: _Header, seen: set[str]) -> Place:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = _new(header.text("the name of a tensor", LONGEST_NAME), seen)
    count = header.number("I", name)
    if not 1 <= count <= MOST_DIMENSIONS:
        raise ValueError(f"{name} has {count} dimensions")
    shape = [header.number("Q", name) for _ in range(count)]
    kind = GGMLQuantizationType(header.number("I", name))
    block, size = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[0] % block or math.prod(shape) // block * size > header.size:
        raise ValueError(f"{name} has the shape {shape[::-1]} in {kind.name}, which cannot be")
    return Place(name, header.number("Q", name), math.prod(shape) // block * size)


def _contiguous(places: list[Place], start: int, alignment: int, size: int) -> list[Place]:
    places = sorted(places, key=lambda place: place.offset)
    end = padded = 0
    for place in places:
        if place.offset != padded:
            raise ValueError(
                f"{place.name} starts at byte {place.offset}, the tensor before it ends at {padded}"
            )
        end = place.offset + place.size
        padded = -(-end // alignment) * alignment
    # Some writers fill up behind the last tensor too.
    if places and size not in (start + end, start + padded):
        raise ValueError(f"it has {size} bytes, its tensors end at {start + end}")
    return places
