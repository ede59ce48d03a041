"""Benchmarks: the rows of a run by split, its training streams and its evaluators.

Each benchmark is one file with a `Benchmark` row that is listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.data.task import Task
from train.data.tofu import alike, overlap, repeats
from train.options import choices
from train.options.config import RunConfig
from train.runtime.tracking import say
from train.tasks import authors, documents, files, reasoning, tofu
from train.tasks.task import Benchmark

TASKS: dict[str, Benchmark] = {
    row.name: row for row in (authors.ROW, tofu.ROW, files.ROW, documents.ROW, *reasoning.ROWS)
}


MOST_NAMED = 3  # files in a title


def sources() -> tuple[str, ...]:
    """The values that `--data.source` accepts."""
    return tuple(name for name, row in TASKS.items() if not row.options)


choices.LATER["--data.source"] = sources


def find(data: Mapping[str, Any]) -> Benchmark | None:
    """The benchmark that a data configuration selects, or None.

    Example:
        >>> find({"source": "tofu"}).name, find({"source": "tofu", "forget": "rows.json"}).name
        ('tofu', 'files')
    """
    named = TASKS[data["source"]] if data.get("source") in sources() else None
    given = {option for row in TASKS.values() for option in row.options if data.get(option)}
    given -= set(() if named is None else named.reads)
    return next((row for row in TASKS.values() if given & set(row.options)), named)


def load_task(config: RunConfig) -> Task:
    """The task of a run.

    Raises:
        UserError: the source is unknown, or a file is unusable.
    """
    row = find(vars(config.data))
    if row is None:
        known = " or ".join(sources())
        raise UserError(f"--data.source {config.data.source!r} is unknown; choose {known}")
    task = row.load(config)._replace(evaluators=row.evaluators, streams=row.streams)
    for count, what in (
        (
            overlap(task.forget, task.retain),
            "forget rows are also retain rows; they pull both ways",
        ),
        (alike(task.forget, task.retain), "forget rows differ from retain rows in case or spaces"),
        (repeats(task.forget), "forget rows repeat another one; they count twice"),
    ):
        if count:
            say(f"warning: {count} {what}")
            task.notes.append(f"{count} {what}")
    return task


def subject(data: Mapping[str, Any]) -> str:
    """The forgotten data in words, for titles; "" where no benchmark is selected.

    Example:
        >>> subject({"source": "authors", "forget_split": "forget10", "num_authors": 40})
        'a tenth of 40 invented authors'
        >>> subject({"source": "documents", "forget": ("a/one.txt", "two.txt")})
        'the text of one.txt and two.txt'
    """
    row = find(data)
    if row is None:
        return ""
    names = {name: _named(value) for name, value in data.items()}
    return row.subject.format_map(names)


def _named(value: Any) -> str:
    if not isinstance(value, list | tuple):
        text = str(value)
        return Path(text).name if text.endswith(".json") else text
    names = [Path(str(one)).name for one in value]
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def hub_id(config: Mapping[str, Any]) -> str | None:
    """The Hub id of the data set that a run's `config.json` names; None where it read files."""
    data = config.get("data")
    row = find(data) if isinstance(data, Mapping) and not data.get("path") else None
    return None if row is None else row.hub
