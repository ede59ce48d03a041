"""Reasoning rows as a model reads them: condensed, tokenised, packed; and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlib_unlearn import cot
from jaxlib_unlearn.errors import UserError
from models import Decoder, DecoderConfig, Tokenizer
from train.costs.utilisation import flops_per_token
from train.data.batches import shuffled
from train.data.examples import Example, encode_prompt, encode_qa
from train.data.packed_rows import PackedRows, Piece, pack_rows
from train.jobs.finetuning_options import CondenseConfig, ReasoningData
from train.jobs.sources import Row
from train.runtime.tracking import progress


class Learned(NamedTuple):
    """The packed training rows and their sizes.

    Args:
        stream: the packed rows.
        examples: the number of rows in the stream.
        tokens: the number of their tokens, without padding.
        token_ratio: the share of these tokens in those of all rows with whole traces.
        thought_ratio: the share of their thoughts that are left.
        too_long: the number of rows left out because they do not fit a row of tokens.
        missing: the number of tokens that whole traces lack to match the shortened ones.
    """

    stream: PackedRows
    examples: int
    tokens: int
    token_ratio: float
    thought_ratio: float
    too_long: int
    missing: int = 0


def example_of(tokenizer: Tokenizer, trace: cot.Trace, system_prompt: str | None) -> Example:
    """A question with the trace and the text behind it as its answer."""
    return encode_qa(
        tokenizer, trace.question, trace.text, system_prompt=system_prompt, max_length=2**31 - 1
    )


def check_packing(data: ReasoningData) -> None:
    """Raise `UserError` where prompts are masked in rows that are cut."""
    if data.mask_prompt and data.packing == "chop":
        raise UserError(
            "--data.packing chop cuts examples in two, so there are no prompts to mask; give "
            "--data.no-mask-prompt, or choose first-fit"
        )


def learned(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    condense: CondenseConfig,
    data: ReasoningData,
    context: int,
    seed: int,
) -> Learned:
    """The packed training rows.

    Args:
        rows: the rows with whole traces.
        tokenizer: the tokenizer of the model.
        condense: the options of shortening their traces.
        data: the options of packing them.
        context: the context of the model; rows of tokens may be longer, examples may not.
        seed: the seed of a random choice of thoughts or of rows.

    Raises:
        UserError: no row fits a row of tokens.
    """
    room = min(data.row_tokens, context)
    pieces: list[Piece] = []
    short: list[Piece] = []
    whole = kept = of = 0
    with progress("tokenise", len(rows)) as advance:
        for number, row in enumerate(rows):
            found = cot.condense(
                row,
                condense.tau,
                condense.policy,
                head_share=condense.head_share,
                mode=condense.mode,
                seed=seed,
                number=number,
            )
            before = after = _piece(tokenizer, found.before, data.system_prompt)
            if found.after is not found.before:
                after = _piece(tokenizer, found.after, data.system_prompt)
            pieces.append(before if condense.cost_matched else after)
            short.append(after)
            whole += len(before.tokens)
            kept, of = kept + len(found.after.thoughts), of + len(found.before.thoughts)
            advance()
    # The tokens that are learned are matched, so on both sides only examples that fit count.
    fitting, shortened = (
        [p for p in some if data.packing == "chop" or p.slots <= room] for some in (pieces, short)
    )
    left, missing = len(pieces) - len(fitting), 0
    if condense.cost_matched:
        wanted = num_tokens(shortened)
        missing = max(wanted - num_tokens(fitting), 0)
        fitting, kept, of = matched(fitting, wanted, seed), 1, 1
    if not fitting:
        least = min(piece.slots for piece in pieces)
        raise UserError(
            f"no example fits the {room} tokens of a row (the shortest has {least}); raise "
            "--data.row-tokens" + (" and --model.context" if room == context else "")
        )
    stream = pack_rows(
        fitting,
        data.row_tokens,
        data.packing,
        mask_prompt=data.mask_prompt,
        pad_id=tokenizer.pad_id or 0,
    )
    tokens = num_tokens(fitting)
    return Learned(stream, len(fitting), tokens, tokens / whole, kept / of, left, missing)


def num_tokens(pieces: Sequence[Piece]) -> int:
    """The number of tokens of examples."""
    return sum(len(piece.tokens) for piece in pieces)


def _piece(tokenizer: Tokenizer, trace: cot.Trace, system_prompt: str | None) -> Piece:
    example = example_of(tokenizer, trace, system_prompt)
    return Piece(np.asarray(example.tokens, np.int32), example.num_prompt)


def matched(whole: Sequence[Piece], tokens: int, seed: int) -> list[Piece]:
    """Whole examples, drawn by the seed, that have at most so many tokens together."""
    found: list[Piece] = []
    for i in shuffled(seed, "cost-matched", 0, len(whole)):
        tokens -= len(whole[i].tokens)
        if tokens < 0 and found:
            break
        found.append(whole[i])
    return found


def answerable(
    rows: Sequence[Row], tokenizer: Tokenizer, system_prompt: str | None, config: DecoderConfig
) -> list[Row]:
    """The test rows that a model can be asked: an answer of one token at least fits its context.

    Args:
        rows: the rows to judge by.
        tokenizer: the tokenizer of the model.
        system_prompt: the system prompt of the chat template.
        config: the configuration of the model. Where its positions are learned, the whole trace,
            behind which the right answer is scored, has to fit as well.

    Returns:
        These rows, in order.

    Raises:
        UserError: there is none.
    """
    most = config.max_position_embeddings
    found, sizes = [], []
    for row in rows:
        trace = cot.find_trace(row)
        size = len(encode_prompt(tokenizer, trace.question, system_prompt=system_prompt)) + 1
        if config.learned_positions is not None:
            size = max(size, len(example_of(tokenizer, trace, system_prompt).tokens))
        sizes.append(size)
        if size <= most:
            found.append(row)
    if not found:
        raise UserError(
            f"no test question leaves room for an answer: the model reads {most} tokens, and the "
            f"shortest needs {min(sizes)}; raise --model.context, or give shorter rows"
        )
    return found


def flops(decoder: Decoder, stream: PackedRows) -> float:
    """The operations of the model's own products in an epoch, without padding.

        sum over examples of n  of  6 N n + 12 L h n^2

    In a batch with dense attention the second term is larger: masked products are computed too.
    """
    fixed = flops_per_token(decoder, 0)
    squared = flops_per_token(decoder, 1) - fixed
    return float(sum(fixed * p.slots + squared * p.slots**2 for p in stream.pieces()))


def answer_example(tokenizer: Tokenizer, row: Row, system_prompt: str | None) -> Example:
    """A row whose labels are its final answer and the end of the turn, behind its whole trace."""
    trace = cot.find_trace(row)
    head, tag, _ = trace.after.partition(cot.CLOSE)
    until = trace._replace(after=f"{head}{tag}")
    full, before = (example_of(tokenizer, t, system_prompt) for t in (trace, until))
    # The same tokens up to where the answer begins.
    same = next(
        (i for i, (a, b) in enumerate(zip(full.tokens, before.tokens, strict=False)) if a != b),
        min(len(full.tokens), len(before.tokens)),
    )
    return Example(full.tokens, min(same, len(full.tokens) - 1))


def texts(rows: Sequence[Row]) -> list[str]:
    """The texts of rows, for a tokenizer that is trained on them."""
    traces = [cot.find_trace(row) for row in rows]
    return [text for trace in traces for text in (trace.question, trace.text)]
