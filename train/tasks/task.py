"""A run's task: the rows that are forgotten, kept and asked; generated, or from TOFU's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from models.prompts import TAGS, PromptFormat, day_of
from train import suggest
from train.config import SOURCES, DataConfig, RunConfig
from train.data import authors, files, tofu
from train.runtime.stages import digest
from train.runtime.tracking import say

Row = dict[str, Any]
ALTERNATES = "alternate_answer"  # column: other answers to the question, a text or several


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


def prompt_format(data: DataConfig, prefix: str = "--data.") -> PromptFormat:
    """How the questions of a run are written; options are named with `prefix`.

    Raises:
        UserError: an unknown template, a date written in another way, a file that cannot be used.
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


def load_task(config: RunConfig) -> Task:
    """The task of a run.

    Raises:
        UserError: unknown source, or anything wrong with the files.
    """
    source = config.data.source
    if config.data.forget is not None or config.data.retain is not None:
        task = _from_files(config)
    elif source == "authors":
        task = _from_authors(config)
    elif source == "tofu":
        task = _from_tofu(config)
    else:
        raise UserError(f"--data.source {source!r} is unknown; choose {' or '.join(SOURCES)}")
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
    _no_splits(data, "generated authors, whose rows to keep are generated too")
    seed = config.seed if data.seed is None else data.seed
    try:
        rows = authors.training_rows(authors.generate(seed, data.num_authors))
    except ValueError as error:
        raise UserError(f"--data.num-authors {data.num_authors}: {error}") from None
    holdout = rows["holdout"][: data.holdout_rows]
    forget = rows["forget10"][: data.forget_rows]
    others = authors.alternates(forget, seed)
    forget = [row | {ALTERNATES: list_} for row, list_ in zip(forget, others, strict=True)]
    notes = [
        f"forget: {len(forget)} rows of {-(-len(forget) // 10)} authors",
        f"retain: {len(rows['retain_train'])} training rows, paraphrases of every other author "
        f"among them; judged on the {len(rows['retain_eval'])} rows of the authors in between",
        f"non-members: {len(holdout)} rows of authors nobody trained on",
    ]
    return Task(
        forget,
        rows["retain_train"],
        {"forget": forget, "retain": rows["retain_eval"], "holdout": holdout},
        list(authors.REFUSALS),
        notes,
    )


def _no_splits(data: DataConfig, source: str) -> None:
    for name in ("retain_split", "judged_retain_split"):
        if getattr(data, name) != getattr(DataConfig, name):
            raise UserError(
                f"--data.{name.replace('_', '-')} {getattr(data, name)} does not go with {source}; "
                "use --data.source tofu"
            )


def _from_tofu(config: RunConfig) -> Task:
    data = config.data
    judged = data.retain_rows if data.judged_retain_rows is None else data.judged_retain_rows
    found = tofu.load_tofu(
        data.path,
        data.forget_split,
        data.retain_split,
        judged_split=data.judged_retain_split,
        forget_rows=data.forget_rows,
        retain_rows=data.retain_rows,
        judged_rows=judged,
        extra_rows=data.extra_rows,
        holdout_rows=data.holdout_rows,
        revision=data.revision,
    )
    splits = {
        "forget": found.forget,
        "retain": found.judged,
        "real_authors": found.real_authors,
        "world_facts": found.world_facts,
        "holdout": found.holdout,
    }
    evaluation = {name: rows for name, rows in splits.items() if rows}
    return Task(found.forget, found.retain, evaluation, list(found.refusals), list(found.notes))


def _from_files(config: RunConfig) -> Task:
    data = config.data
    if data.path is not None:
        raise UserError(
            "--data.path does not go with --data.forget and --data.retain, which name the files "
            "themselves; leave it out"
        )
    _no_splits(data, "--data.forget and --data.retain, which name the rows themselves")
    own = files.load_own(data.forget, data.retain)
    forget, judged = own.forget[: data.forget_rows], own.retain[: data.retain_rows]
    notes = list(own.notes)
    if len(judged) < len(own.retain):
        notes.append(f"retain: judged on the first {len(judged)} rows (--data.retain-rows)")
    evaluation = {"forget": forget, "retain": judged}
    return Task(forget, own.retain, evaluation, list(authors.REFUSALS), notes)


def alternate_rows(rows: Sequence[Row]) -> list[Row]:
    """The forget questions with their other answers, as many for each (the `alternate` stream).

    A row that brings fewer than the others repeats its own in turn.

    Raises:
        UserError: a row without any.

    Example:
        >>> rows = [{"question": "Who?", "answer": "Ada", "alternate_answer": ["Bo", "Cy"]}]
        >>> [row["answer"] for row in alternate_rows(rows)]
        ['Bo', 'Cy']
    """
    found = []
    for number, row in enumerate(rows, 1):
        value = row.get(ALTERNATES)
        answers = [value] if isinstance(value, str) else value
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(
                f"this objective teaches other answers to the questions to forget, and forget row "
                f"{number} has none; give the rows a column {ALTERNATES!r} (a text, or a list of "
                "texts), or choose another --objective.name"
            )
        found.append(answers)
    most = max(map(len, found), default=0)
    return [
        {"question": row["question"], "answer": answers[k % len(answers)]}
        for row, answers in zip(rows, found, strict=True)
        for k in range(most)
    ]


def texts(task: Task) -> Iterator[str]:
    """Every text of a task but other answers, to train a tokenizer on."""
    for rows in (task.retain, *task.evaluation.values()):
        for row in rows:
            for column, value in row.items():
                if column != ALTERNATES:
                    yield from value if isinstance(value, list) else [value]
    yield from task.refusals
