"""The final answer of a text that reasons, and whether two of them are the same."""

import re
from fractions import Fraction

from jaxlib_unlearn.cot import CLOSE

MARK = "####"  # before the answer, in GSM8K
_BOX = r"\boxed{"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_answer(text: str) -> str:
    """What a text says in the end.

    Of what follows the last ``</think>`` (of the whole text where there is none): what the last
    ``\\boxed{}`` holds; else the line behind the last ``####``; else the last number; else all.

    Args:
        text: an answer, with or without its trace.

    Returns:
        The answer, without white space around it.

    Example:
        >>> final_answer("<think>4?</think> It is \\\\boxed{x^{2}}."), final_answer("a 3, b 5.")
        ('x^{2}', '5')
    """
    said = text.rpartition(CLOSE)[2]
    boxed = said.rfind(_BOX)
    if boxed >= 0:
        return _braced(said[boxed + len(_BOX) :]).strip()
    if MARK in said:
        return said.rpartition(MARK)[2].strip().partition("\n")[0].strip()
    numbers = _NUMBER.findall(said)
    return numbers[-1] if numbers else said.strip()


def _braced(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:place]
    return text


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same: as numbers, or as texts without white space.

    Thousands separators, a currency or percent sign and a full stop at the end do not count.

    Args:
        one: a final answer.
        other: another.

    Returns:
        Whether they agree.

    Example:
        >>> same_answer("$1,200", "1200.0"), same_answer("1/2", "0.5"), same_answer("5", "15")
        (True, True, False)
    """
    a, b = _bare(one), _bare(other)
    return a == b or (_number(a) is not None and _number(a) == _number(b))


def _bare(text: str) -> str:
    return "".join(text.split()).strip("$%").removesuffix(".").replace(",", "")


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
