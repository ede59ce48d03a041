"""Plain texts: documents to forget and to keep, cut into chunks by the model's tokenizer.

A model learns chunks by next-token loss; it is judged by how much of a chunk's second half
the model writes after its first. Without files the documents are pages about fictitious authors.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import read_text
from train.data import authors, tofu
from train.data.examples import encode_text
from train.data.task import STREAMS, Row, Task
from train.options.config import DataConfig, RunConfig
from train.tasks.task import Benchmark, no_splits

TEXTS, ROWS_OF_TEXTS = (".txt", ".md"), (".jsonl", ".json")
SIDES = ("forget", "retain", "holdout")
LEAST = 16  # the fewest tokens of a chunk, which has a start and a continuation
ADVICE = "save it as UTF-8 text"


def load(config: RunConfig) -> Task:
    """The documents of `--data.forget`, `--data.retain` and `--data.holdout`, or generated pages.

    Raises:
        UserError: a file is unusable, or an option belongs to another source.
    """
    data = config.data
    if data.path is not None:
        raise UserError(
            "--data.path does not go with --data.source documents; give the files as "
            "--data.forget and --data.retain"
        )
    no_splits(data, "documents, whose files are the splits")
    if not (data.forget or data.retain or data.holdout):
        seed = config.seed if data.seed is None else data.seed
        found = generated(seed, data)
    else:
        found = {side: read(getattr(data, side), f"--data.{side}") for side in SIDES}
        for side in ("forget", "retain"):
            if not found[side]:
                raise UserError(f"--data.{side} FILE is missing; give one or more texts or folders")
    forget = found["forget"][: data.forget_rows]
    if tofu.overlap(forget, found["retain"]) == len(forget):
        raise UserError(
            "every document of --data.forget is also in --data.retain, so nothing is left to "
            "forget; take them out of the documents to keep"
        )
    counts = [f"{side} {len(found[side])}" for side in SIDES if found[side]]
    notes = [f"documents: {', '.join(counts)}"]
    if not found["holdout"]:
        notes.append("not measured: membership (no --data.holdout, documents nobody trains on)")
    splits = {side: rows for side, rows in (found | {"forget": forget}).items() if rows}
    return Task(forget, found["retain"], splits, [], notes)


def generated(seed: int, data: DataConfig) -> dict[str, list[Row]]:
    """Pages about fictitious authors by side."""
    try:
        made = authors.pages(seed, data.num_authors, data.holdout_rows)
    except ValueError as error:
        raise UserError(f"--data.num-authors {data.num_authors}: {error}") from None
    return {
        side: [{"text": text, "document": f"{side} {i}"} for i, text in enumerate(texts, 1)]
        for side, texts in made.items()
    }


def read(paths: Iterable[Path], option: str) -> list[Row]:
    """The documents of files and folders: `text`, and the `document` that it is, for messages.

    Raises:
        UserError: one is unusable; the message names the first error.
    """
    found = []
    for path in (one for given in paths for one in files_of(given.expanduser(), option)):
        if path.suffix.lower() in TEXTS:
            rows = [{"text": read_text(path, ADVICE), "document": path.name}]
        elif path.suffix.lower() in ROWS_OF_TEXTS:
            rows = [
                {"text": row.get("text"), "document": f"{path.name}, row {number}"}
                for number, row in enumerate(tofu.read_json(path), 1)
            ]
        else:
            raise UserError(
                f"{option} {path}: no text; give {', '.join((*TEXTS, *ROWS_OF_TEXTS))} or a folder"
            )
        for row in rows:
            place = f"{path.parent / row['document']}"
            if not isinstance(row["text"], str):
                raise UserError(f"{place}: no column 'text' with a text; add it, or leave it out")
            if "\0" in row["text"]:
                raise UserError(f"{place}: a binary file; {ADVICE}")
            if not row["text"].strip():
                raise UserError(f"{place}: is empty; write something, or leave it out")
        if not rows:
            raise UserError(f"{option} {path}: no rows; a text is the least")
        found += rows
    return found


def files_of(path: Path, option: str) -> list[Path]:
    """The file itself, or the texts in a folder and those below it, sorted."""
    if not path.exists():
        raise UserError(f"{option}: file {path} does not exist")
    if not path.is_dir():
        return [path]
    known = (*TEXTS, *ROWS_OF_TEXTS)
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not found:
        raise UserError(f"{option} {path}: no text in this folder ({', '.join(known)})")
    return found


def parts(words: Any, text: str, count: int) -> list[str]:
    """Cut a text between words into `count` consecutive parts of about equal length in tokens."""
    begins = [begin for begin, _ in words.backend.encode(text, add_special_tokens=False).offsets]
    cuts = [0]
    for i in range(1, count):
        place = begins[i * len(begins) // count]
        space = max(text.rfind(blank, cuts[-1] + 1, place + 1) for blank in " \n\t")
        cuts.append(max(space if space > 0 else place, cuts[-1]))
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]


def chunks(words: Any, row: Row, size: int) -> list[Row]:
    """Cut a document into the fewest chunks of about equal length of at most `size` tokens.

    Each chunk has its `text`, the `prompt` that begins it and its `continuation`.

    Raises:
        UserError: the document, or `size`, is too short for one.
    """
    text = row["text"].strip()
    length = len(words.encode(text))
    if min(length, size) < LEAST:
        raise UserError(
            f"{row['document']}: {min(length, size)} tokens, and a chunk has {LEAST} or more; "
            + ("write more text, or leave it out" if length < LEAST else "raise --data.max-length")
        )
    count, pieces = -(-length // size), [text]
    while any(len(encode_text(words, one, size + 1).tokens) > size for one in pieces):
        pieces = [part for one in parts(words, text, count) if (part := one.strip())]
        count += 1
    found = []
    for piece in pieces:
        start = parts(words, piece, 2)[0].rstrip()
        halves = {"prompt": start, "continuation": piece[len(start) :]}
        found.append({"text": piece, **halves, "document": row["document"]})
    return found


def fit(task: Task, model: Any, config: Any) -> Task:
    """The task with chunks of at most `--data.max-length` tokens in the place of its documents.

    Raises:
        UserError: a document is too short for a chunk.
    """
    context = model.decoder.config.max_position_embeddings
    size = min(config.data.max_length, context)
    sides = {
        side: [chunk for row in rows for chunk in chunks(model.tokenizer, row, size)]
        for side, rows in task.evaluation.items()
    }
    counts = ", ".join(f"{side} {len(rows)}" for side, rows in sides.items())
    judged = sides | {"retain": sides["retain"][: config.data.retain_rows]}
    notes = [*task.notes, f"chunks of at most {size} tokens: {counts}"]
    return task._replace(
        forget=sides["forget"], retain=sides["retain"], evaluation=judged, notes=notes
    )


ROW = Benchmark(
    "documents",
    load,
    ("verbatim", "memorization", "membership"),
    {name: STREAMS[name] for name in ("forget", "retain", "train")},
    fit=fit,
    reads=("forget", "retain", "holdout"),
    subject="the text of {forget}",
)
