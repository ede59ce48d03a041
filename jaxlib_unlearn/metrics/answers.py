"""Scores of short answers against right ones, as in SQuAD."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain_words(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles.

    Example:
        >>> plain_words("The cat, a dog!")
        ['cat', 'dog']
    """
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return ARTICLES.sub(" ", bare).split()


def token_f1(answer: str, right: str) -> float:
    """``F1 = 2 n / (|answer| + |right|)`` over words, n of which the two have in common.

    Two texts without a word are the same; with one such text F1 is 0.

    Args:
        answer: the answer to judge.
        right: a right answer.

    Returns:
        In [0, 1].

    Example:
        >>> token_f1("in the year 1969", "1969"), token_f1("The Moon", "moon.")
        (0.5, 1.0)

    Rajpurkar et al. 2016, arXiv 1606.05250, section 6 and its evaluation script.
    """
    found, wanted = plain_words(answer), plain_words(right)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def best_f1(answer: str, rights: Sequence[str]) -> float:
    """`token_f1` against the nearest right answer.

    Example:
        >>> best_f1("Paris", ["the city of Paris", "Paris"])
        1.0
    """
    return max(token_f1(answer, right) for right in rights)


def exact_match(answer: str, rights: Sequence[str]) -> float:
    """1 where the words of the answer are those of a right one.

    Example:
        >>> exact_match("the Moon.", ["Moon"]), exact_match("a full moon", ["Moon"])
        (1.0, 0.0)
    """
    return float(any(plain_words(answer) == plain_words(right) for right in rights))
