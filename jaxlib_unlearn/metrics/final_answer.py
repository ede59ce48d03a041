"""The final answer of a text that reasons, and whether two of them are the same."""

import re
from fractions import Fraction

from jaxlib_unlearn.cot import CLOSE

MARK = "####"  # before the answer, in GSM8K
_BOX = re.compile(r"\\boxed\s*\{")
LONGEST = 100  # characters of a number; longer answers are compared as texts
# A sign belongs to a number only where no word ends before it: "3-5" are 3 and 5.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?"
)


def final_answer(text: str) -> str:
    """The final answer of a text.

    Only the text behind the last ``</think>`` counts, or the whole text where there is none. The
    answer is the content of the last ``\\boxed{}``; else the line behind the last ``####``; else
    the last number; else the whole text.

    Args:
        text: an answer, with or without its trace.

    Returns:
        The answer, without white space around it.

    Example:
        >>> final_answer("<think>4?</think> It is \\\\boxed{x^{2}}."), final_answer("a 3, b 5.")
        ('x^{2}', '5')
    """
    said = text.rpartition(CLOSE)[2]
    boxes = [found.end() for found in _BOX.finditer(said)]
    if boxes:
        return _braced(said[boxes[-1] :]).strip()
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

    Thousands separators, a currency or percent sign and a full stop at the end do not count. A
    number is written with digits, at most a hundred characters long, without an exponent.

    Args:
        one: a final answer.
        other: the final answer to compare with.

    Returns:
        Whether they agree.

    Example:
        >>> same_answer("$1,200", "1200.0"), same_answer("1/2", "0.5"), same_answer("5", "15")
        (True, True, False)
    """
    a, b = _bare(one), _bare(other)
    return a == b or (_number(a) is not None and _number(a) == _number(b))


def number_in(text: str) -> Fraction | None:
    """The number that a text answers: the last one in its final answer.

    Args:
        text: an answer, with or without its trace.

    Returns:
        The number; None where there is none, or one that :func:`same_answer` takes for text.

    Example:
        >>> number_in("so $1,250.50 in all"), number_in("\\\\boxed{3/4} of 8"), number_in("none")
        (Fraction(2501, 2), Fraction(3, 4), None)
    """
    found = _NUMBER.findall(final_answer(text))
    return _number(_bare(found[-1])) if found else None


def _bare(text: str) -> str:
    text = _NUMBER.sub(lambda found: found[0].replace(",", ""), text)
    return "".join(text.split()).strip("$%").removesuffix(".")


def _number(text: str) -> Fraction | None:
    if len(text) > LONGEST or "," in text or not _NUMBER.fullmatch(text):
        return None
    above, _, below = text.partition("/")
    divisor = Fraction(below or "1")
    return Fraction(above) / divisor if divisor else None
