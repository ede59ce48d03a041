"""The parts that tables over many runs share: runs of programs, rows, lines of Markdown."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Run(NamedTuple):
    """A run of a program.

    Args:
        program: the program, `train.unlearn` for example.
        name: the name of its folder.
        argv: its arguments but for the folder; `@NAME` stands for a folder beside its own.
    """

    program: str
    name: str
    argv: tuple[str, ...]


Make = Callable[[Run], Any]  # a run, computed unless it is there, and read


class Page(NamedTuple):
    """The contents of a table's file.

    Args:
        lines: the lines of Markdown.
        curves: the runs whose curves a page beside the table overlays.
        name: the name of the file; empty: the table's.
    """

    lines: Sequence[str]
    curves: Sequence[Run] = ()
    name: str = ""


def command(run: Run, folder: Path, options: Sequence[str]) -> list[str]:
    """The arguments of a run with further options; folders lie in a folder."""
    words = [str(folder / word[1:]) if word.startswith("@") else word for word in run.argv]
    return [*words, *options, "--output", str(folder / run.name)]


def start(run: Run, folder: Path, options: Sequence[str]) -> None:
    """Take a run to its end in a process of its own.

    It is started also where a summary is there: the program knows whether that is this command's,
    and whole.
    """
    words = ["-m", run.program, *command(run, folder, options)]
    print(f"python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def summary(folder: Path) -> dict[str, Any]:
    """The numbers of a finished run by model."""
    return json.loads((folder / "summary.json").read_text())


@dataclasses.dataclass(frozen=True)
class Table:
    """A table over runs.

    Args:
        about: the line that describes it.
        fill: `fill(make, args)`: its page; it asks `make` for the runs in the order of need.
        rows: the names that `--only` chooses from.
        seeds: the usual seeds.
        options: further arguments of the command line by their flags, as `argparse` takes them.
        passed: `passed(run, options)`: the options behind `--` that a run is given.
        start: `start(run, folder, options)`: takes a run to its end.
        read: `read(folder)`: the result of a finished run.
    """

    about: str
    fill: Callable[[Make, argparse.Namespace], Page]
    rows: Sequence[str] = ()
    seeds: Sequence[int] = ()
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    passed: Callable[[Run, Sequence[str]], Sequence[str]] = lambda run, options: options
    start: Callable[[Run, Path, Sequence[str]], None] = start
    read: Callable[[Path], Any] = summary


def maker(table: Table, folder: Path, options: Sequence[str]) -> Make:
    """The function that computes the runs of a table in a folder, each once."""

    @functools.cache
    def make(run: Run) -> Any:
        table.start(run, folder, table.passed(run, options))
        return table.read(folder / run.name)

    return make


def slug(name: str) -> str:
    """A name as that of a folder.

    Example:
        >>> slug("RMU, retain weight 0.4")
        'rmu-retain-weight-0.4'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def place(folder: Path, options: Sequence[str]) -> Path:
    """The folder of runs with these options, a folder inside where there are any."""
    folder = folder.resolve()
    if not options:
        return folder
    return folder / f"with-{hashlib.sha256(' '.join(options).encode()).hexdigest()[:8]}"


def overlay(runs: Sequence[Path], page: Path) -> None:
    """Write the page that compares runs, with their curves in one picture."""
    command = [sys.executable, "-m", "train.report", *map(str, runs), "--html", str(page)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    print(page)


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


def mean(values: Sequence[float | None], form: str = ".3f") -> str:
    """The mean; "-" where there is no value, or one is missing.

    Example:
        >>> mean([0.5, 1.0]), mean([0.5, None]), mean([])
        ('0.750', '-', '-')
    """
    known = [value for value in values if value is not None]
    return format(statistics.mean(known), form) if known and len(known) == len(values) else "-"


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
