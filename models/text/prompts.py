"""The form of a conversation besides the model's chat template: tags, shots, a date."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import NamedTuple

from jaxlib_unlearn.errors import UserError

# The date that chat templates print as today's (OpenUnlearning's): with the clock a model's input
# would differ from day to day.
DATE = "10 Apr 2025"
DATE_FORM = "%d %b %Y"


class Tags(NamedTuple):
    """The text around a question and around an answer of a model without a chat template.

    Example:
        >>> TAGS["llama2"].prompt("Who?", shots=[("Where?", "Lima.")])
        '[INST] Where? [/INST]Lima. [INST] Who? [/INST]'
    """

    user_start: str
    user_end: str
    assistant_start: str
    assistant_end: str

    def prompt(self, question: str, system: str | None = None, shots=()) -> str:
        """The text before an answer: `system` as it is, answered questions, the question."""
        asked = [
            f"{self.user_start}{asked}{self.user_end}{self.assistant_start}{answer}"
            f"{self.assistant_end}"
            for asked, answer in shots
        ]
        last = f"{self.user_start}{question}{self.user_end}{self.assistant_start}"
        return (system or "") + "".join(asked) + last


# OpenUnlearning's for Llama-2-chat, and for base models (Llama-2, Phi-1.5).
TAGS = {
    "llama2": Tags("[INST] ", " [/INST]", "", " "),
    "question-answer": Tags("Question: ", "\n", "Answer: ", "\n\n"),
}


class PromptFormat(NamedTuple):
    """The format of a tokenizer's prompts besides its chat template.

    Args:
        tags: the text around questions and answers in place of the chat template; None: the
            template, or "Question: ...\\nAnswer: ..." where a tokenizer has none.
        shots: answered questions that precede every question.
        date: the date that a chat template gets as `date_string` and from `strftime_now`.
    """

    tags: Tags | None = None
    shots: tuple[tuple[str, str], ...] = ()
    date: str = DATE


# ASCII's separators of records and units: a conversation is one question, its turns between them.
TURN, ROLE = "\x1e", "\x1f"


class Conversation(NamedTuple):
    """A question with the turns before it.

    Args:
        system: the system turn; None: there is none.
        before: the answered questions before the question.
        question: the last question.
    """

    system: str | None
    before: tuple[tuple[str, str], ...]
    question: str


def joined(turns: Sequence[tuple[str, str]]) -> str:
    """The turns before an answer as one text, which `conversation` takes apart.

    Args:
        turns: pairs of role and text: an optional system turn, then user and assistant in turn, a
            user's at the end.

    Example:
        >>> joined([("user", "Who?")])
        'Who?'
        >>> conversation(joined([("user", "Who?"), ("assistant", "Me."), ("user", "Why?")]))
        Conversation(system=None, before=(('Who?', 'Me.'),), question='Why?')
    """
    texts = [(role, text.replace(TURN, " ").replace(ROLE, " ")) for role, text in turns]
    if len(texts) == 1:
        return texts[0][1]
    return TURN + TURN.join(f"{role}{ROLE}{text}" for role, text in texts)


def conversation(question: str) -> Conversation:
    """A question with the turns before it; a plain text has none."""
    if not question.startswith(TURN):
        return Conversation(None, (), question)
    turns = [turn.split(ROLE, 1) for turn in question[1:].split(TURN)]
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    texts = [text for _, text in turns]
    return Conversation(system, tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1])


def day_of(date: str) -> datetime.datetime:
    """The day that chat templates use as today, at midnight.

    Args:
        date: a date such as "10 Apr 2025".

    Raises:
        UserError: the date has another form.

    Example:
        >>> day_of("10 Apr 2025").strftime("%Y-%m-%d")
        '2025-04-10'
    """
    try:
        return datetime.datetime.strptime(date, DATE_FORM)
    except ValueError:
        raise UserError(
            f"date {date!r} of the chat template is not written like {DATE!r}; write day, month "
            "(three English letters) and year"
        ) from None
