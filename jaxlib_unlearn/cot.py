"""Shorter chains of thought: a trace as a list of thoughts, of which some are kept.

A row of reasoning is a mapping in one of three forms. Its other entries do not change:

- `question`, `thoughts` (a list of texts) and `answer`;
- `question` and `answer`, whose text is `<think>…</think>` and what follows;
- `messages`, the last of which (`role`, `content`) is such a text.

EPiC (arXiv 2506.04205) keeps the first and the last thoughts. Its text leaves open the separator
of thoughts and the rounding of their number; :func:`split_thoughts` and :func:`budget` document
the choices made here.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option

OPEN, CLOSE = "<think>", "</think>"
BETWEEN = "\n\n"  # of the thoughts of a list, where they are written as one text
MARKERS = (
    *("Wait", "Alternatively", "Hmm", "But", "However", "So", "Let me", "Actually", "Therefore"),
    "Now",
)
_BLANK_LINES = re.compile(r"\n\s*\n")
_MARKED = re.compile(rf"\s*(?:{'|'.join(MARKERS)})\b", re.IGNORECASE)
_SHAPE = f"{OPEN}…{CLOSE} and the answer behind it"


def _paragraphs(text: str) -> list[str]:
    ends = [0, *(found.end() for found in _BLANK_LINES.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _marked(text: str) -> list[str]:
    thoughts: list[str] = []
    for paragraph in _paragraphs(text):
        if thoughts and not _MARKED.match(paragraph):
            thoughts[-1] += paragraph
        else:
            thoughts.append(paragraph)
    return thoughts


def _lines(text: str) -> list[str]:
    *lines, last = text.split("\n")
    return [*(line + "\n" for line in lines), last]


MODES: dict[str, Callable[[str], list[str]]] = {
    "paragraph": _paragraphs,
    "marker": _marked,
    "line": _lines,
}


def split_thoughts(text: str, mode: str = "paragraph") -> list[str]:
    """The thoughts of a trace, in order; joined, they are the text again.

        "".join(split_thoughts(text)) == text

    The separator of two thoughts stays at the end of the first, and white space before the first
    thought stays at its beginning: no thought is blank unless the whole text is.

    Args:
        text: the trace.
        mode: `paragraph`: blank lines separate thoughts. `marker`: a thought begins at a paragraph
            whose first word is one of `MARKERS`, in either case. `line`: every line is one.

    Returns:
        The thoughts; none of an empty text.

    Raises:
        UserError: an unknown mode.

    Example:
        >>> split_thoughts("Two and two.\\n\\nWait, is it 5?\\n\\nIt is 4.")
        ['Two and two.\\n\\n', 'Wait, is it 5?\\n\\n', 'It is 4.']
        >>> split_thoughts("Two and two.\\n\\nWait, is it 5?\\n\\nIt is 4.", "marker")
        ['Two and two.\\n\\n', 'Wait, is it 5?\\n\\nIt is 4.']

    EPiC, arXiv 2506.04205; the separators are ours.
    """
    thoughts: list[str] = []
    blank = ""
    for piece in _chosen(mode, MODES, "mode")(text):
        if not piece or piece.isspace():
            blank += piece
            if thoughts:
                thoughts[-1] += blank
                blank = ""
        else:
            thoughts.append(blank + piece)
            blank = ""
    return [*thoughts, blank] if blank else thoughts


def budget(n: int, tau: float) -> int:
    """The number of thoughts kept out of n.

        m = min(max(ceil(tau n), 2), n)

    tau is the decimal number as it is written: 0.07 of 100 thoughts are 7, not 8.

    Args:
        n: the number of thoughts.
        tau: the share that is kept, in [0, 1].

    Returns:
        m; at least both ends are kept.

    Raises:
        UserError: tau is not in [0, 1].

    Example:
        >>> [budget(n, 0.5) for n in (0, 1, 3, 10)]
        [0, 1, 2, 5]
    """
    return min(max(math.ceil(_share("tau", tau) * n), 2), n)


def _edge(n: int, m: int, head: Fraction, seed: int | str) -> Iterable[int]:
    first = math.ceil(head * m)
    return (*range(first), *range(n - m + first, n))


def _head(n: int, m: int, head: Fraction, seed: int | str) -> Iterable[int]:
    return range(m)


def _tail(n: int, m: int, head: Fraction, seed: int | str) -> Iterable[int]:
    return range(n - m, n)


def _middle(n: int, m: int, head: Fraction, seed: int | str) -> Iterable[int]:
    first = (n - m) // 2
    return range(first, first + m)


def _random(n: int, m: int, head: Fraction, seed: int | str) -> Iterable[int]:
    draws = random.Random(seed)  # only its method `random` is the same in every Python
    order = sorted(range(n), key=lambda _: draws.random())
    return sorted(order[:m])


POLICIES: dict[str, Callable[[int, int, Fraction, int | str], Iterable[int]]] = {
    "edge": _edge,
    "head": _head,
    "tail": _tail,
    "middle": _middle,
    "random": _random,
}


def select(
    n: int, tau: float, policy: str = "edge", head_share: float = 0.5, seed: int | str = 0
) -> list[int]:
    """The numbers of the thoughts that are kept.

        m = budget(n, tau),  h = ceil(head_share m)
        edge: 0 … h-1 and n-m+h … n-1      head: the first m      tail: the last m
        middle: m from (n-m) // 2 on       random: m drawn without replacement

    A larger tau keeps all that a smaller one keeps.

    Args:
        n: the number of thoughts.
        tau: the share that is kept, in [0, 1].
        policy: one of `POLICIES`; `edge` is EPiC.
        head_share: the share of first thoughts among the kept ones under `edge`, in [0, 1]: 1 is
            `head` and 0 is `tail`. (The number in the names of the authors' data sets is the share
            of last thoughts.)
        seed: the seed of the policy `random`.

    Returns:
        m ascending numbers from 0 to n - 1.

    Raises:
        UserError: an unknown policy, or a share outside [0, 1].

    Example:
        >>> select(10, 0.5), select(10, 0.5, "middle"), select(10, 0.5, head_share=1.0)
        ([0, 1, 2, 8, 9], [2, 3, 4, 5, 6], [0, 1, 2, 3, 4])

    EPiC, arXiv 2506.04205; the rounding is ours.
    """
    chosen = _chosen(policy, POLICIES, "policy")
    return list(chosen(n, budget(n, tau), _share("head_share", head_share), seed))


def _share(name: str, value: float) -> Fraction:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; it must be from 0 to 1")
    return Fraction(str(float(value)))


def _chosen(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown; use one of {', '.join(table)}")
    return table[name]


@dataclass(frozen=True)
class Condense:
    """Options of shortening traces."""

    tau: float = option(0.5, "share of the thoughts that is kept.", low=0, high=1)
    policy: str = option(
        "edge",
        "which are kept: the first and the last (`edge`, EPiC), the first (`head`), the last "
        "(`tail`), those in between (`middle`), or any (`random`).",
        choices=tuple(POLICIES),
    )
    head_share: float = option(
        0.5, "of `edge`: share of the kept thoughts that are the first ones.", low=0, high=1
    )
    mode: str = option(
        "paragraph",
        "what a thought is, in a trace that is one text: what stands between blank lines "
        "(`paragraph`), all up to the next paragraph that begins with a word such as Wait or But "
        "(`marker`), or a line (`line`).",
        choices=tuple(MODES),
    )


class Trace(NamedTuple):
    """The trace of a row.

    Args:
        column: the column that holds it: `thoughts`, `answer` or `messages`.
        question: the question.
        before: the text up to the first thought: the opening tag, and white space behind it.
        thoughts: the thoughts, in order.
        after: the text behind the last thought: white space, the closing tag, the answer.
    """

    column: str
    question: str
    before: str
    thoughts: Sequence[str]
    after: str

    @property
    def text(self) -> str:
        """Trace and answer as a model writes them."""
        between = BETWEEN if self.column == "thoughts" else ""
        return f"{self.before}{between.join(self.thoughts)}{self.after}"


class Condensed(NamedTuple):
    """A row with a shorter trace.

    Args:
        row: the row; the one that was given where nothing was left out.
        before: the original trace.
        after: the shortened trace.
    """

    row: Mapping[str, Any]
    before: Trace
    after: Trace


def find_trace(row: Mapping[str, Any], mode: str = "paragraph") -> Trace:
    """The trace of a row of reasoning.

    Args:
        row: a row in one of the forms that the module's documentation names.
        mode: the way to split a trace that is one text, see :func:`split_thoughts`.

    Returns:
        The trace; `find_trace(row).text` is the answer with its trace.

    Raises:
        UserError: no tags or other than one of each, no thought, or no answer behind the trace.

    Example:
        >>> found = find_trace({"question": "?", "answer": "<think>\\nTwo.\\n\\nAnd two.</think>4"})
        >>> found.before, found.thoughts, found.after
        ('<think>\\n', ['Two.\\n\\n', 'And two.'], '</think>4')
    """
    if row.get("thoughts") is not None:
        return _of_list(row)
    answer, messages = row.get("answer"), row.get("messages")
    tagged = isinstance(answer, str) and (OPEN in answer or CLOSE in answer)
    if messages is not None and not tagged:
        question, content = _turns(messages)
        return _of_text("messages", question, content, mode)
    return _of_text("answer", _string(row, "question"), _string(row, "answer"), mode)


def _of_list(row: Mapping[str, Any]) -> Trace:
    thoughts, answer = row["thoughts"], _string(row, "answer")
    if not isinstance(thoughts, list | tuple) or not thoughts:
        raise UserError("'thoughts' is no list of texts, or an empty one; give at least one")
    for number, thought in enumerate(thoughts, 1):
        if not isinstance(thought, str) or not thought.strip():
            raise UserError(f"thought {number} of 'thoughts' is empty or no text; leave it out")
        if OPEN in thought or CLOSE in thought:
            raise UserError(f"thought {number} of 'thoughts' holds a think tag; take it out")
    if OPEN in answer or CLOSE in answer:
        raise UserError("has 'thoughts', and think tags in 'answer'; leave one of them out")
    if not answer.strip():
        raise UserError("'answer' is empty; write the answer there, behind the 'thoughts'")
    before, after = f"{OPEN}\n", f"\n{CLOSE}\n\n{answer}"
    return Trace("thoughts", _string(row, "question"), before, thoughts, after)


def _of_text(column: str, question: str, text: str, mode: str) -> Trace:
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if not opened and not closed:
        raise UserError(
            f"no {OPEN} in {column!r} and no list 'thoughts'; write {_SHAPE}, or the thoughts as a "
            "list"
        )
    start, end = text.find(OPEN) + len(OPEN), text.find(CLOSE)
    if opened != 1 or closed != 1 or end < start:
        order = ", in the wrong order" if opened == closed == 1 else ""
        raise UserError(
            f"{opened} {OPEN} and {closed} {CLOSE} in {column!r}{order}; write {_SHAPE}"
        )
    if not text[end + len(CLOSE) :].strip():
        raise UserError(
            f"nothing follows {CLOSE} in {column!r}, so the answer is inside the trace only; write "
            f"{_SHAPE}"
        )
    trace = text[start:end]
    inner = trace.strip()
    if not inner:
        raise UserError(f"no thought between {OPEN} and {CLOSE} in {column!r}; leave the row out")
    # White space beside the tags belongs to them, so that it stays whatever is left out.
    start += len(trace) - len(trace.lstrip())
    end -= len(trace) - len(trace.rstrip())
    return Trace(column, question, text[:start], split_thoughts(inner, mode), text[end:])


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"no {name!r}, a text; give every row one")
    return value


def _turns(messages: Any) -> tuple[str, str]:
    """The text of the turns before the last one, and the text of the last one."""
    said = [
        turn["content"]
        for turn in (messages if isinstance(messages, list | tuple) else ())
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
    ]
    if not said or len(said) != len(messages):
        raise UserError("'messages' is no list of turns with 'role' and 'content'; give one")
    if messages[-1].get("role") != "assistant":
        raise UserError("the last of 'messages' is no turn of the assistant; end with one")
    return "\n".join(said[:-1]), said[-1]


def condense(
    row: Mapping[str, Any],
    tau: float = 0.5,
    policy: str = "edge",
    *,
    head_share: float = 0.5,
    mode: str = "paragraph",
    seed: int = 0,
    number: int = 0,
) -> Condensed:
    """A row of reasoning with fewer thoughts; nothing is written where some are left out.

    Question, answer and tags stay byte for byte, and so does each thought that is kept, except for
    white space between the last one and the closing tag.

    Args:
        row: a row in one of the forms that the module's documentation names.
        tau: the share of thoughts that is kept, as in :func:`select`.
        policy: the choice of the kept thoughts, one of `POLICIES`.
        head_share: the share of first thoughts under `edge`.
        mode: the way to split a trace that is one text, see :func:`split_thoughts`.
        seed: the seed of the policy `random`.
        number: the number of the row, which keys its own draws.

    Returns:
        The row, and its trace before and after.

    Raises:
        UserError: a row without a trace or an answer, or options out of range.

    Example:
        >>> row = {"question": "1+1+1?", "thoughts": ["One.", "Two.", "Three."], "answer": "3"}
        >>> condense(row, tau=0.5).row["thoughts"]
        ['One.', 'Three.']

    EPiC, arXiv 2506.04205.
    """
    found = find_trace(row, mode)
    n = len(found.thoughts)
    kept = select(n, tau, policy, head_share, f"{seed}/{number}")
    if len(kept) == n:
        return Condensed(row, found, found)
    thoughts = [found.thoughts[i] for i in kept]
    if found.column == "thoughts":
        return Condensed({**row, "thoughts": thoughts}, found, found._replace(thoughts=thoughts))
    thoughts[-1] = thoughts[-1].rstrip()
    after = found._replace(thoughts=thoughts)
    if found.column == "answer":
        return Condensed({**row, "answer": after.text}, found, after)
    *others, last = row["messages"]
    return Condensed({**row, "messages": [*others, {**last, "content": after.text}]}, found, after)
