"""What can be said about generated text without a model: overlap, repetition, entropy."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from jaxlib_unlearn.errors import UserError

Answer = str | Sequence[int]


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
    """How much the answers repeat themselves: 0 = never, near 1 = one phrase over and over.

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


def token_entropy(text: Answer) -> float:
    """Entropy of the tokens of a text relative to its maximum (TE).

        TE = -sum_v q_v log2 q_v / log2(N),   q_v = share of token v among the N tokens

    Args:
        text: a text (lower-cased, split at white space) or token ids.

    Returns:
        TE in [0, 1]: 1 = all tokens differ; 0 for at most one token.

    Example:
        >>> token_entropy("a b a b")
        0.5

    Attention Smoothing Unlearning, metric TE.
    """
    tokens = _tokens(text)
    if len(tokens) <= 1:
        return 0.0
    share = np.array(list(Counter(tokens).values())) / len(tokens)
    # + 0.0 turns the -0.0 of a single repeated token into 0.0.
    return float(-np.sum(share * np.log2(share)) / np.log2(len(tokens))) + 0.0


def _tokens(answer: Answer) -> list:
    return answer.lower().split() if isinstance(answer, str) else [int(token) for token in answer]


def _as_answers(answers: Answer | Sequence[Answer]) -> list[Answer]:
    if isinstance(answers, str):
        return [answers]
    one = len(answers) > 0 and np.ndim(answers[0]) == 0 and not isinstance(answers[0], str)
    return cast("list[Answer]", [answers] if one else list(answers))
