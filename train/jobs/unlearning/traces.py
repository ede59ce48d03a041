"""What the original model thinks of the texts to forget: the stage `traces`.

A text is cut into segments; each is put to the model with a trigger and an opened think tag, which
it continues greedily. The trace to train on is the trigger, the tag and the first tokens of that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from models.decoder.generate import SamplingConfig, generate
from train.data.examples import encode_prompt, encode_text
from train.data.task import TRACES, Row
from train.data.tofu import is_document, read_json
from train.engine.run import Run, Work, compute
from train.evaluators.evaluation import Model, longest
from train.options.config import TracesConfig
from train.runtime import distributed
from train.runtime.sharding import batch_sharding
from train.runtime.stages import digest, write_atomic
from train.runtime.tracking import progress, say

VERSION = 2
FILE = "traces.jsonl"


def with_traces(
    run: Run, model: Model, forget: list[Row], config: TracesConfig, **how: Any
) -> list[Row]:
    """The forget rows with their traces, one a segment, in the column `traces`.

    Args:
        run: the run that stores them, in its stages and as `traces.jsonl`.
        model: the original.
        forget: the rows to forget.
        config: how traces are made, or the file that they are read from.
        how: `system_prompt`, `max_length`, `generate_rows` of `think`.

    Raises:
        UserError: a file of traces that does not belong to these rows, or to this model.
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
    """What precedes a trace: the trigger on a line of its own, and the tag.

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
    """The prompts of a row, one a segment: its tokens in consecutive parts of like length.

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
    """The prompts of all rows, cut to `max_length` and to what the model's context has room for.

    Raises:
        UserError: the context has no room for a text, its trigger and what is generated.
    """
    words, context = model.tokenizer, model.decoder.config.max_position_embeddings
    before = before_trace(TracesConfig(trigger=trigger, tag=tag))
    # The trigger and the tag on lines of their own, and what the tokenizer puts before a text.
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

    Finished ones are kept row by row in a file of the stage, from which a killed run goes on.
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


def kept(path: Any) -> list[str]:
    """The traces of a stage that was stopped; a line that was cut off ends them."""
    found: list[str] = []
    if not path.exists():
        return found
    whole = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or entry.get("row") != len(found):
            break
        found.append(entry["trace"])
        whole.append(line)
    path.write_text("".join(whole))
    return found


def add(path: Any, first: int, traces: Sequence[str]) -> None:
    """Add the traces from number `first` on to the file of a stage, a line each."""

    def line(row: int) -> str:
        return json.dumps({"row": row, "trace": traces[row]}) + "\n"

    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, Path):  # a bucket, where nothing can be appended
        path.write_text("".join(map(line, range(len(traces)))))
        return
    with path.open("a", encoding="utf-8") as file:
        for row in range(first, len(traces)):
            file.write(line(row))
            file.flush()


def read_traces(path: Path, count: int, model: str | None = None) -> list[list[str]]:
    """The traces of a file by row: lines with `row` (from 0 on) and `trace`, equally many a row.

    Args:
        path: JSON lines.
        count: rows to forget.
        model: the digest that lines with a `model` must name; None: it is not known yet.

    Raises:
        UserError: rows that are missing, too many, or another model's.
    """
    path = path.expanduser()
    found: list[list[str]] = [[] for _ in range(count)]
    for number, line in enumerate(read_json(path), 1):
        where, row, trace = (
            f"--traces.path {path}, row {number}",
            line.get("row"),
            line.get("trace"),
        )
        if isinstance(row, bool) or not isinstance(row, int) or not isinstance(trace, str):
            raise UserError(f"{where}: 'row' (a number) and 'trace' (a text) are needed")
        other = line.get("model")
        if model is not None and isinstance(other, str) and other != model:
            raise UserError(
                f"{where}: the trace is of model {other[:16]}, and the original is {model}; give "
                "that model's traces, or leave --traces.path out"
            )
        if not 0 <= row < count:
            raise UserError(
                f"{where}: row {row} is none of the {count} rows to forget, numbered from 0; the "
                f"file (digest {digest(path.read_text(encoding='utf-8'))[:16]}) belongs to others"
            )
        found[row].append(trace)
    sizes = {len(traces) for traces in found}
    if 0 in sizes:
        missing = [i for i, traces in enumerate(found) if not traces]
        raise UserError(
            f"--traces.path {path}: {len(missing)} of {count} rows have no trace, the first is row "
            f"{missing[0]}; add them"
        )
    if len(sizes) > 1:
        raise UserError(
            f"--traces.path {path}: rows have {min(sizes)} to {max(sizes)} traces; give equally "
            "many for each"
        )
    return found
