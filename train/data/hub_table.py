"""Rows of a data set at the Hub, through `datasets`, which is imported on first use."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line


class HubTable(NamedTuple):
    """The rows of a split, and the commits of the data set that they were read from."""

    rows: list[dict[str, Any]]
    commits: list[str]


def read(
    repo: str, config: str | None, split: str, revision: str | None, place: str, advice: str
) -> HubTable:
    """A split as a whole.

    Args:
        repo: the id of the data set, `owner/name`.
        config: its configuration; None: the only one.
        split: its name.
        revision: a commit, branch or tag; None: the newest.
        place: the name of the data, for messages.
        advice: the end of the message, after "install it or" and "check the network or".

    Raises:
        UserError: no such package, or the data set cannot be read.
    """
    with _said(repo, place, advice) as datasets:
        table = datasets.load_dataset(repo, config, split=split, revision=revision)
        rows = [dict(row) for row in table]
        files = [str(file["filename"]) for file in getattr(table, "cache_files", ())]
    # `datasets` keeps what it read in a folder named after the commit.
    return HubTable(rows, sorted(set(re.findall(r"[/\\]([0-9a-f]{40})[/\\]", " ".join(files)))))


def stream(
    repo: str, config: str | None, split: str, revision: str | None, place: str, advice: str
) -> Iterator[dict[str, Any]]:
    """A split row by row, as it arrives; arguments and errors are those of `read`."""
    with _said(repo, place, advice) as datasets:
        yield from datasets.load_dataset(
            repo, config, split=split, streaming=True, revision=revision
        )


@contextlib.contextmanager
def _said(repo: str, place: str, advice: str) -> Iterator[Any]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"reading {repo} needs the package `datasets`; install it or {advice}"
        ) from None
    try:
        yield datasets
    except Exception as error:  # the Hub's client raises many types; all mean the same to the user
        raise UserError(
            f"{place}: cannot be loaded ({type(error).__name__}: {one_line(error, 120)}); check "
            f"the network or {advice}"
        ) from None
