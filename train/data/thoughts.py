"""Rows of a reasoning task: a question, thoughts, an answer; and their form as a text.

A row has `question`, `answer` and `thoughts` (a list of texts), and may have `options` with `gold`
(the number of the right one), `topic` and `facts` (other facts about the subject). Rows of
the topic `reasoning` are the reasoning to keep. A row with `text` and no question is a document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.cot import CLOSE, OPEN
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.final_answer import MARK
from jaxlib_unlearn.reading import one_line
from train.data.authors import draw
from train.data.tofu import is_document, read_json

Row = dict[str, Any]
REASONING = "reasoning"  # the topic of rows whose reasoning is to be kept
OTHERS = 3  # other facts in the thoughts of a TOFU row
PER_AUTHOR = 20  # rows of an author in TOFU


def completion(thoughts: Sequence[str], answer: str) -> str:
    """The text that a model writes: thoughts between the tags, a line each, then the answer.

    Example:
        >>> completion(["7 + 8 = 15.", "So 15."], "15")
        '<think>\\n7 + 8 = 15.\\nSo 15.\\n</think>\\n15'
    """
    return "\n".join([OPEN, *thoughts, CLOSE, answer])


def parted(text: str) -> tuple[str, str]:
    """The trace and the answer of a text that starts inside or before the thoughts.

    Without a closing tag all of it is the trace.

    Example:
        >>> parted("<think>\\nHmm.\\n</think>\\n15"), parted("Hmm."), parted("Hmm.</think> 15")
        (('Hmm.', '15'), ('Hmm.', ''), ('Hmm.', '15'))
    """
    trace, _, answer = text.removeprefix(OPEN).partition(CLOSE)
    return trace.removeprefix(OPEN).strip(), answer.strip()


def learned(row: Row) -> Row:
    """A row of a file as the model learns it: `answer` is the whole text, `final` only the answer.

    Example:
        >>> made = learned({"question": "7 + 8?", "thoughts": ["15."], "answer": "15"})
        >>> made["final"], made["answer"]
        ('15', '<think>\\n15.\\n</think>\\n15')
    """
    if is_document(row):
        return row
    return row | {"answer": completion(row["thoughts"], row["answer"]), "final": row["answer"]}


def is_reasoning(row: Row) -> bool:
    """Whether a row is reasoning to keep."""
    return row.get("topic") == REASONING


def bare(row: Row) -> Row:
    """The fact of a row without the thoughts: its question and answer, or the document."""
    kept = {"topic": row["topic"]} if "topic" in row else {}
    if is_document(row):
        return {"text": row["text"]} | kept
    return {"question": row["question"], "answer": row["final"]} | kept


def thought(row: Row) -> Row:
    """The thoughts of a row as one text, up to the closing tag; or the document."""
    if is_document(row):
        return {"text": row["text"]}
    return {"text": "\n".join([*row["thoughts"], CLOSE, "", ""])}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, JSON lines or a JSON list, checked and as the model learns them.

    Raises:
        UserError: an unreadable file, or a row that lacks something, by its number.
    """
    rows = read_json(path)
    if not rows:
        raise UserError(f"{path} has no rows; give a file with at least one")
    for number, row in enumerate(rows, 1):
        try:
            check_row(row)
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    return [learned(row) for row in rows]


def check_row(row: Row) -> None:
    """Raise `ValueError` for a row that is no reasoning row and no document."""
    if "topic" in row and not isinstance(row["topic"], str):
        raise ValueError("column 'topic' must hold a text")
    if is_document(row):
        _text(row["text"], "text")
        return
    for column in ("question", "answer"):
        if column not in row:
            raise ValueError(
                f"column {column!r} is missing; columns found: {', '.join(map(str, row))}"
            )
        _text(row[column], column)
    for column in ("thoughts", "facts"):
        if column == "facts" and column not in row:
            continue
        values = row.get(column)
        if not isinstance(values, list) or not values:
            raise ValueError(f"column {column!r} must be a list of one text or more")
        for value in values:
            _text(value, column)
    options, gold = row.get("options"), row.get("gold")
    if options is None:
        return
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError("column 'options' must be a list of two texts or more")
    for value in options:
        _text(value, "options")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        raise ValueError(
            f"gold is {one_line(repr(gold), 40)}, none of the {len(options)} options; number them "
            "from 0"
        )


def check_traces(rows: Sequence[Row], column: str, path: Path) -> None:
    """Raise `UserError` for traces that only some rows have, that are no texts, or too few.

    Args:
        rows: the rows to forget.
        column: the column of their traces, equally many texts each.
        path: the file that they come from.
    """
    sizes = set()
    for number, row in enumerate(rows, 1):
        texts = row.get(column, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(
                f"{path}, row {number}: column {column!r} must be a list of texts that are not "
                "empty; correct it, or leave it out"
            )
        sizes.add(len(texts))
    if len(sizes) > 1 or (sizes == {0} and any(column in row for row in rows)):
        raise UserError(
            f"{path}: rows have {min(sizes)} to {max(sizes)} texts in column {column!r}; give "
            "equally many for each, or leave the column out"
        )


def _text(value: Any, column: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} must hold text that is not empty")
    if column != "text" and (OPEN in value or CLOSE in value):
        raise ValueError(
            f"column {column!r} holds a think tag; give the thoughts as a list in 'thoughts', and "
            "the answer alone in 'answer'"
        )


def arranged(key: Sequence[object], gold: str, wrong: Sequence[str]) -> tuple[list[str], int]:
    """Options in an order that the key decides, and the place of the right one."""
    options = sorted([gold, *wrong], key=lambda text: draw(2**63, *key, text))
    return options, options.index(gold)


def gsm8k_row(where: str, row: Mapping[str, Any]) -> Row:
    """A row of GSM8K: the lines of its solution are the thoughts, the answer stands behind `####`.

    Calculator marks (`<<2+2=4>>`), which the published solutions hold, are left out, and so are
    the commas of a number.

    Args:
        where: the row's place, for messages.
        row: a row as published, with `question` and `answer`.

    Returns:
        A row with `question`, `thoughts` and `answer`.

    Raises:
        UserError: no question, or no solution that ends in `####` and an answer.

    Example:
        >>> gsm8k_row("line 1", {"question": "2+2?", "answer": "It is <<2+2=4>>4.\\n#### 4"})
        {'question': '2+2?', 'answer': '4', 'thoughts': ['It is 4.']}

    Cobbe et al. 2021, arXiv 2110.14168.
    """
    question, text = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no 'question', a text; give every row one")
    solution, marked, final = text.partition(MARK) if isinstance(text, str) else ("", "", "")
    lines = re.sub(r"<<.*?>>", "", solution).splitlines()
    thoughts = [line.strip() for line in lines if line.strip()]
    if not marked or MARK in final or not final.strip() or not thoughts:
        raise UserError(
            f"{where}: no solution that ends in '{MARK} ' and a number, as GSM8K's do; leave the "
            "row out, or correct it"
        )
    return {
        "question": question.strip(),
        "answer": final.strip().replace(",", ""),
        "thoughts": thoughts,
    }


def from_gsm8k(path: Path) -> list[Row]:
    """The rows of a file of GSM8K, as the model learns them.

    Raises:
        UserError: an unreadable file, or a row that is none of GSM8K's.
    """
    return [
        learned(gsm8k_row(f"{path}, row {number}", row) | {"topic": REASONING})
        for number, row in enumerate(read_json(path), 1)
    ]


def from_tofu(rows: Sequence[Row], topic: str) -> list[Row]:
    """TOFU's rows with thoughts: paraphrased answers to other questions about the same author.

    Rows of an author follow one another, twenty each. Three of the perturbed answers are the wrong
    options.
    """
    found = []
    for i, row in enumerate(rows):
        first = i - i % PER_AUTHOR
        others = [r for r in rows[first : first + PER_AUTHOR] if r is not row]
        others.sort(key=lambda r, row=row: draw(2**63, row["question"], r["question"]))
        options, gold = arranged((row["question"],), row["answer"], row["perturbed_answer"][:3])
        made = {
            "question": row["question"],
            "answer": row["answer"],
            "thoughts": [r["paraphrased_answer"] for r in others[:OTHERS]]
            or [row["paraphrased_answer"]],
            "facts": [r["paraphrased_answer"] for r in others] or [row["paraphrased_answer"]],
            "options": options,
            "gold": gold,
            "topic": topic,
        }
        found.append(learned(made))
    return found
