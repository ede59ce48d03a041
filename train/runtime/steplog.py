"""The log of steps, `metrics.jsonl`: a JSON line a step, each with a CRC-32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.runtime import files

Steps = list[tuple[bytes, dict[str, Any]]]  # each line with its object


def step_line(stage: str, step: int, scalars: dict[str, float]) -> str:
    """A line of `metrics.jsonl`: a JSON object whose last entry is the CRC-32 of the rest.

    Example:
        >>> step_line("original", 3, {"loss": 0.5})
        '{"stage": "original", "step": 3, "loss": 0.5, "crc": 1043071103}\\n'
    """
    return files.sealed({"stage": stage, "step": step, **scalars}) + "\n"


def parse_step(line: bytes) -> dict[str, Any] | None:
    """The object on a line of `metrics.jsonl`, without its CRC-32; None when it is damaged.

    Lines without a CRC-32 (of an earlier version) pass if they describe a step.
    """
    row = files.opened(line)
    if row is None or not isinstance(row.get("stage"), str):
        return None
    return row if type(row.get("step")) is int else None


def split_steps(path: Path) -> tuple[Steps, list[tuple[int, bytes]]]:
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
    checked = any(files.CRC.fullmatch(line) for line in lines)
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = parse_step(line) if files.CRC.fullmatch(line) or not checked else None
            bad += [(number, line)] if row is None else []
            steps += [] if row is None else [(line, row)]
    return steps, bad


def odd(steps: Steps, stage: str = "", before: int = 0) -> str:
    """The words for steps that are missing from a log or stand in it twice; empty: there are none.

    A stage logs its steps from 0 on, each once. Logs of versions without a CRC-32 pass.

    Args:
        steps: the lines.
        stage: the name of a stage whose steps below `before` must be there.
        before: the step at which that stage continues.
    """
    if not all(files.CRC.fullmatch(line) for line, _ in steps):
        return ""
    logged: dict[str, list[int]] = {stage: []} if before else {}
    for _, row in steps:
        logged.setdefault(row["stage"], []).append(row["step"])
    found = []
    for name, there in logged.items():
        once = {step for step in there if step >= 0}
        end = max([*once, before if name == stage else 0])
        missing, twice = end - len(once - {end}), len(there) - len(once)
        found += [f"{missing} step(s) of {name} are missing"] if missing else []
        found += [f"{twice} line(s) of {name} stand there twice"] if twice else []
    return ", ".join(found)


def read_steps(path: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; of a step logged twice (a run that was resumed) the last one.

    Args:
        path: the file; absent counts as empty.
        say: receives a message about lines that are damaged, missing or repeated.
    """
    steps, bad = split_steps(path)
    if bad:
        say(f"{path}: {len(bad)} damaged line(s) left out, the first is line {bad[0][0]}")
    elif words := odd(steps):
        say(f"{path}: {words}; curves may differ")
    elif files.damaged(path):
        say(f"{path} is not what the run wrote (its sha256 is not in {files.key_of(path).name})")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for _, row in steps:
        key = (row["stage"], row["step"])
        rows[key] = rows.pop(key, {}) | row
    return list(rows.values())
