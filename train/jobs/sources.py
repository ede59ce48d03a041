"""Sources of reasoning rows, and the choice of those that train and judge a model.

A row is a mapping that `jaxlib_unlearn.cot.find_trace` reads. A source is a function and a row of
`SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import cot
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.final_answer import final_answer
from train.data import hub_table
from train.data.batches import shuffled
from train.data.reasoning import FORMATS, read_rows
from train.data.search_traces import search_rows
from train.data.thoughts import gsm8k_row
from train.runtime.stages import digest

Row = Mapping[str, Any]


class Rows(NamedTuple):
    """The rows of a run, and a line about them for its report."""

    train: list[Row]
    test: list[Row]
    notes: list[str]

    def digest(self) -> str:
        """sha256 of its rows."""
        return digest([self.train, self.test])


class Source(NamedTuple):
    """A source of rows.

    Args:
        pool: `(place, row) -> row` for rows of a file or of the Hub, among which a run draws its
            own; None: the rows are made.
        make: `(data, seed) -> (training rows, test rows)`.
        hub: the data set at the Hub, its configuration and its split, where no path is given.
        leaves_out: whether rows without a whole trace are left out and counted; otherwise they
            are refused.
    """

    pool: Callable[[str, Row], Row] | None = None
    make: Callable[[Any, int], tuple[list[Row], list[Row]]] | None = None
    hub: tuple[str, str, str] | None = None
    leaves_out: bool = False


def plain(where: str, row: Row) -> Row:
    """A row as it is."""
    return row


def _generated(data: Any, seed: int) -> tuple[list[Row], list[Row]]:
    train = search_rows(seed, "train", data.train_rows or 8000)
    asked = {row["question"] for row in train}
    return [*train], [*search_rows(seed, "test", data.test_rows, asked)]


SOURCES: dict[str, Source] = {
    "search": Source(make=_generated),
    "gsm8k": Source(gsm8k_row, hub=("openai/gsm8k", "main", "train")),
    # Some of its traces were cut at the length limit of the model that wrote them.
    "openr1": Source(plain, hub=("open-r1/OpenR1-Math-220k", "default", "train"), leaves_out=True),
    "rows": Source(plain),
}


def load(data: Any, seed: int) -> Rows:
    """The rows of a run.

    Args:
        data: a `ReasoningData`.
        seed: the seed of the run.

    Raises:
        UserError: nothing is there, a row has no trace or no answer, or there are too few rows.
    """
    source = SOURCES[data.source]
    if source.make is not None:
        for name in ("path", "revision"):
            if getattr(data, name) is not None:
                raise UserError(
                    f"--data.{name} does not go with --data.source {data.source}, which is "
                    "generated; leave one of them out"
                )
        train, test = source.make(data, seed)
        place = "generated in the run"
    else:
        pool, place = _pool(source, data)
        train, test = _drawn(pool, data, seed, place)
        place = f"of {place}"
    notes = [f"Rows: {len(train)} to train on, {len(test)} to judge by, {place}."]
    return Rows(train, test, notes)


def _pool(source: Source, data: Any) -> tuple[list[Row], str]:
    """All rows of a file, of the files of a folder, or of the Hub."""
    if data.path is None:
        if source.hub is None:
            raise UserError("--data.source rows needs --data.path, a file of reasoning rows")
        repository, subset, split = source.hub
        advice = "give --data.path a file of its rows"
        table = hub_table.read(
            repository, subset, split, data.revision, place=repository, advice=advice
        )
        place = " ".join([repository, *(f"at commit {c}" for c in table.commits)])
        found = ((f"{repository}, row {i}", row) for i, row in enumerate(table.rows, 1))
    else:
        if data.revision is not None:
            raise UserError("--data.revision is of the Hub's data set; leave out it or --data.path")
        path = data.path.expanduser()
        files = _files(path, source.hub is not None)
        found, place = (row for file in files for row in read_rows(file, "--data.path")), path.name
    assert source.pool is not None
    rows, left = [], 0
    for where, raw in found:
        row = source.pool(where, raw)
        try:
            cot.find_trace(row)
        except UserError as error:
            if not source.leaves_out:
                raise UserError(f"{where}: {error}") from None
            left += 1
            continue
        rows.append(row)
    return rows, f"{place} ({left} without a whole trace left out)" if left else place


def _files(path: Path, folders: bool) -> Iterable[Path]:
    if not (folders and path.is_dir()):
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in FORMATS and p.is_file())
    if not files:
        raise UserError(f"--data.path {path}: no {' or '.join(FORMATS)} file in it; give another")
    return files


def _drawn(pool: list[Row], data: Any, seed: int, place: str) -> tuple[list[Row], list[Row]]:
    """The training rows and the test rows, drawn by the seed."""
    most = len(pool) - data.test_rows
    wanted = data.train_rows or max(most, 1)
    if wanted > most:
        raise UserError(
            f"{place} has {len(pool)} rows, fewer than --data.train-rows {wanted} and "
            f"--data.test-rows {data.test_rows}; lower one of them"
        )
    order = shuffled(seed, "reasoning", 0, len(pool)).tolist()
    test, train = order[: data.test_rows], order[data.test_rows : data.test_rows + wanted]
    return [pool[i] for i in train], [pool[i] for i in test]


def gold(row: Row) -> str:
    """The final answer that a row asks for.

    Example:
        >>> gold({"question": "?", "answer": "<think>a</think> It is 4."})
        '4'
    """
    found = cot.find_trace(row)
    said = row.get("answer")
    if found.column == "messages" and isinstance(said, str):
        return said.strip()
    return final_answer(found.after)
