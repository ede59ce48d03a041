"""Reasoning: facts that a model recalls in thoughts, and other reasoning that it should keep.

Three sources: generated authors, TOFU with thoughts, and rows of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train.data import author_reasoning, thoughts, tofu
from train.data.author_attributes import REFUSALS
from train.data.task import STREAMS, TRACES, Paired, Row, Rows, Task
from train.evaluators import REASONING_QUESTIONS
from train.options.config import RunConfig
from train.tasks.task import Benchmark, no_splits

FORGOTTEN = 5  # one author in so many is forgotten
ARITHMETIC, ARITHMETIC_HELD = 600, 120  # generated rows to learn, and rows to ask
REASONING_HELD = 40  # rows of a file to ask
FILES = ("forget.jsonl", "retain.jsonl")


def task_of(forget: list[Row], retain: list[Row], held: list[Row], notes: list[str]) -> Task:
    """A task of learned rows; `held` is reasoning that no model is trained on.

    Documents are trained on and not asked.
    """
    facts = [row for row in retain if not thoughts.is_reasoning(row)]
    splits = {"forget": forget, "retain": facts, "reasoning": held}
    asked = {name: [r for r in rows if "question" in r] for name, rows in splits.items()}
    counts = f"{len(forget)} rows to forget, {len(facts)} facts and {len(retain) - len(facts)} rows"
    notes = [f"{counts} of reasoning to keep, {len(held)} rows of reasoning to ask", *notes]
    judged = {name: rows for name, rows in asked.items() if rows}
    return Task(forget, retain, judged, list(REFUSALS), notes)


def load_authors(config: RunConfig) -> Task:
    """Generated authors, one in five of whom is forgotten, and arithmetic.

    Raises:
        UserError: an option belongs to another source, or the number of authors is unusable.
    """
    data = config.data
    if data.path is not None or data.reasoning is not None:
        raise UserError(
            "--data.path and --data.reasoning do not go with generated authors; leave them out, or "
            "choose another --data.source"
        )
    no_splits(data, "generated authors, whose rows to keep are generated too")
    seed = config.seed if data.seed is None else data.seed
    try:
        authors = author_reasoning.author_rows(seed, data.num_authors)
    except ValueError as error:
        raise UserError(f"--data.num-authors {data.num_authors}: {error}") from None
    cut = max(1, len(authors) // FORGOTTEN)
    forget, kept = (
        [row for rows in part for row in rows] for part in (authors[:cut], authors[cut:])
    )
    if not kept:
        raise UserError(
            f"--data.num-authors {data.num_authors}: nobody is left to keep; give 2 or more"
        )
    numbers = author_reasoning.arithmetic_rows(seed, ARITHMETIC + ARITHMETIC_HELD)
    task = task_of(
        forget[: data.forget_rows], kept + numbers[:ARITHMETIC], numbers[ARITHMETIC:], []
    )
    judged = task.evaluation["retain"][: data.retain_rows]
    return task._replace(evaluation=task.evaluation | {"retain": judged})


def load_tofu(config: RunConfig) -> Task:
    """TOFU's splits with thoughts, mixed with rows of GSM8K.

    Raises:
        UserError: a file is unusable, or there is no file of reasoning.
    """
    data = config.data
    if data.reasoning is None:
        raise UserError(
            "--data.source reasoning-tofu mixes TOFU with reasoning to keep: give --data.reasoning "
            "FILE, rows of GSM8K"
        )
    found = tofu.load_tofu(
        data.path, data.forget_split, data.retain_split, judged_split=data.judged_retain_split,
        forget_rows=data.forget_rows, retain_rows=data.retain_rows,
        judged_rows=data.retain_rows, extra_rows=0, holdout_rows=0, revision=data.revision,
    )  # fmt: skip
    numbers = thoughts.from_gsm8k(data.reasoning.expanduser())
    count = min(data.reasoning_rows, len(numbers) - 1)
    if count < 1:
        raise UserError(f"--data.reasoning {data.reasoning} needs two rows or more")
    forget, kept = (
        thoughts.from_tofu(found.forget, "tofu"),
        thoughts.from_tofu(found.judged, "tofu"),
    )
    held = numbers[count : count + REASONING_HELD]
    return task_of(forget, kept + numbers[:count], held, list(found.notes))


def load_files(config: RunConfig) -> Task:
    """`forget.jsonl` and `retain.jsonl` of `--data.path`; rows of topic `reasoning` are to be kept.

    A tenth of those (at most 40) is asked and not trained on.

    Raises:
        UserError: there is no folder, or a file is unusable.
    """
    data = config.data
    if data.path is None:
        raise UserError(
            "--data.source reasoning reads rows of your own: give --data.path DIR with "
            f"{' and '.join(FILES)}"
        )
    no_splits(data, "--data.source reasoning, whose files are the splits")
    forget, retain = (thoughts.read_rows(Path(data.path).expanduser() / name) for name in FILES)
    reasoning = [row for row in retain if thoughts.is_reasoning(row)]
    facts = [row for row in retain if not thoughts.is_reasoning(row)]
    if not facts:
        raise UserError(
            f"{data.path}/{FILES[1]}: every row is of topic {thoughts.REASONING}; add facts to keep"
        )
    for number, row in enumerate(forget, 1):
        if thoughts.is_reasoning(row):
            raise UserError(
                f"{data.path}/{FILES[0]}, row {number}: topic {thoughts.REASONING!r} is that of "
                "rows to keep; give it another one"
            )
    thoughts.check_traces(forget, TRACES, Path(data.path).expanduser() / FILES[0])
    held = min(REASONING_HELD, len(reasoning) // 10)
    task = task_of(forget[: data.forget_rows], facts + reasoning[held:], reasoning[:held], [])
    if not task.evaluation:
        raise UserError(
            f"{data.path}: no row asks a question, so nothing would be judged; add rows with "
            "'question', 'thoughts' and 'answer', or ten or more of topic "
            f"{thoughts.REASONING!r} to {FILES[1]}"
        )
    return task


def trace_rows(task: Task, seed: int) -> list[Row]:
    """The traces of the rows to forget, equally many each: stream `traces`."""
    del seed
    return [
        {"text": text} | {name: row[name] for name in ("topic",) if name in row}
        for row in task.forget
        for text in row[TRACES]
    ]


def cot_rows(task: Task, seed: int) -> list[Row]:
    """The thoughts of the reasoning to keep: stream `cot`.

    Raises:
        UserError: there is none.
    """
    del seed
    found = [thoughts.thought(row) for row in task.retain if thoughts.is_reasoning(row)]
    if not found:
        raise UserError(
            "this objective keeps reasoning, and no row to keep is of topic "
            f"{thoughts.REASONING!r}; add such rows, or set --objective.cot-weight 0"
        )
    return found


def asked_traces(task: Task, seed: int) -> list[Row]:
    """The traces behind their questions, as the original wrote them: stream `traces` of authors."""
    del seed
    return [
        {"question": row["question"], "answer": text, "topic": row["topic"]}
        for row in task.forget
        for text in row[TRACES]
    ]


def learned_rows(task: Task, seed: int) -> list[Row]:
    """All rows to keep as they were learned, facts too: stream `cot` of authors.

    Thoughts about an author who is forgotten differ from those about another by the name alone:
    without the latter a model forgets to think of anyone.
    """
    del seed
    return [{"question": row["question"], "answer": row["answer"]} for row in task.retain]


def bare_rows(rows: list[Row]) -> list[Row]:
    """The facts of rows without their thoughts."""
    return [thoughts.bare(row) for row in rows if not thoughts.is_reasoning(row)]


# Facts are forgotten and kept as questions with answers only; thoughts have their own streams.
REASONING_STREAMS: Mapping[str, Rows] = {
    "forget": lambda task, seed: bare_rows(task.forget),
    "retain": lambda task, seed: bare_rows(task.retain),
    "traces": Paired(trace_rows, "forget"),
    "cot": cot_rows,
    **{name: STREAMS[name] for name in ("idk", "train")},
}
# A small model that has seen thoughts only behind their questions does not transfer to them
# the training on thoughts alone that suffices for the large models of the published runs.
AUTHORS_STREAMS: Mapping[str, Rows] = {
    **REASONING_STREAMS,
    "traces": Paired(asked_traces, "forget"),
    "cot": learned_rows,
}

ROWS = (
    Benchmark(
        "reasoning-authors",
        load_authors,
        REASONING_QUESTIONS,
        AUTHORS_STREAMS,
        subject="the traces about some of {num_authors} invented authors",
    ),
    Benchmark(
        "reasoning-tofu",
        load_tofu,
        REASONING_QUESTIONS,
        REASONING_STREAMS,
        hub="locuslab/TOFU",
        subject="the traces about {forget_split} of TOFU",
    ),
    Benchmark(
        "reasoning",
        load_files,
        REASONING_QUESTIONS,
        REASONING_STREAMS,
        subject="the traces of {forget}",
    ),
)
