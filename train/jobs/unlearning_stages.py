"""The stages of the unlearning job, and their streams: rows as the model reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective
from train.data.examples import Encoded, encode_rows
from train.data.streams import Examples, make_stream
from train.data.task import Row, Task
from train.engine import exports
from train.engine.replays import stored
from train.engine.run import Run, Watch, edit, phase, train
from train.evaluators.evaluation import Model, curve, longest
from train.options.config import LoraConfig, RunConfig
from train.options.recipe import Recipe, recipe_of
from train.runtime import cards, remote
from train.runtime.tracking import say

CURVE_ROWS = 40


def learning(config: RunConfig) -> Recipe:
    """The recipe of the original and the oracle."""
    return recipe_of(config.finetune, config.data.row_tokens)


def forgetting(config: RunConfig) -> Recipe:
    """The recipe of the unlearned model."""
    return Recipe(
        config.unlearn,
        config.optimizer,
        config.combine,
        config.lora,
        config.data.row_tokens,
        config.profile,
        config.train,
    )


def finetune(
    run: Run,
    config: RunConfig,
    name: str,
    base: Model,
    rows: list[Row],
    among: list[Row] | None = None,
    record: str | None = None,
) -> Model:
    """Plain fine-tuning of `base`: the original (forget + retain) or the oracle (retain alone).

    `among`: the rows whose sizes determine the programs, where stages on other rows share them.
    `record`: the file of a zeroth-order optimizer's coefficients; None: `replay-NAME.zo`.
    """
    with phase(run, name):
        encoded = encode(base, rows, config, name)
        sizes = None if among is None else encode_all(base, among, config)
        stream = stream_of(base, encoded, config.finetune.batch_size, sized_by=sizes)
        return train(
            run,
            name,
            base,
            objectives.resolve("nll"),
            {"train": stream},
            learning(config),
            record=record,
        )


def unlearn(
    run: Run, config: RunConfig, original: Model, task: Task, base: Model | None = None
) -> Model:
    """The unlearning stage: the objective's streams, its caches, its optimizer.

    A row that does not train computes its model from the original and from `base`, the model before
    it learnt the facts; None: the original.
    """
    objective, options = resolved(config, original, task)
    # Objectives without topics of their own ignore the column, whatever it holds.
    topics = getattr(options, "topics", ())
    streams = unlearning_streams(config, objective, original, task, topics)

    def look(model: Model) -> dict[str, float]:
        data, tokens = config.data, config.evaluate.score_tokens
        return curve(model, task, data.system_prompt, data.max_length, run.mesh, tokens, CURVE_ROWS)

    adapters, family = config.lora, original.decoder.config.family
    with phase(run, "unlearned"):
        if not objective.trains:
            before = original if base is None else base
            row = objective, options
            return edit(run, "unlearned", original, row, streams, base=before)
        return train(
            run,
            "unlearned",
            original,
            (objective, options),
            streams,
            forgetting(config),
            record=stored.NAME,
            watch=(Watch(look, config.unlearn.curve_points),),
            keep=None
            if adapters.rank is None
            else lambda tree: export_adapter(tree, adapters, config, run.folder, family),
        )


def export_adapter(
    trained: Any, adapters: LoraConfig, config: RunConfig, root: Path, family: str
) -> None:
    """Write the adapters trained beside the original to `RUN/adapter`, in PEFT's format.

    It belongs to the original as the run has it: the given one, or that trained in the run, which
    `train.export RUN RUN/original --model original` writes where the adapter looks for it.
    """
    home = remote.home(root)
    given = config.stage.original
    known = None if given is None else exports.base_of(given)
    base = str(home / "original") if known is None else known
    rank = adapters.rank or 1
    what = f"LoRA adapters of rank {rank} in PEFT's format, trained by jaxlib-unlearn to forget."
    command = f"python -m train.export {home} {home / 'original'} --model original"
    usage = cards.adapter_usage(base, rank, exports.is_served(family))
    text = cards.of_adapter(what, base, None if known else command, usage)
    exports.export_adapter(trained, adapters, family, root / "adapter", base, text)


def encode(
    model: Model, rows: list[Row], config: RunConfig, what: str, length: int | None = None
) -> Encoded:
    """Tokenise a stream; a message counts cut and dropped rows."""
    limit = longest(model, length or config.data.max_length)
    encoded = encode_all(model, rows, config, length)
    if encoded.num_cut or encoded.num_dropped:
        say(
            f"{what}: {encoded.num_cut} example(s) cut at {limit} tokens, {encoded.num_dropped} "
            "left out (prompt too long)"
        )
    return encoded


def encode_all(
    model: Model, rows: list[Row], config: RunConfig, length: int | None = None
) -> Encoded:
    """Tokenise rows as the model reads them."""
    return encode_rows(
        model.tokenizer,
        rows,
        system_prompt=config.data.system_prompt,
        max_length=longest(model, length or config.data.max_length),
    )


def stream_of(
    model: Model,
    encoded: Encoded,
    batch_size: int,
    follows: str | None = None,
    sized_by: Encoded | None = None,
) -> Examples:
    """A training stream of encoded examples; `follows`: the stream that it is paired with."""
    return make_stream(
        encoded.examples,
        model.tokenizer.pad_id or 0,
        batch_size=batch_size,
        follows=follows,
        sized_by=None if sized_by is None else sized_by.examples,
    )


def topics_of(rows: list[Row]) -> tuple[str, ...]:
    """The topics of rows, sorted; a row without one is of the topic "".

    Raises:
        UserError: a topic is no text.
    """
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("topic", ""), str):
            raise UserError(
                f"forget row {number}: column 'topic' must hold a text, by which this objective "
                "moves rows to different vectors; correct it, or leave the column out"
            )
    return tuple(sorted({row.get("topic", "") for row in rows}))


def resolved(config: RunConfig, model: Model, task: Task) -> tuple[Objective, Any]:
    """The objective and its options, completed with values from the tokenizer and the rows."""
    objective, options = objectives.resolve(config.objective)
    if objective.fit is None:
        return objective, options
    facts = objectives.Facts(model.tokenizer.backend.token_to_id, topics_of(task.forget))
    return objectives.resolve(objective.fit(options, facts))


def unlearning_streams(
    config: RunConfig,
    objective: Objective,
    original: Model,
    task: Task,
    topics: tuple[str, ...] = (),
) -> dict[str, Examples]:
    """The streams that an objective reads, tokenised for the model.

    `topics`: the topics that have vectors; only their rows get the column `topic` of numbers.
    """
    size = config.unlearn.batch_size
    streams = {}
    for name, rows in task.rows_of(objective, config.seed).items():
        encoded = encode(original, rows, config, name, task.lengths.get(name))
        stream = stream_of(original, encoded, size, task.follows(name))
        mine = [rows[i].get("topic", "") for i in encoded.row_ids]
        if topics and all(topic in topics for topic in mine):
            numbers = np.array([topics.index(topic) for topic in mine], np.int32)
            stream = dataclasses.replace(stream, columns={"topic": numbers})
        streams[name] = stream
    return streams
