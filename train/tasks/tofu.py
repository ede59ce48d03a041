"""TOFU (arXiv 2401.06121): fictitious authors, from its JSON files or the Hub."""

from __future__ import annotations

from train.data import tofu
from train.data.task import STREAMS, Task
from train.options.config import RunConfig
from train.options.roles import QUESTION_ANSWERING
from train.tasks.task import Benchmark


def load(config: RunConfig) -> Task:
    """The splits of TOFU that a run names.

    Raises:
        UserError: a file is unusable.
    """
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


ROW = Benchmark(
    "tofu",
    load,
    QUESTION_ANSWERING,
    STREAMS,
    hub="locuslab/TOFU",
    subject="{forget_split} of TOFU",
)
