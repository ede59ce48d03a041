"""Tasks of labelled rows: reading records, making rows of them, and splitting these."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from train.data.labelled import Columns, Divided, Pools, Record, divide, hub_pools, read_pools
from train.runtime.stages import digest
from train.tasks.kinds import Kind

Row = dict[str, Any]


class Labelled(NamedTuple):
    """A task of `train.classify`.

    Args:
        name: the name of the task in `--task`.
        summary: a line for `--list`.
        kind: the kind of the model and of the rows.
        read: `read(data)`: the records; `data` is the run's `--data.*`.
        row: `row(record)`: a row, for text with `prompt`, `options` and `gold`.
        dev_rows: the number of rows of the training pool that evaluate the model during training.
    """

    name: str
    summary: str
    kind: Kind
    read: Callable[[Any], Pools]
    row: Callable[[Record], Row]
    dev_rows: int = 500


class Rows(NamedTuple):
    """The rows of a run by split, and notes on their origin."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]
    notes: list[str]

    def digest(self) -> str:
        """sha256 of rows and notes."""
        return digest([self.train, self.dev, self.test, self.notes])

    @property
    def majority_accuracy(self) -> float | None:
        """The test accuracy of always choosing the most frequent label of the training rows.

        None where rows have no labels.
        """
        if not all("gold" in row for row in self.train):
            return None
        golds = [row["gold"] for row in self.train]
        most = max(sorted(set(golds)), key=golds.count)
        return sum(row["gold"] == most for row in self.test) / len(self.test)


def read_from(columns: Columns, repo: str, config: str | None) -> Callable[[Any], Pools]:
    """The `read` of a task with a data set on the Hub, which `--data.path` replaces.

    Args:
        columns: the columns of records, each with the names that it may have in files.
        repo: the Hub id of the data set.
        config: the configuration of the data set.
    """

    def read(data: Any) -> Pools:
        if data.path is not None:
            return read_pools(data.path, columns)
        return hub_pools(repo, config, columns, data.revision)

    return read


def load(task: Labelled, data: Any, seed: int) -> Rows:
    """The rows of a task.

    Raises:
        UserError: nothing is there, a column is missing, a label is no option, or rows are few.
    """
    pools = task.read(data)
    made = Pools(
        made_rows(task.row, pools.train, pools.place),
        None
        if pools.held_out is None
        else made_rows(task.row, pools.held_out, f"{pools.place}, validation"),
        pools.place,
    )
    dev = task.dev_rows if data.dev_rows is None else data.dev_rows
    divided: Divided
    divided, notes = divide(made, data.train_rows, dev, data.test_rows, seed)
    return Rows(*divided, notes)


def made_rows(row: Callable[[Record], Row], records: Iterable[Record], place: str) -> list[Row]:
    """The rows made of records.

    Raises:
        UserError: a record gives no row; the message has its number.
    """
    found = []
    for number, record in enumerate(records, 1):
        try:
            made = row(record)
            check_row(made)
        except ValueError as error:
            raise UserError(f"{place}, row {number}: {error}") from None
        found.append(made)
    return found


def check_row(row: Row) -> None:
    """Raise `ValueError` for a row whose right option is none of its options."""
    if "options" not in row:
        return
    count = len(row["options"])
    if count < 2:
        raise ValueError(f"{count} option(s), and there is nothing to choose; give two or more")
    if not 0 <= row["gold"] < count:
        shown = one_line(", ".join(map(repr, row["options"])), 80)
        raise ValueError(
            f"gold is {row['gold']}, none of the {count} options ({shown}); number them from 0"
        )


def label(value: Any, names: tuple[str, ...]) -> int:
    """A label as its number: a number, true or false, or one of the names.

    Raises:
        ValueError: anything else.

    Example:
        >>> label("not_entailment", ("entailment", "not_entailment")), label("1", ("no", "yes"))
        (1, 1)
    """
    if isinstance(value, int):  # true and false as well
        number = int(value)
    else:
        text = str(value).strip().casefold()
        known = [name.casefold() for name in names]
        digits = text.removeprefix("-").isdecimal()
        number = int(text) if digits else known.index(text) if text in known else -1
    if not 0 <= number < len(names):
        raise ValueError(
            f"label {one_line(repr(value), 40)} is none of {', '.join(names)} (or their numbers "
            "from 0); correct it, or leave rows without a label out"
        )
    return number


def text(value: Any, column: str) -> str:
    """A cell that holds text.

    Raises:
        ValueError: it holds something else, or nothing.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} must hold text that is not empty")
    return value.strip()
