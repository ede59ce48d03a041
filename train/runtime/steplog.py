"""The log of steps, `metrics.jsonl`: a JSON line a step, each with a CRC-32."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError

CRC = re.compile(rb'(.*), "crc": ([0-9]{1,10})\}', re.DOTALL)


def step_line(stage: str, step: int, scalars: dict[str, float]) -> str:
    """A line of `metrics.jsonl`: a JSON object whose last entry is the CRC-32 of the rest.

    Example:
        >>> step_line("original", 3, {"loss": 0.5})
        '{"stage": "original", "step": 3, "loss": 0.5, "crc": 1043071103}\\n'
    """
    text = json.dumps({"stage": stage, "step": step, **scalars})
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}\n'


def parse_step(line: bytes) -> dict[str, Any] | None:
    """The object on a line of `metrics.jsonl`, without its CRC-32; None when it is damaged.

    Lines without a CRC-32 (of an earlier version) pass if they describe a step.
    """
    if (found := CRC.fullmatch(line)) is not None:
        line = found[1] + b"}"
        if zlib.crc32(line) != int(found[2]):
            return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and isinstance(row.get("stage"), str)
    return row if sound and type(row.get("step")) is int else None


def split_steps(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[tuple[int, bytes]]]:
    """The lines of `metrics.jsonl` that are steps, and the damaged ones with their numbers.

    An unterminated last line is neither: the run was killed while it wrote it. Lines without a
    CRC-32 are damaged where others have one: damage to that entry must not hide other damage.

    Raises:
        UserError: the file exists and cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; restore its permissions") from None
    steps, bad = [], []
    checked = any(CRC.fullmatch(line) for line in lines)
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = parse_step(line) if CRC.fullmatch(line) or not checked else None
            bad += [(number, line)] if row is None else []
            steps += [] if row is None else [(line, row)]
    return steps, bad


def read_steps(path: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; of a step logged twice (a run that was resumed) the last one.

    Args:
        path: the file; absent counts as empty.
        say: receives a message about damaged lines, which are left out.
    """
    steps, bad = split_steps(path)
    if bad:
        say(f"{path}: {len(bad)} damaged line(s) left out, the first is line {bad[0][0]}")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for _, row in steps:
        key = (row["stage"], row["step"])
        rows[key] = rows.pop(key, {}) | row
    return list(rows.values())
