"""The user's own rows: a file of facts to forget and one of facts to keep."""

from __future__ import annotations

from jaxlib_unlearn.errors import UserError
from train.data import files
from train.data.author_attributes import REFUSALS
from train.data.exchanged import exchanged
from train.data.task import STREAMS, Task
from train.options.config import RunConfig
from train.options.roles import QUESTION_ANSWERING
from train.tasks.task import Benchmark, no_splits


def columns_of(text: str) -> list[tuple[str, str]]:
    """The pairs of `--data.columns`: what is read, and the column of the files.

    Raises:
        UserError: the text is no list of pairs of known names.

    Example:
        >>> columns_of("question=q,answer=a")
        [('question', 'q'), ('answer', 'a')]
    """
    pairs = [tuple(part.split("=", 1)) for part in text.split(",") if part.strip()]
    for pair in pairs:
        if len(pair) != 2 or pair[0].strip() not in files.COLUMNS or not pair[1].strip():
            raise UserError(
                f"--data.columns {text}: write NAME=COLUMN,NAME=COLUMN, where a name is one of "
                f"{', '.join(files.COLUMNS)}"
            )
    return [(pair[0].strip(), pair[1].strip()) for pair in pairs]


def load(config: RunConfig) -> Task:
    """The rows of `--data.forget`, `--data.retain` and `--data.holdout`.

    Raises:
        UserError: a file is unusable, or an option belongs to another source.
    """
    data = config.data
    if data.path is not None:
        raise UserError(
            "--data.path does not go with --data.forget and --data.retain, which name the files "
            "themselves; leave it out"
        )
    no_splits(data, "--data.forget and --data.retain, which name the rows themselves")
    for side in ("forget", "retain", "holdout"):
        paths = getattr(data, side)
        if len(paths) > 1:
            raise UserError(
                f"--data.{side} {paths[-1]}: rows of questions and answers come from one file a "
                "side; for texts say --data.source documents"
            )
    given = (data.forget, data.retain, data.holdout)
    names = dict(columns_of(data.columns))
    forget_file, retain_file, unseen_file = (next(iter(paths), None) for paths in given)
    own = files.load_own(forget_file, retain_file, unseen_file, names)
    forget, judged = own.forget[: data.forget_rows], own.retain[: data.retain_rows]
    notes = list(own.notes)
    if len(judged) < len(own.retain):
        notes.append(f"retain: judged on the first {len(judged)} rows (--data.retain-rows)")
    evaluation = {"forget": forget, "retain": judged}
    if own.holdout:
        evaluation["holdout"] = own.holdout[: data.holdout_rows]
    elif swapped := exchanged(forget, config.seed if data.seed is None else data.seed):
        evaluation["exchanged"] = swapped
        notes.append(
            f"control: {len(swapped)} rows to forget with their names exchanged stand for rows "
            "that nobody was trained on (give such rows with --data.holdout)"
        )
    places = {side: str(getattr(data, side)[0]) for side in ("forget", "retain")}
    return Task(forget, own.retain, evaluation, list(REFUSALS), notes, places=places)


ROW = Benchmark(
    "files",
    load,
    QUESTION_ANSWERING,
    STREAMS,
    options=("forget", "retain", "holdout"),
    subject="the rows of {forget}",
)
