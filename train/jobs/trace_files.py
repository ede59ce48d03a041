"""Files of traces: a stage's own, from which a killed run continues, and given ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.data.tofu import read_json
from train.runtime import files
from train.runtime.stages import digest
from train.runtime.tracking import say


def kept(path: Any) -> list[str]:
    """The traces of a stage that was stopped; a line that was cut off or damaged ends them."""
    if not path.exists():
        return []
    found: list[str] = []
    lines = path.read_bytes().split(b"\n")[:-1]
    checked = any(map(files.CRC.fullmatch, lines))  # those of earlier versions have no CRC-32
    for line in lines:
        entry = files.opened(line) if files.CRC.fullmatch(line) or not checked else None
        if entry is None or entry.keys() != {"row", "trace"} or entry["row"] != len(found):
            break
        found.append(str(entry["trace"]))
    if len(found) < len(lines):
        say(f"{path}: line {len(found) + 1} is damaged; its trace and later ones are made again")
    path.write_text("".join(map(_line, range(len(found)), found)))
    return found


def _line(row: int, trace: str) -> str:
    return files.sealed({"row": row, "trace": trace}) + "\n"


def add(path: Any, first: int, traces: Sequence[str]) -> None:
    """Add the traces from number `first` on to the file of a stage, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):  # a bucket, where nothing can be appended
        path.write_text("".join(map(_line, range(len(traces)), traces)))
        return
    with path.open("a", encoding="utf-8") as file:
        for row in range(first, len(traces)):
            file.write(_line(row, traces[row]))
            file.flush()


def read_traces(path: Path, count: int, model: str | None = None) -> list[list[str]]:
    """The traces in a file by row: lines with `row` (from 0) and `trace`, equally many per row.

    Args:
        path: the path of the JSON lines.
        count: the number of rows to forget.
        model: the digest that lines with a `model` must name; None: it is not known yet.

    Raises:
        UserError: rows are missing, too many, or another model's.
    """
    path = path.expanduser()
    found: list[list[str]] = [[] for _ in range(count)]
    for number, line in enumerate(read_json(path), 1):
        where, row, trace = (
            f"--traces.path {path}, row {number}",
            line.get("row"),
            line.get("trace"),
        )
        if isinstance(row, bool) or not isinstance(row, int) or not isinstance(trace, str):
            raise UserError(f"{where}: 'row' (a number) and 'trace' (a text) are needed")
        other = line.get("model")
        if model is not None and isinstance(other, str) and other != model:
            raise UserError(
                f"{where}: the trace is of model {other[:16]}, and the original is {model}; give "
                "that model's traces, or leave --traces.path out"
            )
        if not 0 <= row < count:
            raise UserError(
                f"{where}: row {row} is none of the {count} rows to forget, numbered from 0; the "
                f"file (digest {digest(path.read_text(encoding='utf-8'))[:16]}) belongs to others"
            )
        found[row].append(trace)
    sizes = {len(traces) for traces in found}
    if 0 in sizes:
        missing = [i for i, traces in enumerate(found) if not traces]
        raise UserError(
            f"--traces.path {path}: {len(missing)} of {count} rows have no trace, the first is row "
            f"{missing[0]}; add them"
        )
    if len(sizes) > 1:
        raise UserError(
            f"--traces.path {path}: rows have {min(sizes)} to {max(sizes)} traces; give equally "
            "many for each"
        )
    return found
