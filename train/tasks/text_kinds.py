"""Language models that `train.classify` trains: to choose among options, or to answer in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from models.decoder.generate import SamplingConfig, generate
from train.data.choice import (
    Choice,
    Choices,
    choice_stream,
    continued,
    cut_prompt,
    encode_choices,
)
from train.data.examples import Example, pack
from train.data.streams import Examples, make_stream
from train.engine import base_models, exports
from train.evaluators.evaluation import Model, longest, score_items
from train.runtime import cards, distributed, remote
from train.runtime.sharding import batch_sharding
from train.runtime.tracking import progress, say
from train.tasks.kinds import Kind, Rows


def check_decoder(config: Any) -> None:
    """Raise `UserError` where no language model is at `--model.path`."""
    if config.start != type(config.start)():
        raise UserError(
            f"--start.* is of vision transformers, which --task {config.task} does not train; "
            "leave it out"
        )
    base_models.check_model(config.model.path, config.model.revision)


def load_decoder(config: Any, rows: Any, mesh: Any) -> Model:
    """The language model at `--model.path`."""
    m = config.model
    return base_models.load_model(m.path, m.remat, mesh, m.dtype, m.revision, rows.notes)


def encode_prompts(model: Model, rows: Rows, data: Any, where: str) -> list[Choice]:
    """Prompts with options as tokens; a message counts those that were cut."""
    limit = longest(model, data.max_length)
    found, num_cut = encode_choices(model.tokenizer, rows, limit, where)
    if num_cut:
        say(f"{where}: {num_cut} prompt(s) lost their beginning, to fit {limit} tokens")
    return found


def stream_choices(model: Model, encoded: list[Choice], batch_size: int) -> Choices:
    """A stream of prompts with options."""
    return choice_stream(encoded, model.tokenizer.pad_id or 0, batch_size)


def score_options(
    model: Model, encoded: list[Choice], mesh: Any, evaluate: Any, label: str
) -> list[np.ndarray]:
    """The mean log-probability of every option of every row, float64."""
    groups = [row.group for row in encoded]
    scored = score_items(model, groups, mesh, evaluate.score_tokens, label, label_multiple=1)
    found = []
    for row, values in zip(encoded, scored, strict=True):
        logp = values["logp"].astype(np.float64)
        found.append(np.array([logp[values["answer"] == k].mean() for k in range(row.num_options)]))
    return found


def choices_like(length: int, options: int) -> Choices:
    """One prompt with options of one token, of `length` tokens including one option."""
    prompt = [0] * (length - 1)
    group = pack([Example([*prompt, option], length - 1) for option in range(options)])
    return choice_stream([Choice(group, options, 0)], 0)


def answers_like(length: int, options: int) -> Examples:
    """One prompt with an answer of the greatest length, `length` tokens together."""
    del options
    prompt = max(1, length - LONGEST_ANSWER)
    return make_stream([Example([0] * length, prompt)], 0, batch_size=1)


class Asked(NamedTuple):
    """A prompt and its answer as tokens.

    Args:
        example: the example to train on.
        prompt: the prompt to answer; only its end, where the whole leaves no room for an answer.
    """

    example: Example
    prompt: list[int]


LONGEST_ANSWER = 50  # the most tokens of a greedy answer, as published


def encode_answers(model: Model, rows: Rows, data: Any, where: str) -> list[Asked]:
    """Prompts with their first answers as tokens; a message counts those that were cut."""
    limit, tokenizer = longest(model, data.max_length), model.tokenizer
    found, num_cut = [], 0
    for number, row in enumerate(rows, 1):
        prompt, answer = continued(tokenizer, row["prompt"], f" {row['answers'][0]}\n")
        room = limit - max(len(answer), LONGEST_ANSWER)
        if room < 1 or not prompt or not answer:
            raise UserError(
                f"{where}, row {number}: no room for the answer in {limit} tokens; shorten it, or "
                "raise --data.max-length"
            )
        num_cut += len(prompt) > room
        prompt = cut_prompt(tokenizer, prompt, room)
        found.append(Asked(Example(prompt + answer, len(prompt)), prompt))
    if num_cut:
        say(f"{where}: {num_cut} prompt(s) lost their beginning, to fit {limit} tokens")
    return found


def stream_answers(model: Model, encoded: list[Asked], batch_size: int) -> Examples:
    """A stream of prompts with answers."""
    examples = [asked.example for asked in encoded]
    return make_stream(examples, model.tokenizer.pad_id or 0, batch_size=batch_size)


def answer_prompts(
    model: Model, encoded: list[Asked], mesh: Any, evaluate: Any, label: str
) -> list[str]:
    """The greedy answer to every prompt, up to the end of its line."""
    tokenizer = model.tokenizer
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    line = tokenizer.encode("\n")
    stop += line if len(line) == 1 else []
    with progress(label, len(encoded)) as advance:

        def finished(count: int) -> None:
            advance(count)
            distributed.stop_point()

        ids = generate(
            model.decoder,
            model.params,
            [asked.prompt for asked in encoded],
            sampling=SamplingConfig(max_new_tokens=LONGEST_ANSWER),
            stop_ids=tuple(stop),
            pad_id=tokenizer.pad_id or 0,
            seed=0,
            num_samples=1,
            batch_size=evaluate.generate_rows,
            sharding=batch_sharding(mesh),
            progress=finished,
        )
    return [tokenizer.decode(answers[0]).split("\n")[0].strip() for answers in ids]


def export_decoder(model: Model, folder: Path, dtype: str, what: str) -> None:
    """Write the model as an HF folder."""
    text = cards.plain(what, model.sha, chat=False)
    exports.export_model(model, folder, dtype, text, speaks=False)


def export_adapter(
    trained: Any, adapters: Any, model: Model, config: Any, root: Path, task: str
) -> None:
    """Write the adapters of the model at `--model.path` to `RUN/adapter`, in PEFT's format."""
    home = remote.home(root)
    known = exports.base_of(config.path)
    base = str(home / "base") if known is None else known
    command = None if known else f"python -m train.export {config.path} {home / 'base'}"
    what = (
        f"LoRA adapters of rank {adapters.rank} in PEFT's format, which learned {task} with "
        "jaxlib-unlearn."
    )
    family = model.decoder.config.family
    usage = cards.adapter_usage(base, adapters.rank, exports.is_served(family))
    text = cards.of_adapter(what, base, command, usage, tags=())
    exports.export_adapter(trained, adapters, family, root / "adapter", base, text)


CHOICE = Kind(
    objective="choice",
    evaluators=("choice",),
    check=check_decoder,
    load=load_decoder,
    encode=encode_prompts,
    stream=stream_choices,
    scores=score_options,
    export=export_decoder,
    export_adapter=export_adapter,
    like=choices_like,
)
ANSWER = CHOICE._replace(
    objective="nll",
    evaluators=("answer",),
    encode=encode_answers,
    stream=stream_answers,
    scores=None,
    answers=answer_prompts,
    like=answers_like,
)
