"""Questions and answers as tokens with labels.

The prompt's tokens are a prefix of the example's, and the labels are the answer and the end of the
turn. Where a tokenizer would merge characters across that border, prompt and answer are tokenised
separately, as they are when the model generates. Tags (`models.text.prompts.TAGS`) are written and
tokenised as in OpenUnlearning, merged characters included: there the prompt's tokens only determine
the number of tokens that are not labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxlib_unlearn.errors import UserError
from models.text.prompts import PromptFormat, conversation
from train.data.tofu import is_document

# Answer j of a group is the leaf j + 1 of its segment: group + LEAF * (j + 1); the shared prompt is
# leaf 0.
LEAF = 65536


class TextTokenizer(Protocol):
    """The tokenizer interface; `models.text.tokenizer.Tokenizer` has it, and a `format` besides."""

    @property
    def has_chat_template(self) -> bool: ...
    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...
    def chat(self, messages: Any, add_generation_prompt: bool = False) -> str: ...


class Example(NamedTuple):
    """One question and answer; labels are `tokens[num_prompt:]`.

    Args:
        tokens: prompt, answer, end of turn.
        num_prompt: the number of tokens of the prompt.
        num_cut: the number of tokens that did not fit and were dropped from the end.
    """

    tokens: list[int]
    num_prompt: int
    num_cut: int = 0


class Group(NamedTuple):
    """Several examples packed behind the common prefix of their prompts; L tokens, N labels.

    Args:
        tokens: (L,) the shared tokens, then the rest of each example without its last token
            (nothing is predicted from it).
        positions: (L,) each example continues the positions of the shared tokens.
        segment_ids: (L,) 1 for the shared tokens, `1 + 65536 * (j + 1)` for example j's own.
        label_index: (N,) slot whose hidden state predicts the label; where all of a prompt is
            shared, the last shared slot predicts each first label.
        targets: (N,) the labels, example after example.
        answer: (N,) the example that each label belongs to.
        num_cut: the number of examples that were cut.
    """

    tokens: list[int]
    positions: list[int]
    segment_ids: list[int]
    label_index: list[int]
    targets: list[int]
    answer: list[int]
    num_cut: int = 0


def num_positions(item: Example | Group) -> int:
    """Positions that an example or a group needs: its tokens, or the last position plus one.

    Example:
        >>> shared = Group([5, 6, 7], [0, 1, 1], [], [], [], [])
        >>> num_positions(Example([5, 6, 7], 1)), num_positions(shared)
        (3, 2)
    """
    return max(item.positions) + 1 if isinstance(item, Group) else len(item.tokens)


class Encoded(NamedTuple):
    """Examples of a split with their row numbers, and the counts a run prints.

    Args:
        examples: the examples, in row order.
        row_ids: the index of each example's row.
        num_cut: the number of examples that were cut to the longest length.
        num_dropped: the number of rows left out because the prompt leaves no room for a label.
    """

    examples: list[Example]
    row_ids: list[int]
    num_cut: int
    num_dropped: int


def _format(tokenizer: TextTokenizer) -> PromptFormat:
    return getattr(tokenizer, "format", PromptFormat())


def _texts(
    tokenizer: TextTokenizer, question: str, system_prompt: str | None
) -> tuple[list[dict[str, str]], str]:
    """The messages before the answer, and the prompt they render to."""
    tags, shots, _ = _format(tokenizer)
    system, before, question = conversation(question)
    system_prompt, shots = system_prompt if system is None else system, (*shots, *before)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for asked, answer in shots:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question})
    if tags is not None:
        return messages, tags.prompt(question, system_prompt, shots)
    if tokenizer.has_chat_template:
        return messages, tokenizer.chat(messages, add_generation_prompt=True)
    system = f"{system_prompt}\n" if system_prompt else ""
    before = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in shots)
    return messages, f"{system}{before}Question: {question}\nAnswer:"


def _encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Tokens of a rendered text; a template prints its own BOS, plain text gets the tokenizer's."""
    if tokenizer.has_chat_template and _format(tokenizer).tags is None:
        return tokenizer.encode(text, add_special_tokens=False)
    tokens = tokenizer.encode(text, add_special_tokens=True)
    # Some tokenizers also append EOS, which belongs behind the answer only.
    if tokens and tokens[-1] == tokenizer.eos_id and len(tokens) > 1:
        tokens = tokens[:-1]
    return tokens


def written_chat_template(tokenizer: TextTokenizer) -> str:
    """The prompts of this module as a chat template, for a tokenizer whose own is not used.

    It renders the texts that the model was trained on, so other programs prompt it in the same way.

    Args:
        tokenizer: a tokenizer without a chat template, or with the tags of its format.

    Returns:
        Jinja source, in the dialect of transformers.
    """
    tags = _format(tokenizer).tags
    system, asked, opening, closing, between = "\n", "Question: ", "\nAnswer:", " ", "\n\n"
    if tags is not None:
        system, asked, closing, between = "", tags.user_start, "", tags.assistant_end
        opening = tags.user_end + tags.assistant_start
    quoted = json.dumps
    begins = tokenizer.encode("", add_special_tokens=True)[:1] == [getattr(tokenizer, "bos_id", -1)]
    end = quoted(between)
    if tokenizer.eos_id is not None:
        end = f"(eos_token if loop.last else {end})"
    return (
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}"
        + f"{{% if message['role'] == 'system' %}}{{{{ message['content'] + {quoted(system)} }}}}"
        + "{% elif message['role'] == 'user' %}"
        + f"{{{{ {quoted(asked)} + message['content'] + {quoted(opening)} }}}}"
        + f"{{% else %}}{{{{ {quoted(closing)} + message['content'] + {end} }}}}"
        + "{% endif %}{% endfor %}"
    )


def encode_prompt(
    tokenizer: TextTokenizer, question: str, *, system_prompt: str | None = None, start: str = ""
) -> list[int]:
    """Tokens up to the start of the answer, which generation continues.

    Args:
        tokenizer: a tokenizer, with or without a chat template.
        question: the user's turn, or a whole conversation (`models.text.prompts.joined`).
        system_prompt: the system turn; None: the template's default.
        start: the first words of the answer, such as an opened think tag. A template that opens the
            same tag itself does not open it twice.

    Returns:
        Token ids, the prefix of every example with this question (with tags: except where the
        tokenizer merges characters at the border).
    """
    text = _texts(tokenizer, question, system_prompt)[1]
    if not start:
        return _encode(tokenizer, text)
    if opened := _opened(text, start):
        text = text.rstrip().removesuffix(opened)
    prompt = _encode(tokenizer, text)
    # Without template and tags there is a space before an answer.
    plain = _format(tokenizer).tags is None and not tokenizer.has_chat_template
    return prompt + tokenizer.encode(f" {start}" if plain else start, add_special_tokens=False)


def _opened(prompt: str, answer: str) -> str:
    """The tag that an answer begins with and its prompt ends in; "" if they share none."""
    found = re.match(r"\s*(<[^<>/]+>)", answer)
    return found[1] if found and prompt.rstrip().endswith(found[1]) else ""


def _answered(
    tokenizer: TextTokenizer, messages: list[dict[str, str]], prompt: str, answer: str
) -> str:
    """The conversation with its answer, as the chat template renders it.

    Templates of reasoning models leave out the text between think tags, or open the tag in the
    prompt. There the answer follows the prompt directly, with one opened tag, and ends as other
    answers do.
    """

    def rendered(content: str) -> str:
        return tokenizer.chat([*messages, {"role": "assistant", "content": content}])

    whole = rendered(answer)
    if whole.startswith(prompt) and answer.strip() in whole[len(prompt) :]:
        return whole
    if opened := _opened(prompt, answer):
        between = prompt[len(prompt.rstrip()) :]
        answer = answer.lstrip().removeprefix(opened).removeprefix(between)
    return prompt + answer + rendered("Yes.").rpartition("Yes.")[2]


def encode_text(tokenizer: TextTokenizer, text: str, max_length: int) -> Example:
    """A text without any template; every token but the first is a label.

    Args:
        tokenizer: a tokenizer, whose BOS, if it has one, precedes the text; no EOS follows.
        text: the text, which is not changed.
        max_length: the longest example in tokens.
    """
    tokens = tokenizer.encode(text, add_special_tokens=True)
    if tokens and tokens[-1] == tokenizer.eos_id and len(tokens) > 1:
        tokens = tokens[:-1]
    return Example(tokens[:max_length], 1, max(len(tokens) - max_length, 0))


def _example(
    tokenizer: TextTokenizer, question: str, answer: str, system_prompt: str | None, max_length: int
) -> Example:
    """An example cut to `max_length`, possibly without a label."""
    messages, prompt_text = _texts(tokenizer, question, system_prompt)
    prompt = _encode(tokenizer, prompt_text)
    tagged = _format(tokenizer).tags is not None
    if tagged:
        full_text = prompt_text + answer
    elif tokenizer.has_chat_template:
        full_text = _answered(tokenizer, messages, prompt_text, answer)
    else:
        full_text = f"{prompt_text} {answer}"
    tokens = _encode(tokenizer, full_text)
    # Tagged texts stay as the tokenizer merges them, unless that leaves no label at all.
    merged = tokens[: len(prompt)] != prompt
    if merged and not (tagged and tokenizer.eos_id is not None):
        tokens = prompt + tokenizer.encode(full_text[len(prompt_text) :], add_special_tokens=False)
    if tokenizer.eos_id is not None and tokens[-1] != tokenizer.eos_id:
        tokens = [*tokens, tokenizer.eos_id]
    return Example(tokens[:max_length], len(prompt), max(len(tokens) - max_length, 0))


def _no_label(question: str, num_prompt: int, max_length: int) -> UserError:
    shown = " ".join(question.split())
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return UserError(
        f"question {shown!r}: its prompt has {num_prompt} tokens and the longest example has "
        f"{max_length}, so no label is left; shorten it or raise the longest length"
    )


def encode_qa(
    tokenizer: TextTokenizer,
    question: str,
    answer: str,
    *,
    system_prompt: str | None = None,
    max_length: int,
) -> Example:
    """Tokenise one question and answer; the labels are the answer, the end of the turn and EOS.

    With a chat template: tokens(template([system], user, assistant)), prompt =
    tokens(template([system], user, generation prompt)). Without: "Question: q\\nAnswer: a". With
    tags: tokens(system + tagged question + answer), of which the first |tokens(all but the answer)|
    are not labels. The format's shots precede the question. EOS is appended where the text does not
    end in it.

    Args:
        tokenizer: a tokenizer, with or without a chat template.
        question: the user's turn.
        answer: the assistant's turn.
        system_prompt: the system turn; None: the template's default.
        max_length: the longest example in tokens; the rest is cut off and counted in `num_cut`.

    Returns:
        The example; without tags, `tokens[:num_prompt]` equals `encode_prompt(...)`.

    Raises:
        UserError: the prompt alone fills `max_length`, no label is left.

    Format: OpenUnlearning (arXiv 2506.12618), data/utils.py.
    """
    example = _example(tokenizer, question, answer, system_prompt, max_length)
    if example.num_prompt >= len(example.tokens):
        raise _no_label(question, example.num_prompt, max_length)
    return example


def encode_rows(
    tokenizer: TextTokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    question: str = "question",
    answer: str = "answer",
    system_prompt: str | None = None,
    max_length: int,
) -> Encoded:
    """Tokenise a split; rows that are cut, or dropped because no label is left, are counted.

    Args:
        tokenizer: a tokenizer, with or without a chat template.
        rows: rows with the two columns; a row with `text` and no question uses `encode_text`.
        question: the column of the user's turn.
        answer: the column of the assistant's turn.
        system_prompt: the system turn; None: the template's default.
        max_length: longest example in tokens.

    Returns:
        Examples, their row numbers and the two counts.

    Raises:
        UserError: no row has a label left.
    """
    kept, row_ids = [], []
    examples = [
        encode_text(tokenizer, row["text"], max_length)
        if is_document(row, question)
        else _example(tokenizer, row[question], row[answer], system_prompt, max_length)
        for row in rows
    ]
    for row_id, example in enumerate(examples):
        if example.num_prompt < len(example.tokens):
            kept.append(example)
            row_ids.append(row_id)
    if examples and not kept:
        shortest = min(range(len(rows)), key=lambda i: examples[i].num_prompt)
        row = rows[shortest]
        shown = row["text"] if is_document(row, question) else row[question]
        raise _no_label(shown, examples[shortest].num_prompt, max_length)
    num_cut = sum(example.num_cut > 0 for example in kept)
    return Encoded(kept, row_ids, num_cut, len(rows) - len(kept))


def encode_group(
    tokenizer: TextTokenizer,
    question: str,
    answers: Sequence[str],
    *,
    system_prompt: str | None = None,
    max_length: int,
) -> Group:
    """Pack several answers behind one prompt, so that the prompt is computed once.

    Answer j attends to the prompt and to itself, at the positions it would have alone: its
    log-probabilities equal those of `encode_qa(question, answers[j])`.

    Args:
        tokenizer: a tokenizer, with or without a chat template.
        question: the shared user's turn.
        answers: the texts, at least one.
        system_prompt: the system turn; None: the template's default.
        max_length: longest prompt with one answer, in tokens (the packed row may be longer).

    Returns:
        The packed group.

    Raises:
        UserError: the prompt alone fills `max_length`.
        ValueError: no answer.
    """
    if not answers:
        raise ValueError("a group needs at least one answer")
    examples = [
        encode_qa(tokenizer, question, answer, system_prompt=system_prompt, max_length=max_length)
        for answer in answers
    ]
    return pack(examples)


def shared_prefix(examples: Sequence[Example]) -> int:
    """The number of tokens in the longest common prefix of all prompts.

    Example:
        >>> shared_prefix([Example([5, 6, 7, 8], 3), Example([5, 6, 9], 2)])
        2
    """
    # A shared token is never a label; without a prompt, the first token counts as the prompt.
    most = min(max(example.num_prompt, 1) for example in examples)
    first, last = min(e.tokens[:most] for e in examples), max(e.tokens[:most] for e in examples)
    # Among sorted sequences the first and the last differ earliest.
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), most)


def packed_length(examples: Sequence[Example]) -> int:
    """Tokens of `pack(examples)`."""
    shared = shared_prefix(examples)
    return shared + sum(len(example.tokens) - 1 - shared for example in examples)


def pack(examples: Sequence[Example]) -> Group:
    """Pack several examples into one row, behind the common prefix of their prompts.

    An example attends to that prefix and to itself, at the positions it would have alone, so its
    log-probabilities do not change; the common prefix is computed once.

    Example:
        >>> pack([Example([5, 6, 7, 8], 2), Example([5, 6, 9], 2)])
        Group(tokens=[5, 6, 7], positions=[0, 1, 2], segment_ids=[1, 1, 65537],
              label_index=[1, 2, 1], targets=[7, 8, 9], answer=[0, 0, 1], num_cut=0)
    """
    shared = shared_prefix(examples)
    tokens = list(examples[0].tokens[:shared])
    positions, segment_ids = list(range(shared)), [1] * shared
    label_index: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for j, example in enumerate(examples):
        own = example.tokens[shared:-1]  # nothing is predicted from the last token
        slots = [*range(shared), *range(len(tokens), len(tokens) + len(own))]
        first = max(example.num_prompt, 1)
        label_index += slots[first - 1 :]
        targets += example.tokens[first:]
        owner += [j] * (len(example.tokens) - first)
        tokens += own
        positions += range(shared, shared + len(own))
        segment_ids += [1 + LEAF * (j + 1)] * len(own)
    num_cut = sum(example.num_cut > 0 for example in examples)
    return Group(tokens, positions, segment_ids, label_index, targets, owner, num_cut)
