"""The parts that benchmarks share: a task's rows, its streams, and the prompt format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from models.text.prompts import TAGS, PromptFormat, day_of
from train.data import tofu
from train.data.task import Row, Task
from train.options.config import DataConfig, RunConfig
from train.runtime import suggest


class Benchmark(NamedTuple):
    """A row of the table in `train/tasks/__init__.py`; one file each.

    Args:
        name: the name in `--data.source`.
        load: a function that reads or makes the rows of a run's configuration.
        evaluators: the names of the evaluators of its models.
        streams: the streams that objectives may read, `(task, seed) -> rows` by name.
        options: the fields of `DataConfig` that select it when one is set; a benchmark that
            lists any cannot be selected by its name.
        hub: the Hub id of the data set that it reads where no `--data.path` is given.
        fit: `(task, model, config) -> task` once the model is read, for rows and lengths of streams
            that need its tokenizer; `config` has `data` and `evaluate`.
        reads: the fields in the `options` of another benchmark that it reads itself.
        subject: the forgotten data in words, for titles; `{name}` is a field of `DataConfig`.
    """

    name: str
    load: Callable[[RunConfig], Task]
    evaluators: tuple[str, ...]
    streams: Mapping[str, Callable[[Task, int], list[Row]]]
    options: tuple[str, ...] = ()
    hub: str | None = None
    fit: Callable[[Task, Any, Any], Task] | None = None
    reads: tuple[str, ...] = ()
    subject: str = "{forget_split}"


def prompt_format(data: DataConfig, prefix: str = "--data.") -> PromptFormat:
    """The prompt format of a run; errors name options with `prefix`.

    Raises:
        UserError: the template is unknown, the date is malformed, or the file is unusable.
    """
    suggest.check_choice(f"{prefix}template", data.template, ("auto", *TAGS))
    try:
        day_of(data.template_date)
    except UserError as error:
        raise UserError(f"{prefix}template-date: {error}") from None
    shots: list[Row] = []
    if data.few_shot is not None:
        path = data.few_shot.expanduser()
        shots = tofu.check_rows(tofu.read_json(path), tofu.PLAIN, str(path))
    pairs = tuple((row["question"], row["answer"]) for row in shots)
    return PromptFormat(TAGS.get(data.template), pairs, data.template_date)


def no_splits(data: DataConfig, source: str) -> None:
    """Raise `UserError` for a named retain split where `source` has no splits to choose from."""
    for name in ("retain_split", "judged_retain_split"):
        if getattr(data, name) != getattr(DataConfig, name):
            raise UserError(
                f"--data.{name.replace('_', '-')} {getattr(data, name)} does not go with {source}; "
                "use --data.source tofu"
            )
