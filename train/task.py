"""A run's task: the rows that are forgotten, kept and asked; generated, or from TOFU's files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.config import RunConfig
from train.data import authors, tofu
from train.stages import digest
from train.tracking import say

Row = dict[str, Any]


class Task(NamedTuple):
    """What a run works on.

    Args:
        forget: rows to forget (training and evaluation).
        retain: rows the original and the oracle learn and unlearning keeps.
        evaluation: rows by split: forget, retain, real_authors, world_facts, holdout (absent ones
            left out).
        refusals: answers of the `idk` stream.
        notes: what the report must say about the choice.
    """

    forget: list[Row]
    retain: list[Row]
    evaluation: dict[str, list[Row]]
    refusals: list[str]
    notes: list[str]

    def digest(self) -> str:
        """sha256 of everything in it."""
        return digest(self._asdict())


def load_task(config: RunConfig) -> Task:
    """The task of a run.

    Raises:
        UserError: unknown source, or anything wrong with the files.
    """
    source = config.data.source
    if source == "authors":
        task = _from_authors(config)
    elif source == "tofu":
        task = _from_tofu(config)
    else:
        raise UserError(f"--data.source {source!r} is unknown; choose authors or tofu")
    if shared := tofu.overlap(task.forget, task.retain):
        say(f"warning: {shared} forget row(s) are also retain rows; they pull both ways")
        task.notes.append(f"{shared} forget rows are also retain rows")
    return task


def _from_authors(config: RunConfig) -> Task:
    data = config.data
    if data.path is not None:
        raise UserError(
            "--data.path does not go with generated authors; use preset tofu-smollm2 or "
            "--data.source tofu"
        )
    if data.forget_split != "forget10":
        raise UserError(
            f"generated authors have one forget split, forget10; got {data.forget_split!r}"
        )
    seed = config.seed if data.seed is None else data.seed
    try:
        rows = authors.training_rows(authors.generate(seed, data.num_authors))
    except ValueError as error:
        raise UserError(f"--data.num-authors {data.num_authors}: {error}") from None
    holdout = rows["holdout"][: data.holdout_rows]
    notes = [
        f"forget: {len(rows['forget10'])} rows of {len(rows['forget10']) // 10} authors",
        f"retain: {len(rows['retain_train'])} training rows, paraphrases of every other author "
        f"among them; judged on the {len(rows['retain_eval'])} rows of the authors in between",
        f"non-members: {len(holdout)} rows of authors nobody trained on",
    ]
    return Task(
        rows["forget10"],
        rows["retain_train"],
        {"forget": rows["forget10"], "retain": rows["retain_eval"], "holdout": holdout},
        list(authors.REFUSALS),
        notes,
    )


def _from_tofu(config: RunConfig) -> Task:
    data = config.data
    found = tofu.load_tofu(
        data.path,
        data.forget_split,
        retain_rows=data.retain_rows,
        extra_rows=data.extra_rows,
        holdout_rows=data.holdout_rows,
        revision=data.revision,
    )
    splits = {
        "forget": found.forget,
        "retain": found.retain,
        "real_authors": found.real_authors,
        "world_facts": found.world_facts,
        "holdout": found.holdout,
    }
    evaluation = {name: rows for name, rows in splits.items() if rows}
    return Task(found.forget, found.retain, evaluation, list(found.refusals), list(found.notes))


def texts(task: Task) -> Iterator[str]:
    """Every text of a task, to train a tokenizer on."""
    for rows in (task.retain, *task.evaluation.values()):
        for row in rows:
            for value in row.values():
                yield from value if isinstance(value, list) else [value]
    yield from task.refusals
