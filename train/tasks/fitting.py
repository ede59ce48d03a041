"""Fitting a task to a model: the benchmark's own `fit`, and the rows that the model can read."""

from __future__ import annotations

from typing import Any

from jaxlib_unlearn.errors import UserError
from train.data.examples import encode_prompt
from train.data.task import Row, Task
from train.evaluators.evaluation import Model, longest
from train.runtime.tracking import say
from train.tasks import find


def fit_rows(
    rows: list[Row], model: Model, system_prompt: str | None, max_length: int, what: str
) -> list[Row]:
    """The rows whose prompts leave room for a label; a message counts the others.

    Raises:
        UserError: no row is left.
    """
    limit = longest(model, max_length)
    sizes = [
        len(encode_prompt(model.tokenizer, row["question"], system_prompt=system_prompt))
        if "question" in row
        else 0  # a document
        for row in rows
    ]
    kept = [row for row, size in zip(rows, sizes, strict=True) if size < limit]
    if rows and not kept:
        raise UserError(
            f"{what}: every prompt fills the {limit} tokens of the context (shortest: {min(sizes)})"
            ", so no label is left; shorten the questions or raise --data.max-length"
        )
    if len(kept) < len(rows):
        say(f"{what}: {len(rows) - len(kept)} row(s) left out, their prompt fills {limit} tokens")
    return kept


def fit_task(
    task: Task,
    model: Model,
    config: Any,
) -> Task:
    """The task that the benchmark fits to the model; rows that are left out become a note.

    Args:
        task: the task as the benchmark loads it.
        model: the model with its tokenizer and its prompt format.
        config: the configuration of a run or of `train.evaluate`, with `data` and `evaluate`.

    Raises:
        UserError: a split has no row left, or rows lack the column that is asked.
    """
    row, data, evaluate = find(vars(config.data)), config.data, config.evaluate
    if row is not None and row.fit is not None:
        task = row.fit(task, model, config)
    column, samples = evaluate.leak_question, evaluate.leak_samples * ("leak" in task.evaluators)
    if samples and not all(column in r for r in task.evaluation.get("forget", ())):
        raise UserError(
            f"--evaluate.leak-question {column}: forget rows without that column; add it or use "
            "question"
        )

    def fit(rows: list[Row], what: str) -> list[Row]:
        return fit_rows(rows, model, data.system_prompt, data.max_length, what)

    forget = fit(task.forget, "forget")
    retain = fit(task.retain, "retain")
    done = [(task.forget, forget), (task.retain, retain)]
    judged = {}
    for name, rows in task.evaluation.items():
        same = [kept for given, kept in done if given == rows]
        judged[name] = same[0] if same else fit(rows, f"{name} (evaluation)")
    notes = list(task.notes)
    before = len(task.forget) + len(task.retain) + sum(map(len, task.evaluation.values()))
    left = before - len(forget) - len(retain) - sum(map(len, judged.values()))
    if left:
        notes.append(f"left out, their prompt fills the context: {left} rows of all splits")
    return task._replace(forget=forget, retain=retain, evaluation=judged, notes=notes)
