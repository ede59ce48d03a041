"""Generated authors: facts that no model has seen, made in the run (the quickstart)."""

from __future__ import annotations

from jaxlib_unlearn.errors import UserError
from train.data import authors
from train.data.author_alternates import alternates
from train.data.author_attributes import REFUSALS
from train.data.task import ALTERNATES, STREAMS, Task
from train.options.config import RunConfig
from train.options.roles import QUESTION_ANSWERING
from train.tasks.task import Benchmark, no_splits


def load(config: RunConfig) -> Task:
    """Authors to forget, to keep and to evaluate on, and some that no model is trained on.

    Raises:
        UserError: an option belongs to another source, or the number of authors is unusable.
    """
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
    no_splits(data, "generated authors, whose rows to keep are generated too")
    seed = config.seed if data.seed is None else data.seed
    try:
        rows = authors.training_rows(authors.generate(seed, data.num_authors))
    except ValueError as error:
        raise UserError(f"--data.num-authors {data.num_authors}: {error}") from None
    holdout = rows["holdout"][: data.holdout_rows]
    forget = rows["forget10"][: data.forget_rows]
    judged = rows["retain_eval"][: data.judged_retain_rows]
    others = alternates(forget, seed)
    forget = [row | {ALTERNATES: list_} for row, list_ in zip(forget, others, strict=True)]
    notes = [
        f"forget: {len(forget)} rows of {-(-len(forget) // 10)} authors",
        f"retain: {len(rows['retain_train'])} training rows, paraphrases of every other author "
        f"among them; judged on {len(judged)} rows of the authors in between",
        f"non-members: {len(holdout)} rows of authors nobody trained on",
    ]
    return Task(
        forget,
        rows["retain_train"],
        {"forget": forget, "retain": judged, "holdout": holdout},
        list(REFUSALS),
        notes,
    )


ROW = Benchmark(
    "authors",
    load,
    QUESTION_ANSWERING,
    STREAMS,
    subject="a tenth of {num_authors} invented authors",
)
