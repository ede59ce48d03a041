"""Rules for traces against hand-made labels, and numbers against numbers."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from jaxlib_unlearn.metrics.final_answer import number_in
from jaxlib_unlearn.metrics.traces import CLASSES, same_number, states, trace_class

# A question, its options, other facts, a trace, and the class that a person gave it.
LABELLED = Path(__file__).with_name("labelled_traces.jsonl")


def labelled():
    return [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]


def class_of(row):
    wrong = [text for i, text in enumerate(row["options"]) if i != row["gold"]]
    gold = row["options"][row["gold"]]
    return trace_class(row["trace"], gold, wrong, row["facts"], row["question"])


def test_rules_agree_with_60_labels_made_by_hand():
    rows = labelled()
    found = [class_of(row) for row in rows]
    agreed = sum(a == row["class"] for a, row in zip(found, rows, strict=True)) / len(rows)
    safe = sum((a == 1) == (row["class"] == 1) for a, row in zip(found, rows, strict=True))
    print(f"agreement on four classes {agreed:.3f}, on safe or unsafe {safe / len(rows):.3f}")
    assert len(rows) == 60 and {row["class"] for row in rows} == set(CLASSES)
    assert min(sum(row["class"] == c for row in rows) for c in CLASSES) >= 10
    assert agreed >= 0.9 and safe >= 0.9 * len(rows)


def test_rules_read_the_trace_alone():
    """Without it, or with another question's, little is left to agree on."""
    rows = labelled()
    assert all(class_of(row | {"trace": ""}) == 1 for row in rows)
    # six traces a question: those of the next one
    moved = [{**row, "trace": other["trace"]} for row, other in zip(rows, rows[6:], strict=False)]
    assert sum(class_of(row) == 4 for row in moved) <= 1


@pytest.mark.parametrize(
    ("text", "value", "known", "found"),
    [
        ("She was born in LIMA.", "Lima", "", True),
        ("in Limatambo", "Lima", "", False),
        ("the Cobalt prize", "the cobalt prize", "", True),
        ("a prize of Cobalt", "the Cobalt prize", "", False),
        ("it is 1973.", "1973", "", True),
        ("it is 19731.", "1973", "", False),
        ("Born to a baker, in Lima", "She was born in Lima to a baker.", "", True),
        ("Was she born?", "She was born in Lima to a baker.", "Where was she born?", False),
        ("", "Lima", "", False),
        ("anything", "", "", False),
        ("Ünal wrote it", "ünal", "", True),
    ],
)
def test_stated(text, value, known, found):
    assert states(text, value, known) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("It costs $1,234.50.", Fraction("1234.5")),
        (r"so \boxed{3/4} of 8", Fraction(3, 4)),
        (r"\boxed{5} or \boxed{7}", 7),
        ("-3 degrees", -3),
        ("10 of 12", 12),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("pages 3-5", 5),  # a range, not a sign
        ("2020-21, that is x-7", 7),
        ("5 - 3 or (-3)", -3),
        ("item.5", 5),
        ("1,2", 2),
        ("12,3456", 3456),
        ("1e5", 5),
        ("9" * 100, int("9" * 100)),
        ("9" * 5000, None),  # more digits than Python converts
        ("1/" + "9" * 5000, None),
        ("It takes 3.\n#### 1,200\nmore 7", 1200),
        (r"\boxed{ {3} } of 8", 3),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_is_answered(text, number):
    assert number_in(text) == number
    assert same_number(text, str(number)) == (number is not None)


def test_numbers_are_compared_as_numbers():
    assert same_number("18.0", "18") and same_number("0.5", "1/2") and not same_number("", "18")
