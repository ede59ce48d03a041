"""The header of a GGUF file, with every count and length checked against the file's size.

The reader of the package `gguf` follows what a header claims: a damaged one makes it loop forever,
or map a tensor over its neighbour; and it takes 20 us for each item of a list, 3 s for a vocabulary
of 49152. Here the tensors must follow one another up to the end of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
# Value type -> NumPy's name for it.
KINDS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "?"}
KINDS |= {10: "<u8", 11: "<i8", 12: "<f8"}
LONGEST_NAME = 65535
# Each becomes a Python object: the largest vocabularies have a million tokens and merges.
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 2**16, 2**18, 2**22
MOST_DIMENSIONS = 4
ALIGNMENTS = [2**n for n in range(17)]


class Tensor(NamedTuple):
    """A tensor of a file, in NumPy's order of axes: rows run along the last one.

    Args:
        name: the name in the file.
        shape: the axes in NumPy's order.
        kind: storage type, a `gguf.GGMLQuantizationType`.
        offset: the byte of the file at which it starts.
        size: the number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int


class _Header:
    """A cursor through the header; every step stays inside the file."""

    def __init__(self, data: Any):
        self.data, self.size, self.at = data, len(data), 0
        self.items = 0

    def take(self, count: int, what: str) -> int:
        """The position of the next `count` bytes."""
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

    def value(self, kind: int, what: str) -> Any:
        """A value of the metadata."""
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            return self.values(kind, 1, what)[0]
        inner, count = self.number("I", what), self.number("Q", what)
        self.items += count
        if self.items > MOST_ITEMS:
            raise ValueError(f"{what} claims {count} items")
        if inner == STRING:
            return [self.text(what) for _ in range(count)]
        return self.values(inner, count, what)

    def values(self, kind: int, count: int, what: str) -> list[Any]:
        """Consecutive numbers or booleans."""
        if kind not in KINDS:
            raise ValueError(f"{what} has values of the unknown type {kind}")
        dtype = np.dtype(KINDS[kind])
        start = self.take(count * dtype.itemsize, what)
        raw = self.data[start : self.at]
        if kind == BOOL and any(byte > 1 for byte in raw):
            raise ValueError(f"{what} is neither true nor false")
        return np.frombuffer(raw, dtype).tolist()


def read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """The metadata of a GGUF file, and where its tensors are.

    Args:
        path: the file.

    Returns:
        Values by key, and the tensors in file order.

    Raises:
        ValueError: an impossible count, length or type, a duplicate name, or tensors that overlap,
            leave gaps or do not end where the file does.
        OSError: it cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(_Header(data))


def read_bytes(path: Path, tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, `(*shape[:-1], bytes of a row)`; nothing else is read."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.size)
    if len(data) != tensor.size:
        raise ValueError(f"the file ends before {tensor.name} does")
    return np.frombuffer(data, np.uint8).reshape(*tensor.shape[:-1], -1)


def _read(header: _Header) -> tuple[dict[str, Any], list[Tensor]]:
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
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = header.text("a key", LONGEST_NAME)
        if name in metadata:
            raise ValueError(f"{name} stands twice in it")
        metadata[name] = header.value(header.number("I", name), name)
    alignment = metadata.get("general.alignment", 32)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"the alignment {alignment} is no power of two")
    seen: set[str] = set()
    found = [_tensor(header, seen) for _ in range(tensors)]
    start = -(-header.at // alignment) * alignment
    return metadata, _contiguous(found, start, alignment, header.size)


def _tensor(header: _Header, seen: set[str]) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = header.text("the name of a tensor", LONGEST_NAME)
    if name in seen:
        raise ValueError(f"{name} stands twice in it")
    seen.add(name)
    count = header.number("I", name)
    if not 1 <= count <= MOST_DIMENSIONS:
        raise ValueError(f"{name} has {count} dimensions")
    shape = [header.number("Q", name) for _ in range(count)]
    kind = GGMLQuantizationType(header.number("I", name))
    block, size = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[0] % block or math.prod(shape) // block * size > header.size:
        raise ValueError(f"{name} has the shape {shape[::-1]} in {kind.name}, which cannot be")
    offset = header.number("Q", name)
    return Tensor(name, tuple(shape[::-1]), kind, offset, math.prod(shape) // block * size)


def _contiguous(tensors: list[Tensor], start: int, alignment: int, size: int) -> list[Tensor]:
    """The tensors in order, with offsets from the file's start, when they fill it."""
    tensors = sorted(tensors, key=lambda tensor: tensor.offset)
    end = padded = 0
    for tensor in tensors:
        if tensor.offset != padded:
            raise ValueError(
                f"{tensor.name} starts at byte {tensor.offset}, the tensor before it ends at "
                f"{padded}"
            )
        end = tensor.offset + tensor.size
        padded = -(-end // alignment) * alignment
    # Some writers pad after the last tensor too.
    if tensors and size not in (start + end, start + padded):
        raise ValueError(f"it has {size} bytes, its tensors end at {start + end}")
    return [tensor._replace(offset=start + tensor.offset) for tensor in tensors]
