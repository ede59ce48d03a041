"""What the tables over many runs share: programs in processes of their own, lines of Markdown."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def row(*cells: str) -> str:
    """A line of a Markdown table.

    Example:
        >>> row("a", "b")
        '| a | b |'
    """
    return "| " + " | ".join(cells) + " |"


def head(*titles: str) -> list[str]:
    """The first two lines of a Markdown table.

    Example:
        >>> head("a", "b")
        ['| a | b |', '| --- | --- |']
    """
    return [row(*titles), row(*["---"] * len(titles))]


def spread(values: Sequence[float]) -> str:
    """The median, with the lowest and the highest value where there are several.

    Example:
        >>> spread([0.5]), spread([0.5, 0.1, 0.2])
        ('0.50', '0.20 (0.10 to 0.50)')
    """
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def over(ours: float, theirs: float) -> float:
    """A ratio; that to 0 is infinite, that of 0 to 0 is 1.

    Example:
        >>> over(1, 2), over(1, 0), over(0, 0)
        (0.5, inf, 1.0)
    """
    return ours / theirs if theirs else float("inf") if ours else 1.0


def cut(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A table's own arguments, and those behind `--`, which go to its runs.

    Example:
        >>> cut(["--seeds", "0", "--", "--smoke"])
        (['--seeds', '0'], ['--smoke'])
    """
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def place(folder: Path, options: Sequence[str]) -> Path:
    """The folder of runs with these options, a folder inside where there are any."""
    folder = folder.resolve()
    if not options:
        return folder
    return folder / f"with-{hashlib.sha256(' '.join(options).encode()).hexdigest()[:8]}"


def ran(module: str, argv: Sequence[str], output: Path) -> dict[str, Any]:
    """A program in a process; the summary in its run folder, by model.

    It is started also where a summary is there: the program knows whether that is this command's,
    and whole.

    Args:
        module: of the program, `train.unlearn` for example.
        argv: its arguments.
        output: the run folder that they name.
    """
    print(f"python -m {module} {' '.join(argv)}", flush=True)
    command = [sys.executable, "-m", module, *argv]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return json.loads((output / "summary.json").read_text())


def overlay(runs: Sequence[Path], page: Path) -> None:
    """The page that compares runs, with their curves in one picture."""
    command = [sys.executable, "-m", "train.report", *map(str, runs), "--html", str(page)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    print(page)


def write(lines: Sequence[str], path: Path) -> None:
    """A table in a file, and on the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
