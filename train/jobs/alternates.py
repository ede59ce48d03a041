"""Alternate answers to the forget questions, sampled from the model before it learnt the facts.

Answered questions of the retain rows serve as few-shot examples, so that the model answers in their
style; what it says about the facts to forget is then made up, as an oracle's answers are, for the
cost of some sampling instead of a training run. The true answers are never shown.

AltPO (Mekala et al. 2024, arXiv 2409.13474) samples them from the model that knows the facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.text import unfinished
from jaxlib_unlearn.objectives import Objective
from models.decoder.generate import SamplingConfig
from train.data.examples import encode_prompt
from train.data.task import ALTERNATES, Row, Task
from train.engine.run import Run, Work, compute, phase
from train.evaluators.evaluation import Answers, Model, answer_rows
from train.options.config import RunConfig
from train.runtime.tracking import say

VERSION = 1
SHOTS = 6  # the retain rows before every question
ROUNDS = 3  # the rounds of sampling for questions with too few complete answers
WHOLE = "This is what a whole answer is like."  # the reference of `unfinished`


def lacks_alternates(objective: Objective, task: Task) -> bool:
    """Whether an objective teaches other answers that the rows to forget do not have."""
    return "alternate" in objective.streams and not any(ALTERNATES in row for row in task.forget)


def check_alternates(config: RunConfig) -> None:
    """Raise `UserError` where there is no model to sample other answers from."""
    outside = config.stage.original is not None
    if outside or config.model.path == "scratch":
        why = (
            "the model of --stage.original knows the facts already"
            if outside
            else "a model from scratch has nothing to say yet"
        )
        raise UserError(
            f"objective {config.objective.name!r} teaches other answers, which the forget rows do "
            f"not bring, and {why}; give the rows a column {ALTERNATES!r} (a text, or a list of "
            "texts), or choose another --objective.name"
        )


def find_alternates(run: Run, config: RunConfig, base: Model, task: Task) -> Task:
    """The task; its forget rows get other answers where the objective needs them."""
    objective, _ = objectives.resolve(config.objective)
    if not (config.data.alternates and lacks_alternates(objective, task)):
        return task
    with phase(run, "alternates"):
        forget = with_alternates(
            run,
            base,
            task.forget,
            task.retain,
            system_prompt=config.data.system_prompt,
            count=config.data.alternates,
            max_new_tokens=config.evaluate.max_new_tokens,
            generate_rows=config.evaluate.generate_rows,
            temperature=config.data.alternate_temperature,
        )
    return task._replace(forget=forget)


def with_alternates(
    run: Run,
    base: Model,
    forget: list[Row],
    retain: list[Row],
    **how: Any,
) -> list[Row]:
    """The forget rows with `count` alternate answers each, in the column `alternate_answer`.

    Args:
        run: the run that stores them.
        base: the model before it learnt the facts.
        forget: rows without alternate answers.
        retain: rows from which the few-shot examples are drawn.
        how: the arguments `system_prompt`, `count`, `max_new_tokens`, `generate_rows` and
            `temperature` of `sample`.

    Raises:
        UserError: a question alone does not fit into the model's context.
    """
    questions = [row["question"] for row in forget]
    shown = [[row["question"], row["answer"]] for row in retain]
    found = compute(
        run,
        "alternates",
        sample,
        kind="alternates",
        version=VERSION,
        model=base,
        questions=questions,
        kept=shown,
        **how,
    )
    return [row | {ALTERNATES: texts} for row, texts in zip(forget, found, strict=True)]


def sample(
    work: Work,
    model: Model,
    questions: list[str],
    kept: list[list[str]],
    system_prompt: str | None,
    count: int,
    max_new_tokens: int,
    generate_rows: int,
    temperature: float = 1.0,
) -> list[list[str]]:
    """`count` answers to each question, complete ones first.

    A round draws `2 * count` answers (of that temperature, nucleus 0.9) to each question that has
    too few complete ones. Answers that were cut off are used only where all rounds gave too few
    others.
    """
    keys = jax.random.split(work.key, ROUNDS + 1)
    shown = jax.random.permutation(keys[0], len(kept))[:SHOTS].tolist()
    shots = tuple((kept[i][0], kept[i][1]) for i in shown)
    rows = [{"question": question} for question in questions]
    model = _showing(model, shots, rows, system_prompt, max_new_tokens).to_device()
    sampling = SamplingConfig(temperature, 0.9, 0, max_new_tokens)
    whole: list[list[str]] = [[] for _ in rows]
    rest: list[list[str]] = [[] for _ in rows]
    for turn in range(ROUNDS):
        open_ = [i for i, texts in enumerate(whole) if len(texts) < count]
        if not open_:
            break
        drawn = answer_rows(
            model,
            [rows[i] for i in open_],
            "question",
            system_prompt,
            sampling,
            2 * count,
            keys[turn + 1],
            generate_rows,
            work.mesh,
            "alternates",
        )
        sort(drawn, open_, max_new_tokens, whole, rest)
    return [(good + cut)[:count] for good, cut in zip(whole, rest, strict=True)]


def sort(
    drawn: Answers,
    places: Sequence[int],
    limit: int,
    whole: list[list[str]],
    rest: list[list[str]],
) -> None:
    """Add new answers to those of their questions: complete ones, and others that are not empty.

    Example:
        >>> whole, rest = [[]], [[]]
        >>> texts = [["She was born in Lima.", "She was born in", "", "She was born in Lima."]]
        >>> sort(Answers(texts, [[[1] * 5, [1] * 8, [], [1] * 5]]), [0], 8, whole, rest)
        >>> whole, rest
        ([['She was born in Lima.']], [['She was born in']])
    """
    for place, texts, ids in zip(places, drawn.texts, drawn.ids, strict=True):
        for text, tokens in zip(texts, ids, strict=True):
            if not text.strip() or text in whole[place] or text in rest[place]:
                continue
            good = len(tokens) < limit and not unfinished(text, WHOLE)
            (whole if good else rest)[place].append(text)


def _showing(
    model: Model,
    shots: tuple[tuple[str, str], ...],
    rows: Sequence[Row],
    system_prompt: str | None,
    new_tokens: int,
) -> Model:
    """The model with as many shown rows before every question as its context can hold."""
    size, context = 0, model.decoder.config.max_position_embeddings
    for count in range(len(shots), -1, -1):
        words = model.tokenizer
        words = words.formatted(words.format._replace(shots=shots[:count]))
        prompts = (encode_prompt(words, r["question"], system_prompt=system_prompt) for r in rows)
        size = max(map(len, prompts))
        if size + new_tokens <= context:
            if count < len(shots):
                say(f"alternates: the context has room for {count} of {len(shots)} shown rows")
            return model._replace(tokenizer=words)
    raise UserError(
        f"--data.alternates: a question has {size} tokens, and with {new_tokens} new ones the "
        f"model's context of {context} is too short; give the rows a column {ALTERNATES!r}"
    )
