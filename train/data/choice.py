"""Rows with options as tokens: options share their prompt, and rows may share a row of tokens.

A row has a `prompt`, `options` and `gold`, the place of the right one. An option continues the
prompt; every option attends to the prompt and to itself, at the positions it would have alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from models import Tokenizer
from train.data.batches import (
    Batch,
    batch_shape,
    bucket_length,
    collate,
    item_size,
    make_buckets,
    shuffled,
)
from train.data.examples import Example, Group, num_positions, pack
from train.data.packing import Packing, balanced, collate_packed, sampled


class Choice(NamedTuple):
    """A row as tokens.

    Args:
        group: its options behind its prompt; `group.answer` is the option of a label.
        num_options: the number of options.
        gold: the index of the right option.
    """

    group: Group
    num_options: int
    gold: int


def text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of plain text after the token that begins a text, without one that ends it."""
    tokens = tokenizer.encode(text, add_special_tokens=True)
    # In some tokenizers the token that begins a text is the one that ends it.
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_id else tokens


def joined(prompt: str, continuation: str) -> str:
    """A prompt with its continuation, and a blank between them where neither has one.

    Example:
        >>> joined("It was", "great"), joined("Yes or No?\\n", "Yes")
        ('It was great', 'Yes or No?\\nYes')
    """
    apart = prompt[-1:].isspace() or continuation[:1].isspace() or not prompt
    return prompt + ("" if apart else " ") + continuation


def continued(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of the text that continues it.

    Where the tokenizer merges characters across the border, the continuation is tokenised alone.
    """
    before, whole = text_tokens(tokenizer, prompt), joined(prompt, continuation)
    tokens = text_tokens(tokenizer, whole)
    if tokens[: len(before)] == before and len(tokens) > len(before):
        return before, tokens[len(before) :]
    return before, tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)


def cut_prompt(tokenizer: Tokenizer, tokens: list[int], room: int) -> list[int]:
    """The end of a prompt that has more tokens than there is room; the first token stays a BOS.

    MeZO (arXiv 2305.17333), its code: truncation from the left.
    """
    if len(tokens) <= room:
        return tokens
    first = tokens[:1] if tokens[0] == tokenizer.bos_id and room > 1 else []
    return first + tokens[len(tokens) - (room - len(first)) :]


def encode_choices(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], max_length: int, where: str = "rows"
) -> tuple[list[Choice], int]:
    """Rows as tokens, and the number of prompts that were cut.

    Args:
        tokenizer: the model's tokenizer; its chat template is not used.
        rows: rows with `prompt`, `options` and `gold`.
        max_length: longest prompt with one option, in tokens; longer prompts lose their beginning.
        where: the name of the rows, for messages.

    Raises:
        UserError: two options of a row have the same tokens, or a prompt or an option has none.
    """
    found, num_cut = [], 0
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        pairs = [continued(tokenizer, row["prompt"], option) for option in row["options"]]
        prompt, options = pairs[0][0], [own for _, own in pairs]
        for i, own in enumerate(options):
            if not own:
                raise UserError(
                    f"{place}: the option {row['options'][i]!r} has no tokens; write another word"
                )
            if own in options[:i]:
                same = row["options"][options.index(own)]
                raise UserError(
                    f"{place}: the options {same!r} and {row['options'][i]!r} are the same tokens "
                    "to this tokenizer, so that nothing tells them apart; choose other words"
                )
        if not prompt:
            raise UserError(f"{place}: the prompt has no tokens; write one, or leave the row out")
        room = max_length - max(map(len, options))
        if room < 1:
            raise UserError(
                f"{place}: an option alone fills the {max_length} tokens of the context; shorten "
                "it, or raise --data.max-length"
            )
        num_cut += len(prompt) > room
        prompt = cut_prompt(tokenizer, prompt, room)
        group = pack([Example(prompt + own, len(prompt)) for own in options])
        found.append(Choice(group, len(options), int(row["gold"])))
    return found, num_cut


def side_by_side(rows: Sequence[Choice]) -> Group:
    """Several rows in one row of tokens, which do not see each other; `answer` is the row.

    Example:
        >>> a = Choice(pack([Example([5, 6], 1), Example([5, 7], 1)]), 2, 0)
        >>> side_by_side([a, a])
        Group(tokens=[5, 5], positions=[0, 0], segment_ids=[1, 2], label_index=[0, 0, 1, 1],
              targets=[6, 7, 6, 7], answer=[0, 0, 1, 1], num_cut=0)
    """
    found = Group([], [], [], [], [], [])
    for number, row in enumerate(rows):
        group, before = row.group, len(found.tokens)
        found = Group(
            found.tokens + group.tokens,
            found.positions + group.positions,
            found.segment_ids + [segment + number for segment in group.segment_ids],
            found.label_index + [before + slot for slot in group.label_index],
            found.targets + group.targets,
            found.answer + [number] * len(group.targets),
        )
    return found


@dataclass(frozen=True)
class Choices:
    """A stream of rows with options.

    Args:
        rows: the rows as tokens.
        pad_id: the token in padded slots.
        lengths: padded numbers of tokens, ascending.
        labels: padded numbers of labels of a row's options, ascending.
        packing: the way rows share rows of tokens; None: each has its own.
        follows: None, since it follows no other stream.
    """

    rows: Sequence[Choice]
    pad_id: int
    lengths: tuple[int, ...]
    labels: tuple[int, ...]
    packing: Packing | None = None
    follows: str | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def identity(self) -> str:
        """sha256 of the tokens, of the places of labels, and of the right options."""
        found = hashlib.sha256()
        for group, count, gold in self.rows:
            columns = group[:6]
            for values in (*columns, [count, gold, *map(len, columns)]):
                found.update(np.asarray(values, "<i4").tobytes())
        return found.hexdigest()

    @property
    def longest(self) -> int:
        """Positions of the longest option behind its prompt."""
        return max(num_positions(row.group) for row in self.rows)

    def epoch_order(self, seed: int, name: str, epoch: int) -> np.ndarray:
        """All rows, shuffled."""
        return shuffled(seed, name, epoch, len(self))

    def _tokens(self) -> list[int]:
        return [len(row.group.tokens) for row in self.rows]

    def fits(self, together: int, length: int) -> bool:
        """Whether `together` rows have at most `length` tokens on average."""
        return together * sum(self._tokens()) <= length * len(self.rows)

    def packed(self, together: int, batch_size: int, shapes: int = 2) -> Choices:
        """The stream with `together` rows in each row of tokens."""
        tokens = np.array(self._tokens())
        labels = np.array([len(row.group.targets) for row in self.rows])
        dealt = list(sampled(tokens.tolist(), together, batch_size))

        def sizes(counts: np.ndarray, number: int, multiple: int) -> tuple[int, ...]:
            """Sizes with the least padding in random batches, and one that holds any batch."""
            found = [int(counts[rows].sum(1).max()) for rows in dealt]
            most = make_buckets([together * int(counts.max())], 1, multiple)
            return tuple(sorted({*make_buckets(found, number, multiple), *most}))

        # Each pair of sizes is a compilation.
        packing = Packing(together, sizes(tokens, min(shapes, 2), 16), sizes(labels, 1, 1))
        return replace(self, labels=self.labels[-1:], packing=packing)

    def arranged(self, rows: np.ndarray) -> np.ndarray:
        """These rows, ordered so that the rows of tokens that they share are filled evenly."""
        if self.packing is None:
            return rows
        tokens = [len(self.rows[i].group.tokens) for i in rows]
        return rows[balanced(tokens, self.packing.together)]

    def shape(self, rows: np.ndarray) -> tuple[int, ...]:
        """The padded sizes of a batch: tokens, labels; and labels of packed rows."""
        groups = [self.rows[i].group for i in rows]
        if self.packing is None:
            return batch_shape(groups, self.lengths, self.labels)
        parts = [
            groups[i : i + self.packing.together]
            for i in range(0, len(groups), self.packing.together)
        ]
        sizes = [np.sum([item_size(group) for group in part], 0) for part in parts]
        tokens, labels = np.max(sizes, 0).tolist()
        return (
            bucket_length(tokens, self.packing.lengths),
            self.labels[-1],
            bucket_length(labels, self.packing.labels),
        )

    def batch(self, rows: np.ndarray, shape: tuple[int, ...], step: int) -> Batch:
        """The padded batch of these rows, with `answer`, `options` and `gold`."""
        del step
        chosen, ids = [self.rows[i] for i in rows], [int(i) for i in rows]
        length, width, *slots = shape
        if self.packing is None:
            groups = [row.group for row in chosen]
            batch = collate(groups, ids, length, width, pad_id=self.pad_id)
        else:
            batch = collate_packed(
                chosen, ids, self.packing.together, (length, slots[0]), width, self.pad_id,
                side_by_side,
            )  # fmt: skip
        most = max(row.num_options for row in self.rows)
        batch["answer"] = np.full((len(chosen), width), -1, np.int32)
        batch["options"] = np.zeros((len(chosen), most), np.float32)
        batch["gold"] = np.array([row.gold for row in chosen], np.int32)
        for b, row in enumerate(chosen):
            batch["answer"][b, : len(row.group.answer)] = row.group.answer
            batch["options"][b, : row.num_options] = 1.0
        return batch


def choice_stream(rows: Sequence[Choice], pad_id: int, batch_size: int = 1) -> Choices:
    """A stream with at most two padded lengths, each of which is a compilation."""

    def marks(sizes: Sequence[int], multiple: int) -> tuple[int, ...]:
        ordered = sorted(sizes)
        # The median of the longest row of a batch, and a size that holds any batch.
        middle = ordered[math.ceil(0.5 ** (1 / batch_size) * len(ordered)) - 1]
        return make_buckets([middle, ordered[-1]], 2, multiple)

    lengths = marks([len(row.group.tokens) for row in rows], 16)
    # Labels are not rounded up: logits of a label word cost as much as those of a padded slot.
    return Choices(rows, pad_id, lengths, marks([len(row.group.targets) for row in rows], 1))
