"""A task: the rows of a run by split, and the streams that objectives train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.data import tofu
from train.options.roles import QUESTION_ANSWERING
from train.runtime.stages import digest

Row = dict[str, Any]

ALTERNATES = "alternate_answer"  # column: alternate answers to the question, a text or a list

# The columns of a row that a model can learn, and those that streams make such rows from.
LEARNED = ({"question", "answer"}, {"text"})
TAUGHT = {"question", "answer", "text", ALTERNATES}

TRACES = "traces"  # column: the original model's thoughts on a row to forget, a list of texts


class Task(NamedTuple):
    """The data of a run.

    Args:
        forget: rows to forget (training and evaluation).
        retain: rows that the original and the oracle learn and that unlearning should keep.
        evaluation: rows by split: forget, retain, real_authors, world_facts, holdout (absent ones
            left out).
        refusals: answers of the `idk` stream.
        notes: remarks on the choice of rows for the report.
        evaluators: names of the evaluators of its models.
        streams: the streams that an objective may be trained on, `(task, seed) -> rows` by name
            (`Paired` where rows belong to those of another stream); None: the streams of questions
            and answers.
        lengths: the longest example in tokens of a stream, where it is not `--data.max-length`.
        places: the file that a stream's rows were read from, for messages.
    """

    forget: list[Row]
    retain: list[Row]
    evaluation: dict[str, list[Row]]
    refusals: list[str]
    notes: list[str]
    evaluators: tuple[str, ...] = QUESTION_ANSWERING
    streams: Mapping[str, Callable[[Task, int], list[Row]]] | None = None
    lengths: Mapping[str, int] = {}
    places: Mapping[str, str] = {}

    def digest(self) -> str:
        """sha256 of its rows, refusals and notes."""
        names = ("forget", "retain", "evaluation", "refusals", "notes")
        return digest({name: getattr(self, name) for name in names})

    def stream(self, name: str, seed: int) -> list[Row]:
        """The rows of a stream.

        Raises:
            UserError: the task has no such stream, or its rows lack what the stream needs.
        """
        streams = self._streams()
        if name not in streams:
            raise UserError(
                f"this objective is trained on {name!r}, which the data do not have (they have "
                f"{', '.join(streams)}); choose another --objective.name"
            )
        return streams[name](self, seed)

    def rows_of(self, objective: Any, seed: int) -> dict[str, list[Row]]:
        """The rows of every stream that an objective reads, with the columns that it needs.

        A document stands for an answered question and the other way round: a model learns either.

        Raises:
            UserError: the task has none for a stream, or a row lacks a column.
        """
        found = {name: self.stream(name, seed) for name in objective.streams}
        for name, rows in found.items():
            needed = set(objective.columns[name])
            forms = [needed, *(LEARNED if needed <= TAUGHT else ())]
            for number, row in enumerate(rows, 1):
                if not any(form <= row.keys() for form in forms):
                    lacking = " and ".join(repr(column) for column in sorted(needed - row.keys()))
                    raise UserError(
                        f"{self.places.get(name, f'stream {name}')}, row {number}: no column "
                        f"{lacking}, which objective {objective.name!r} reads; add it, or choose "
                        "another --objective.name"
                    )
        return found

    def follows(self, name: str) -> str | None:
        """The name of the stream that stream `name` follows, or None."""
        made = self._streams()[name]
        return made.follows if isinstance(made, Paired) else None

    def _streams(self) -> Mapping[str, Callable[[Task, int], list[Row]]]:
        return STREAMS if self.streams is None else self.streams


class Paired(NamedTuple):
    """Rows of a stream that belong to the rows of another, equally many to each in its order.

    Args:
        rows: `(task, seed) -> rows`.
        follows: the name of the other stream.
    """

    rows: Callable[[Task, int], list[Row]]
    follows: str

    def __call__(self, task: Task, seed: int) -> list[Row]:
        """The rows."""
        return self.rows(task, seed)


def alternate_rows(rows: Sequence[Row]) -> list[Row]:
    """The forget questions with their alternate answers, equally many each: stream `alternate`.

    A row with fewer answers than others repeats them in turn.

    Raises:
        UserError: a row without alternate answers.

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
    """Every text of a task except alternate answers, to train a tokenizer on."""
    for rows in (task.retain, *task.evaluation.values()):
        for row in rows:
            for column, value in row.items():
                if column != ALTERNATES:
                    values = value if isinstance(value, list) else [value]
                    yield from (text for text in values if isinstance(text, str))
    yield from task.refusals


# The streams of questions and answers.
Rows = Callable[[Task, int], list[Row]]


STREAMS: Mapping[str, Rows] = {
    "forget": lambda task, seed: task.forget,
    "retain": lambda task, seed: task.retain,
    "idk": Paired(lambda t, seed: tofu.refusal_rows(t.forget, t.refusals, seed), "forget"),
    "alternate": Paired(lambda task, seed: alternate_rows(task.forget), "forget"),
    "train": lambda task, seed: task.forget + task.retain,
}
