"""Safetensors files read in parts: a header gives the position of each tensor in the file.

Nothing is mapped into memory and no tensor is read whole unless it is asked for, so a process that
needs a slice of the rows reads those rows alone. Files may be in a bucket.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxlib_unlearn.reading import parse_json

KINDS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
LARGEST_HEADER = 100_000_000  # as in the reference implementation
MOST_DIMENSIONS = 8


def read_header(path: Any) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name to (kind, shape, offset in the file) of every tensor of a file.

    Args:
        path: a local path, or a bucket path of `etils.epath`.

    Returns:
        The table, in file order.

    Raises:
        ValueError: the file is truncated or damaged.
        OSError: it cannot be read.
    """
    size = int(getattr(path.stat(), "st_size", None) or getattr(path.stat(), "length", 0))
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("the header ends before it should")
        header = parse_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is no table")
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, last = map(_whole, entry["data_offsets"])
            kind, shape = entry["dtype"], tuple(map(_whole, entry["shape"]))
            if not isinstance(kind, str) or len(shape) > MOST_DIMENSIONS or len(entry) > 3:
                raise TypeError
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the entry of {name} is no entry") from error
        if min(first, *shape, 0) < 0 or last < first:
            raise ValueError(f"{name} has a negative size")
        if kind in KINDS and last - first != math.prod(shape) * KINDS[kind].itemsize:
            raise ValueError(f"{name} has {last - first} bytes, its shape {shape} needs others")
        found.append((first, last, name, kind, shape))
    end = 0
    for first, last, name, _, _ in sorted(found):
        if first != end:
            raise ValueError(f"{name} does not follow the tensor before it")
        end = last
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, the header tells of {8 + length + end}")
    return {
        name: (kind, shape, 8 + length + first) for first, _, name, kind, shape in sorted(found)
    }


def read_rows(
    path: Any, kind: str, shape: tuple[int, ...], offset: int, first: int, last: int
) -> np.ndarray:
    """Rows of a tensor; nothing else of it is read.

    Args:
        path: the file.
        kind: storage type, one of `KINDS`.
        shape: the shape of the whole tensor, one axis at least.
        offset: the byte of the file at which it starts.
        first: the first row.
        last: one past the last row.

    Returns:
        `(last - first, *shape[1:])`, in the storage type.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    dtype = KINDS[kind]
    row = math.prod(shape[1:]) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(offset + first * row)
        data = file.read((last - first) * row)
    if len(data) != (last - first) * row:
        raise OSError(f"{path}: ends before the tensor does")
    return np.frombuffer(data, dtype).reshape(last - first, *shape[1:])


def _whole(value: Any) -> int:
    """A whole number; floats, strings and booleans are not."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value
