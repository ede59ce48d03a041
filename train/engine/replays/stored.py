"""The format of `replay.zo`: the coefficients of a zeroth-order stage, a float32 a query and step.

=========  =======================================================================================
header     a line of JSON, whose last entry is the CRC-32 of the line before it
block      of 500 steps, the last one of what is left: the coefficients of its steps (little-endian
           float32, q of them a step); sha256 of the parameters after it (32 bytes); their sketch
           (`digests.sketch`, 4 float32); the CRC-32 of all that, continued from the block before
=========  =======================================================================================

Hence 4 q bytes a step and 52 bytes a milestone. Every byte is covered, and as no two single-bit
errors change a CRC-32 alike, a flipped bit is located to the step.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError

NAME = "replay.zo"
FORMAT = "replay.zo 1"
EVERY = 500
SHA, SKETCH, CRC = 32, 16, 4
TRAILER = SHA + SKETCH + CRC
FLOATS = np.dtype("<f4")
_SEAL = ', "crc32": "'
_LONGEST = 2**24  # the longest header that is read
_POLYNOMIAL = 0xEDB88320
# The entries that a header must hold, and their types.
ENTRIES = {
    "base_sha256": str,
    "leaves": dict,
    "optimizer": dict,
    "schedule": dict,
    "steps": int,
    "queries": int,
    "seed": int,
    "generator": str,
    "jax": str,
    "platform": str,
}


def named(stage: str) -> str:
    """The name of a stage's file, where it is not the main one of its run.

    Example:
        >>> named("oracle")
        'replay-oracle.zo'
    """
    return f"replay-{stage}.zo"


class Milestone(NamedTuple):
    """The parameters after `step` steps: their sha256, and their sketch, `(4,)`."""

    step: int
    sha256: str
    sketch: np.ndarray


class Replay(NamedTuple):
    """A whole file: its header, coefficients `(steps, q)`, and milestones, the last at the end."""

    header: dict[str, Any]
    coeffs: np.ndarray
    milestones: tuple[Milestone, ...]


def header_line(header: Mapping[str, Any]) -> bytes:
    """The first line of a file, its newline included.

    Example:
        >>> header_line({"steps": 3})
        b'{"format": "replay.zo 1", "steps": 3, "crc32": "e34a874d"}\\n'
    """
    text = json.dumps({"format": FORMAT, **header})[:-1]
    return f'{text}{_SEAL}{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def milestone_bytes(sha256: str, sketch: np.ndarray) -> bytes:
    """A milestone without the CRC-32 that follows it."""
    return bytes.fromhex(sha256) + np.asarray(sketch, FLOATS).tobytes()


def continued(crc: int, data: bytes, step: int, width: int) -> tuple[int, bytes]:
    """The running CRC-32 after `data`, what follows a header up to the middle of some block.

    The CRCs that end blocks are checked, not summed: with them every sum would be the same.

    Args:
        crc: the CRC of the header line.
        data: the bytes that follow it.
        step: the number of steps in `data`, each milestone among them or at their end included.
        width: the bytes of a step.

    Returns:
        The CRC, and the bytes that `data` has too many.

    Raises:
        ValueError: a block does not match its CRC, or there is too little.
    """
    while step >= EVERY:
        size = EVERY * width + SHA + SKETCH
        crc, stored = zlib.crc32(data[:size], crc), data[size : size + CRC]
        if stored != crc.to_bytes(CRC, "little"):
            raise ValueError("a block is damaged")
        data, step = data[size + CRC :], step - EVERY
    if len(data) < step * width:
        raise ValueError("steps are missing")
    return zlib.crc32(data[: step * width], crc), data[step * width :]


def read(path: Path) -> Replay:
    """Read a file and check every byte of it.

    Raises:
        UserError: it is missing, cut or damaged, which names the place.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST)
            header = _header(path, line)
            steps, queries = header["steps"], header["queries"]
            width = FLOATS.itemsize * queries
            want = steps * width + max(1, -(-steps // EVERY)) * TRAILER
            there = path.stat().st_size - len(line)
            data = file.read(want) if there == want else b""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(
            f"{path} does not exist; give the folder of a run with a zeroth-order optimizer, or "
            f"its {NAME}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a {NAME}") from None
    if len(data) != want:
        whole = min(steps, _steps_in(there, width))
        what = f"holds {whole} of {steps} steps" if there < want else "is too long"
        raise UserError(
            f"{path} {what} ({len(line) + there} bytes, not {len(line) + want}); it was cut, "
            "or its run is not at its end: the run's own command continues it"
        )
    crc, first, blocks, milestones = zlib.crc32(line), 0, [], []
    for end in (*range(EVERY, steps, EVERY), steps):
        size = (end - first) * width
        block, data = data[: size + TRAILER], data[size + TRAILER :]
        crc, stored = zlib.crc32(block[:-CRC], crc), int.from_bytes(block[-CRC:], "little")
        if crc != stored:
            where = _where(_flipped(block[:-CRC], crc ^ stored), first, end, width)
            raise UserError(f"{path}: {where}; copy the file again from its run")
        blocks.append(np.frombuffer(block[:size], FLOATS).reshape(-1, queries))
        sketch = np.frombuffer(block[size + SHA : -CRC], FLOATS)
        milestones.append(Milestone(end, block[size : size + SHA].hex(), sketch))
        first = end
    return Replay(header, np.concatenate(blocks), tuple(milestones))


def _header(path: Path, line: bytes) -> dict[str, Any]:
    found = re.fullmatch(rb'(.*), "crc32": "([0-9a-f]{8})"\}\n', line, re.DOTALL)
    if found is None or int(found[2], 16) != zlib.crc32(found[1]):
        if line.startswith(b'{"format": "replay.zo'):
            raise UserError(
                f"{path}: its first line, the header, is damaged; copy the file again from its run"
            )
        raise UserError(f"{path} is no {NAME}, or its header is damaged; give one that a run wrote")
    header = json.loads(line)
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {header.get('format')!r}, this version reads {FORMAT!r}; use "
            "the version that wrote it"
        )
    wrong = [name for name, kind in ENTRIES.items() if type(header.get(name)) is not kind]
    if wrong or header["steps"] < 0 or header["queries"] < 1:
        raise UserError(f"{path}: its header has no {(wrong or ['steps'])[0]}; give one of a run")
    return header


def _steps_in(size: int, width: int) -> int:
    """The whole steps in so many bytes behind a header."""
    blocks, rest = divmod(size, EVERY * width + TRAILER)
    return blocks * EVERY + min(rest // width, EVERY)


def _flipped(block: bytes, difference: int) -> int | None:
    """The byte of a block in which one bit flipped; its length: in the CRC; None: several bits did.

    Args:
        block: the block without its CRC.
        difference: the exclusive or of the CRC found and the CRC stored.
    """
    if difference & (difference - 1) == 0:
        return len(block)
    # The difference that each bit makes: the polynomial for the last one, shifted on for earlier
    # ones.
    change = _POLYNOMIAL
    for bit in range(8 * len(block)):
        if change == difference:
            return len(block) - 1 - bit // 8
        change = (change >> 1) ^ (_POLYNOMIAL if change & 1 else 0)
    return None


def _where(at: int | None, first: int, end: int, width: int) -> str:
    """The damage in a block of the steps from `first` to before `end`, counted from 0."""
    coeffs = (end - first) * width
    if at is None:
        return f"the block of steps {first} to {end} is damaged"
    if at < coeffs:
        return f"a bit of the coefficients of step {first + at // width} has flipped"
    part = "CRC-32" if at >= coeffs + SHA + SKETCH else "milestone"
    return f"a bit of the {part} after step {end} has flipped"
