"""Measures of generated text that need no model: overlap, repetition, entropy."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from jaxlib_unlearn.errors import UserError

Answer = str | Sequence[int]

SHORT = 3
# Signs that end a sentence (Latin, CJK, Arabic, Devanagari), and signs that may follow them.
_END = re.compile(r"""[.!?…。！？｡؟۔।॥]["'”’»›)\]}」』）*`\s]*$""")


def rouge(prediction: str, reference: str, use_stemmer: bool = True) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L of an answer against its reference.

        recall = LCS / len(reference),  precision = LCS / len(prediction),  F1 = 2PR/(P+R)

    Tokens are runs of a-z0-9 of the lower-cased text (accented letters are dropped), stemmed by
    Porter's rules when longer than three letters.

    Args:
        prediction: the generated answer.
        reference: the right answer.
        use_stemmer: True in TOFU and OpenUnlearning, False in MUSE's own code.

    Returns:
        `rouge1_recall`, `rougeL_recall`, `rougeL_f1`, each in [0, 1]. TOFU reports rougeL_recall,
        MUSE rougeL_f1.

    Raises:
        UserError: the package rouge-score is not installed.

    Example:
        >>> rouge("the cats sat", "a cat sat down")["rougeL_recall"]
        0.5

    TOFU, arXiv 2401.06121; MUSE, arXiv 2407.06460.
    """
    scores = _scorer(use_stemmer).score(reference, prediction)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_recall": float(scores["rougeL"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
    }


@lru_cache(maxsize=2)
def _scorer(use_stemmer: bool) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError("ROUGE needs the package rouge-score; pip install rouge-score") from error
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=use_stemmer)


def repeated_bigram_rate(answers: Answer | Sequence[Answer]) -> float:
    """Rate of repetition in answers: 0 = never, near 1 = one phrase over and over.

        rate(a) = 1 - #distinct bigrams(a) / #bigrams(a),   mean over answers

    i.e. the share of bigrams that already occurred earlier in the same answer. An answer of fewer
    than two words counts as 0.

    Args:
        answers: one answer or several; each a text (lower-cased, split at white space) or ids.

    Returns:
        The mean rate in [0, 1).

    Raises:
        ValueError: no answers.

    Example:
        >>> repeated_bigram_rate(["a b a b a", "all words differ here"])
        0.25
    """
    several = _as_answers(answers)
    if not several:
        raise ValueError("repeated_bigram_rate needs at least one answer")
    return float(np.mean([_repeated(_tokens(answer)) for answer in several]))


def _repeated(tokens: list) -> float:
    bigrams = list(zip(tokens[:-1], tokens[1:], strict=True))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def unfinished(answer: str, reference: str, cut: bool = False, may_be_cut: bool = False) -> str:
    """The reason why an answer is incomplete: it is empty, has fewer than 3 words, or does not end.

    Words are runs between white space with a letter or digit in them. A short reference, or one
    that ends without a full stop (a name, a list item, a script without spaces), demands no more of
    the answer.

    Args:
        answer: the generated answer.
        reference: the right answer.
        cut: generation stopped at its limit, not at an end of the text.
        may_be_cut: the reference itself is longer than that limit, so a cut is accepted.

    Returns:
        The reason, or "" for a complete answer.

    Example:
        >>> unfinished("Paris", "Paris"), unfinished("Paris", "She was born in Paris.")
        ('', 'fewer than 3 words')
        >>> unfinished("She was born in", "She was born in Paris.")
        'no end of a sentence'
    """
    words = len(_spoken(answer))
    if not words:
        return "empty"
    if words < SHORT <= len(_spoken(reference)):
        return f"fewer than {SHORT} words"
    if cut and may_be_cut:
        return ""
    if _END.search(reference):
        return "" if _END.search(answer) else "cut" if cut else "no end of a sentence"
    return "cut" if cut else ""


def _spoken(text: str) -> list[str]:
    return [word for word in text.split() if any(c.isalnum() for c in word)]


def fact_recall(answer: str, values: Sequence[str]) -> float:
    """Share of the values of a fact that occur in an answer, as whole words in any case.

        ``recall = |{v in values: v occurs in answer}| / |values|``

    Unlike ROUGE it gives no credit for the right sentence around a wrong fact.

    Args:
        answer: the generated answer.
        values: the words that make up the fact, at least one.

    Returns:
        The share in [0, 1].

    Raises:
        ValueError: no values.

    Example:
        >>> fact_recall("Born in Lima on May 17.", ("Lima", "June", "7"))  # 17 is not 7
        0.33
    """
    if not values:
        raise ValueError("fact_recall needs at least one value")
    found = [
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) for value in values
    ]
    return sum(match is not None for match in found) / len(values)


def _tokens(answer: Answer) -> list:
    return answer.lower().split() if isinstance(answer, str) else [int(token) for token in answer]


def _as_answers(answers: Answer | Sequence[Answer]) -> list[Answer]:
    if isinstance(answers, str):
        return [answers]
    one = len(answers) > 0 and np.ndim(answers[0]) == 0 and not isinstance(answers[0], str)
    return cast("list[Answer]", [answers] if one else list(answers))
