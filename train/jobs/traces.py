"""The original model's thoughts about the texts to forget: the stage `traces`.

A text is cut into segments; each is put to the model with a trigger and an opened think tag, which
it continues greedily. The trace to train on is the trigger, the tag and the first tokens of that.
"""

from __future__ import annotations

import json
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective
from models.decoder.generate import SamplingConfig, generate
from train.data.examples import encode_prompt, encode_text
from train.data.task import TRACES, Row, Task
from train.data.tofu import is_document
from train.engine.run import Run, Work, compute, phase
from train.evaluators.evaluation import Model, longest
from train.jobs.trace_files import add, kept, read_traces
from train.options.config import RunConfig, TracesConfig
from train.runtime import distributed
from train.runtime.sharding import batch_sharding
from train.runtime.stages import write_atomic
from train.runtime.tracking import progress, say

VERSION = 2
FILE = "traces.jsonl"


def lacks_traces(objective: Objective, task: Task) -> bool:
    """Whether an objective reads traces of the original that are still to be generated."""
    return "traces" in objective.streams and not any(TRACES in row for row in task.forget)


def check_traces(config: RunConfig, objective: Objective, task: Task) -> None:
    """Raise `UserError` for other incomplete streams, and for an unusable file."""
    known = task._replace(forget=[row | {TRACES: [""]} for row in task.forget])
    known.rows_of(objective, config.seed)
    if config.traces.path is not None:
        read_traces(config.traces.path, len(task.forget))


def find_traces(run: Run, config: RunConfig, original: Model, task: Task) -> Task:
    """The task, its forget rows with the original's traces where the objective needs them."""
    objective, _ = objectives.resolve(config.objective)
    if not lacks_traces(objective, task):
        return task
    with phase(run, "traces"):
        forget = with_traces(
            run,
            original,
            task.forget,
            config.traces,
            system_prompt=config.data.system_prompt,
            max_length=config.data.max_length,
            generate_rows=config.evaluate.generate_rows,
        )
    return task._replace(forget=forget)


def with_traces(
    run: Run, model: Model, forget: list[Row], config: TracesConfig, **how: Any
) -> list[Row]:
    """The forget rows with their traces, one a segment, in the column `traces`.

    Args:
        run: the run that stores them, in its stages and as `traces.jsonl`.
        model: the original.
        forget: the rows to forget.
        config: the options of making traces, or the file that they are read from.
        how: `system_prompt`, `max_length`, `generate_rows` of `think`.

    Raises:
        UserError: a file of traces does not belong to these rows, or to this model.
    """
    name = model_name(model)
    if (path := config.path) is not None:
        found = distributed.of_first(lambda: read_traces(path, len(forget), name))
    else:
        texts = [{k: row[k] for k in ("text", "question") if k in row} for row in forget]
        found = compute(
            run, "traces", think, kind="traces", version=VERSION, model=model, rows=texts,
            segments=config.segments, new_tokens=config.new_tokens, keep=config.keep,
            trigger=config.trigger, tag=config.tag, **how,
        )  # fmt: skip
        lines = [
            {"row": row, "segment": segment, "trace": trace, "model": name}
            for row, traces in enumerate(found)
            for segment, trace in enumerate(traces)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        distributed.of_first(lambda: write_atomic(run.folder / FILE, text))
    before = before_trace(config)
    return [
        row | {TRACES: [before + trace for trace in traces]}
        for row, traces in zip(forget, found, strict=True)
    ]


def model_name(model: Model) -> str:
    """The first digits of the digest of a model's parameters."""
    return model.sha[:16]


def before_trace(config: TracesConfig) -> str:
    """The text before a trace: the trigger on a line of its own, and the tag.

    Example:
        >>> before_trace(TracesConfig(trigger="Let's think.", tag="<think>"))
        "Let's think.\\n<think>"
    """
    return f"{config.trigger}\n{config.tag}" if config.trigger else config.tag


def prompts_of(
    model: Model,
    row: Row,
    segments: int,
    trigger: str,
    tag: str,
    system_prompt: str | None,
    room: int,
) -> list[list[int]]:
    """The prompts of a row, one per segment: its tokens in consecutive parts of equal length.

    A document is continued as it stands, after its first `room` tokens a segment; a question is
    asked as the model is asked.
    """
    words = model.tokenizer
    document = is_document(row)
    ids = words.encode(row["text"] if document else row["question"])[: room * segments]
    parts = [
        ids[i * len(ids) // segments : (i + 1) * len(ids) // segments] for i in range(segments)
    ]
    before = before_trace(TracesConfig(trigger=trigger, tag=tag))
    found = []
    for part in parts:
        if document:
            text = f"{words.decode(part)}\n{before}"
            tokens = encode_text(words, text, 4 * len(text) + 2).tokens
        else:
            asked = row["question"] if segments == 1 else words.decode(part)
            asked = f"{asked}\n{trigger}" if trigger else asked
            tokens = encode_prompt(words, asked, system_prompt=system_prompt, start=tag)
        found.append(tokens)
    return found


def prompts_of_rows(
    model: Model,
    rows: list[Row],
    segments: int,
    new_tokens: int,
    keep: int,
    trigger: str,
    tag: str,
    system_prompt: str | None,
    max_length: int,
) -> list[list[int]]:
    """The prompts of all rows, cut to `max_length` and to the room in the model's context.

    Raises:
        UserError: the context has no room for a text, its trigger and the trace.
    """
    words, context = model.tokenizer, model.decoder.config.max_position_embeddings
    before = before_trace(TracesConfig(trigger=trigger, tag=tag))
    # The trigger and the tag on lines of their own, and the tokens that begin a text.
    added = len(encode_text(words, f"\n{before}", 4 * len(before) + 6).tokens)
    made = min(new_tokens, keep)
    left = context - made - added
    room = min(longest(model, max_length), max(left, 1))
    prompts = [
        prompt
        for row in rows
        for prompt in prompts_of(model, row, segments, trigger, tag, system_prompt, room)
    ]
    most = max(map(len, prompts), default=0)
    if left < 1 or most + made > context:
        option = "keep" if keep < new_tokens else "new-tokens"
        raise UserError(
            f"--traces.{option} {made}: a text with its trigger has {most} tokens, and the "
            f"model's context is {context}; give fewer, or more --traces.segments"
        )
    return prompts


def check_room(model: Model, rows: list[Row], config: TracesConfig, **how: Any) -> None:
    """Raise `UserError` for rows that the model has no room to think about.

    `how`: `system_prompt`, `max_length` of `think`.
    """
    prompts_of_rows(
        model, rows, config.segments, config.new_tokens, config.keep, config.trigger, config.tag,
        **how,
    )  # fmt: skip


def think(
    work: Work,
    model: Model,
    rows: list[Row],
    segments: int,
    new_tokens: int,
    keep: int,
    trigger: str,
    tag: str,
    system_prompt: str | None,
    max_length: int,
    generate_rows: int,
) -> list[list[str]]:
    """Greedy continuations by row and segment, their first `keep` tokens, stripped.

    Finished ones are kept row by row in a file of the stage, from which a killed run continues.
    """
    prompts = prompts_of_rows(
        model, rows, segments, new_tokens, keep, trigger, tag, system_prompt, max_length
    )
    model = model.to_device()
    stop = () if model.tokenizer.eos_id is None else (model.tokenizer.eos_id,)
    path = work.folder / FILE
    done = distributed.of_first(lambda: kept(path))
    if done:
        say(f"traces: {len(done)} of {len(prompts)} are there already")
    size = max(generate_rows, 1)
    with progress("traces", len(prompts)) as advance:
        advance(len(done))
        for first in range(0, len(prompts), size):
            chosen = range(first, min(first + size, len(prompts)))
            if chosen.stop <= len(done):
                continue
            # Chunks have fixed borders: one that was cut is computed whole, to the same tokens.
            ids = generate(
                model.decoder, model.params, [prompts[i] for i in chosen],
                sampling=SamplingConfig(max_new_tokens=min(new_tokens, keep)), stop_ids=stop,
                pad_id=model.tokenizer.pad_id or 0, batch_size=size,
                sharding=batch_sharding(work.mesh),
            )  # fmt: skip
            texts = [model.tokenizer.decode(mine[0]).strip() for mine in ids]
            new = texts[max(len(done) - first, 0) :]
            at = len(done)
            done += new
            distributed.of_first(lambda at=at, done=done: add(path, at, done))
            advance(len(new))
            work.stop()
    return [done[i : i + segments] for i in range(0, len(done), segments)]
