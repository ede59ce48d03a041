"""Questions about a passage, answered in words: SQuAD and DROP.

The templates are those of MeZO's code (arXiv 2305.17333). A row has `prompt` and `answers`; the
first answer is learned, the greedy one judged against all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.data.labelled import Record
from train.tasks import text_kinds
from train.tasks.labelled import Labelled, Row, read_from, text


def answers(value: Any, key: str) -> list[str]:
    """The right answers: a list of texts, or a column of the Hub's data set that holds one.

    Raises:
        ValueError: there is none.

    Example:
        >>> answers({"text": ["Paris"], "answer_start": [3]}, "text")
        ['Paris']
    """
    found = value.get(key) if isinstance(value, Mapping) else value
    found = [found] if isinstance(found, str) else found
    kept = [one.strip() for one in found or () if isinstance(one, str) and one.strip()]
    if not kept:
        raise ValueError("no answer; leave rows without one out")
    return kept


def squad(record: Record) -> Row:
    """A question about a paragraph of Wikipedia."""
    title, passage, question = (text(record[n], n) for n in ("title", "context", "question"))
    return {
        "prompt": f"Title: {title}\nContext: {passage}\nQuestion: {question}\nAnswer:",
        "answers": answers(record["answers"], "text"),
    }


def drop(record: Record) -> Row:
    """A question about a passage, whose answer has to be counted or compared."""
    passage, question = (text(record[n], n) for n in ("passage", "question"))
    return {
        "prompt": f"Passage: {passage}\nQuestion: {question}\nAnswer:",
        "answers": answers(record["answers"], "spans"),
    }


ROWS = (
    Labelled(
        "squad",
        "questions about a paragraph, answered in words",
        text_kinds.ANSWER,
        read_from((("title",), ("context",), ("question",), ("answers",)), "rajpurkar/squad", None),
        squad,
    ),
    Labelled(
        "drop",
        "questions about a passage, with counting and comparing",
        text_kinds.ANSWER,
        read_from((("passage",), ("question",), ("answers", "answers_spans")), "ucinlp/drop", None),
        drop,
    ),
)
