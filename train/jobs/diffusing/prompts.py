"""Prompts as a model reads them, with the place of a token that is no word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import one_line
from models.text.tokenizer import Tokenizer
from train.runtime.tracking import say
from train.tasks.erasure import PLACEHOLDER


class Rows(NamedTuple):
    """Prompts as rows.

    Args:
        tokens: the token ids, int32 `(N, length)`.
        place: the positions of the placeholder, int32 `(N,)`; -1: there is none.
        last: the positions of the last token before the end token, int32 `(N,)`; 0 for the
            empty prompt.
    """

    tokens: np.ndarray
    place: np.ndarray
    last: np.ndarray


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int, what: str = "") -> Rows:
    """Prompts as rows; an end token marks the placeholder, where an embedding is inserted.

    A prompt that is too long is cut as CLIP does; with `what` a message says so.

    Raises:
        UserError: a prompt has two placeholders, or its placeholder is cut off.
    """
    parts = [text.split(PLACEHOLDER) for text in texts]
    for text, found in zip(texts, parts, strict=True):
        if len(found) > 2:
            raise UserError(
                f"prompt {one_line(repr(text), 80)} has {len(found) - 1} placeholders "
                f"{PLACEHOLDER}; write it once"
            )
    tokens = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    place = np.full(len(texts), -1, np.int32)
    last, cut = np.zeros(len(texts), np.int32), 0
    for i, (text, found) in enumerate(zip(texts, parts, strict=True)):
        row = tokenizer.encode(found[0])
        if len(found) == 2:
            place[i] = 1 + len(row)
            row = [*row, tokenizer.eos_id, *tokenizer.encode(found[1])]
        if place[i] > length - 2:
            raise UserError(
                f"prompt {one_line(repr(text), 80)}: {PLACEHOLDER} stands at token {place[i]}, the "
                f"model reads {length - 2}; shorten it"
            )
        cut += len(row) > length - 2
        row = [tokenizer.bos_id, *row[: length - 2], tokenizer.eos_id]
        tokens[i, : len(row)] = row
        last[i] = len(row) - 2
    if cut and what:
        say(f"{what}: {cut} prompt(s) cut at {length - 2} tokens")
    return Rows(tokens, place, last)


def check_placeholder(prompt: str, option: str) -> None:
    """Raise `UserError` for a prompt without a placeholder, or with two of them."""
    count = prompt.count(PLACEHOLDER)
    if count != 1:
        raise UserError(
            f"{option} {one_line(repr(prompt), 80)} has {count or 'no'} placeholder"
            f"{'s' if count > 1 else ''} {PLACEHOLDER}; write it once, where the token goes"
        )
