"""ROUGE, repetition and entropy of texts on hand cases."""

import builtins

import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import text


@pytest.fixture
def rouge():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (extra [train])")
    return text.rouge


def test_rouge_hand_cases(rouge):
    assert set(rouge("one two three", "One, two; three!").values()) == {1.0}
    assert set(rouge("red", "blue sky").values()) == {0.0}
    assert set(rouge("", "blue sky").values()) == {0.0}
    assert set(rouge("anything", "...").values()) == {0.0}
    assert rouge("caf", "café")["rouge1_recall"] == 1  # the accented letter is dropped
    swapped = rouge("b a c", "a b c d")
    assert swapped["rouge1_recall"] == 0.75 and swapped["rougeL_recall"] == 0.5
    assert swapped["rougeL_f1"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_rouge_stemmer(rouge):
    assert rouge("the authors", "the author")["rougeL_recall"] == 1
    assert rouge("the authors", "the author", use_stemmer=False)["rougeL_recall"] == 0.5


def test_rouge_without_the_package(monkeypatch):
    text._scorer.cache_clear()
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "rouge_score":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install rouge-score"):
        text.rouge("a", "b")
    text._scorer.cache_clear()


@pytest.mark.parametrize(
    "answers, rate",
    [
        ("a b c d", 0.0),
        ("The the the the", 2 / 3),  # bigrams: one new, two repeated
        (["a b a b a", "x y z"], 0.25),
        ([[1, 2, 1, 2], [1, 2]], 1 / 6),
        ([7, 7, 7], 0.5),
        (["a b", "a b"], 0.0),  # within one answer only
        (["", "word", "a a a"], 1 / 6),
        ("", 0.0),
    ],
)
def test_repeated_bigram_rate(answers, rate):
    assert text.repeated_bigram_rate(answers) == pytest.approx(rate)


def test_repeated_bigram_rate_needs_answers():
    with pytest.raises(ValueError, match="at least one answer"):
        text.repeated_bigram_rate([])


LONG = "She was born in Paris."


@pytest.mark.parametrize(
    "answer, reference, cut, may_be_cut, reason",
    [
        ("He was born in Rome.", LONG, False, False, ""),
        ('They call it "Rome."', LONG, False, False, ""),
        ("", LONG, False, False, "empty"),
        ("", "Paris", False, False, "empty"),
        (" ... !", LONG, False, False, "empty"),
        ("Rome.", LONG, False, False, "fewer than 3 words"),
        ("Rome", "Paris", False, False, ""),  # as short as the truth
        ("In Rome", "New Orleans", False, False, ""),
        ("She was born in", LONG, False, False, "no end of a sentence"),
        ("She was born in", LONG, True, False, "cut"),
        ("She was born in", LONG, True, True, ""),  # the truth would have been cut, too
        ("She was born in", LONG, False, True, "no end of a sentence"),  # it ended there itself
        ("Rome", LONG, True, True, "fewer than 3 words"),
        ("", LONG, True, True, "empty"),
        ("one two three", "four five six", False, False, ""),  # the truth has no full stop
        ("one two three", "four five six", True, False, "cut"),
        ("她出生在东京。", "她出生在巴黎。", False, False, ""),
        ("她出生在", "她出生在巴黎。", False, False, "no end of a sentence"),
    ],
)
def test_unfinished(answer, reference, cut, may_be_cut, reason):
    assert text.unfinished(answer, reference, cut, may_be_cut) == reason


@pytest.mark.parametrize(
    "answer, values, share",
    [
        ("Born in Lima on May 7.", ["Lima", "May", "7"], 1.0),
        ("born in LIMA, on june 17", ["Lima", "May", "7"], 1 / 3),
        ("Limassol", ["Lima"], 0.0),
        ("", ["Lima"], 0.0),
        ("It cost $5 (a+b).", ["$5", "a+b"], 1.0),
    ],
)
def test_fact_recall(answer, values, share):
    assert text.fact_recall(answer, values) == pytest.approx(share)


def test_fact_recall_needs_values():
    with pytest.raises(ValueError, match="at least one value"):
        text.fact_recall("a", [])
