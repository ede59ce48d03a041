"""The end of a program: the page of a run, and its verdict and table on the terminal."""

from __future__ import annotations

from pathlib import Path

from train.reporting import page, tables
from train.runtime.plain import shown


def show(folder: str | Path, every: bool = False) -> Path:
    """Build the page of a finished run, and print its verdict and its table.

    Args:
        folder: the run folder.
        every: whether the table has all metrics, not only the main ones.

    Returns:
        The path of the page.

    Raises:
        UserError: it is not the folder of a finished run, a file is damaged, or a write failed.
    """
    built = page.build(folder)
    if built.verdict.findings:  # the table of a smoke run says that it is one
        print(shown(built.verdict.line))
    tables.show(tables.columns([built.run]), every)
    return built.path
