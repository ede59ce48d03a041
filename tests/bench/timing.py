"""What the benchmarks share: sides in turns, lines of their tables, and where these are written."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

OUT = Path(__file__).resolve().parents[2] / "runs" / "bench"


def in_turns(programs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each program; the first run of each is not counted, the order turns round.

    Args:
        programs: by name; each returns the seconds of a run.
        repeats: counted runs of each.
    """
    for run in programs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats):
        for name, run in list(programs.items())[:: 1 if turn % 2 else -1]:
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def faster(work: str, peer: str, ours: float, theirs: float, goal: float | None) -> dict[str, Any]:
    """A line whose ratio is theirs / ours, to reach a goal.

    Example:
        >>> faster("step, s", "torch", 2.0, 3.0, None)["ratio"]
        1.5
    """
    return dict(work=work, peer=peer, ours=ours, theirs=theirs, ratio=theirs / ours, goal=goal)


def within(work: str, other: str, ours: float, theirs: float, bound: Any) -> dict[str, Any]:
    """A line whose ratio is ours / theirs, to stay within a bound.

    Example:
        >>> within("muon: a step", "AdamW", 3.0, 2.0, 1.1)["ratio"]
        1.5
    """
    return dict(work=work, other=other, ours=ours, theirs=theirs, ratio=ours / theirs, bound=bound)


def machine(*packages: str) -> str:
    """Backend, cores, and the versions of jax and of these packages, where they are installed."""
    first = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{platform.machine()}, {cores} cores" if first.platform == "cpu" else first.device_kind
    there = [name for name in ("jax", *packages) if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in there]
    return ", ".join([f"{first.platform} ({kind})", *versions])


def shown(value: Any, digits: int = 3) -> str:
    """A cell.

    Example:
        >>> shown(None), shown("AdamW"), shown(1.23456)
        ('–', 'AdamW', '1.23')
    """
    return "–" if value is None else value if isinstance(value, str) else f"{value:.{digits}g}"


def markdown(
    heading: str,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    cell: Callable[[Mapping[str, Any], str], str] = lambda row, key: shown(row[key]),
) -> str:
    """The lines as a table below what was measured, and notes below it.

    Args:
        heading: what was measured, and where.
        rows: lines of one kind, `faster` or `within`.
        notes: lines of Markdown.
        cell: the text of a line's column.
    """
    keys = list(rows[0])
    ratio = "theirs / ours" if "goal" in keys else "ours / theirs"
    lines = [f"{heading}. Ratio: {ratio}.", "", "| " + " | ".join(keys) + " |"]
    lines.append("|---" * len(keys) + "|")
    lines += ["| " + " | ".join(cell(row, key) for key in keys) + " |" for row in rows]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def publish(name: str, result: Any, text: str, folder: Path) -> None:
    """The numbers as `NAME.json`, the table as `NAME.md` and on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    print(text)
