"""Traces: a lossless split, choices of thoughts that are nested, and rows that stay whole."""

import math
import subprocess
import sys
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlib_unlearn import cot
from jaxlib_unlearn.cot import CLOSE, OPEN, condense, find_trace, select, split_thoughts
from jaxlib_unlearn.errors import UserError

PIECES = st.sampled_from(
    ["\n", "\n\n", "\n\n\n", " \n", "\r\n\r\n", "\t", "Wait, no.", "So", "But", "let me see", "x"]
)
CHARACTERS = st.text(st.characters(), max_size=4)  # surrogates and control characters as well
TEXTS = st.lists(PIECES | CHARACTERS, max_size=12).map("".join)
SHARES = st.integers(0, 100).map(lambda k: k / 100) | st.floats(0, 1)
MODE, POLICY = st.sampled_from([*cot.MODES]), st.sampled_from([*cot.POLICIES])


@given(TEXTS, MODE)
def test_split_loses_nothing(text, mode):
    thoughts = split_thoughts(text, mode)
    assert "".join(thoughts) == text
    assert all(thought.strip() for thought in thoughts) or thoughts == [text]
    assert (thoughts == []) == (text == "")


@pytest.mark.parametrize(
    ("mode", "text", "thoughts"),
    [
        ("paragraph", "a\nb\n\nc", ["a\nb\n\n", "c"]),
        ("paragraph", "a\n \t\n\n  c\n\n", ["a\n \t\n\n", "  c\n\n"]),
        ("paragraph", "\n\na\r\n\r\nb", ["\n\na\r\n\r\n", "b"]),
        ("paragraph", "a\u2028b\x85c", ["a\u2028b\x85c"]),  # line ends, of which none is blank
        ("marker", "a\n\nb\n\nWait, c\n\nlet me d", ["a\n\nb\n\n", "Wait, c\n\n", "let me d"]),
        (
            "marker",
            "Some\n\nSo, b\n\nNowhere\n\nHmm.",
            ["Some\n\n", "So, b\n\nNowhere\n\n", "Hmm."],
        ),
        ("line", "a\r\nb\n\n c\n", ["a\r\n", "b\n\n", " c\n"]),
        ("line", " \n\n", [" \n\n"]),
    ],
)
def test_split_by_hand(mode, text, thoughts):
    assert split_thoughts(text, mode) == thoughts


@given(st.integers(0, 200), SHARES, POLICY, SHARES, st.integers(0, 9))
def test_budget_and_order(n, tau, policy, head_share, seed):
    kept = select(n, tau, policy, head_share, seed)
    wanted = min(max(math.ceil(Decimal(repr(tau)) * n), 2), n)
    assert len(kept) == wanted == cot.budget(n, tau)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(n))
    if tau == 1:
        assert kept == list(range(n))
    if policy == "edge" and n >= 2 and head_share == 0.5:
        assert kept[0] == 0 and kept[-1] == n - 1


@given(st.integers(0, 60), SHARES, SHARES, POLICY, SHARES, st.integers(0, 9))
def test_a_larger_share_keeps_all_that_a_smaller_one_keeps(n, one, other, policy, head, seed):
    few, many = (select(n, tau, policy, head, seed) for tau in sorted((one, other)))
    assert set(few) <= set(many)


@given(st.integers(0, 200), SHARES, SHARES)
def test_edge_is_a_prefix_and_a_suffix(n, tau, head_share):
    kept = select(n, tau, "edge", head_share)
    first = math.ceil(Decimal(repr(head_share)) * len(kept))
    assert kept == [*range(first), *range(n - len(kept) + first, n)]
    assert select(n, tau, "edge", 1.0) == select(n, tau, "head")
    assert select(n, tau, "edge", 0.0) == select(n, tau, "tail")
    middle = math.ceil(len(kept) / 2)
    halves = select(n, tau)
    assert halves[:middle] == select(n, tau, "head")[:middle]
    assert halves[middle:] == select(n, tau, "tail")[middle:]
    # Reversing the trace swaps head and tail.
    assert [n - 1 - i for i in reversed(select(n, tau, "head"))] == select(n, tau, "tail")


def test_random_keeps_each_thought_equally_often():
    n, tau, draws = 9, 1 / 3, 3000
    counts = Counter(i for seed in range(draws) for i in select(n, tau, "random", seed=seed))
    chi_square = sum((counts[i] - draws / 3) ** 2 / (draws / 3) for i in range(n))
    assert chi_square < 26.1  # of 8 degrees of freedom, once in a thousand
    assert select(n, tau, "random", seed=7) == select(n, tau, "random", seed=7)
    # What a draw is does not change from one Python to another.
    assert select(10, 0.3, "random", seed="0/1") == [3, 6, 8]


THOUGHT = CHARACTERS.filter(lambda t: t.strip() and "think>" not in t)
TRACES = st.lists(THOUGHT, min_size=1, max_size=9)
FORMS = st.sampled_from(["thoughts", "answer", "messages"])


def row_of(form, thoughts, separator, question, answer):
    if form == "thoughts":
        return {"id": 3, "question": question, "thoughts": thoughts, "answer": answer}
    text = f"\u2026{OPEN}\n {separator.join(thoughts)} \n{CLOSE}{answer}"
    if form == "answer":
        return {"question": question, "answer": text, "topic": None}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"messages": turns, "answer": "4"}


@given(FORMS, TRACES, st.sampled_from(["\n\n", "\n"]), CHARACTERS, THOUGHT, SHARES, POLICY, MODE)
def test_all_but_the_trace_stays(form, thoughts, between, question, answer, tau, policy, mode):
    row = row_of(form, thoughts, between, question, answer)
    before = find_trace(row, mode)
    found = condense(row, tau, policy, mode=mode, seed=2, number=5)
    after = find_trace(found.row, mode)
    kept = select(len(before.thoughts), tau, policy, seed="2/5")
    # What stands around the thoughts, and all other columns, byte for byte.
    assert (found.before, found.after.before, found.after.after) == (
        before, before.before, before.after,
    )  # fmt: skip
    assert (
        after.question == question
        and found.after.after.endswith(CLOSE + answer)
        or (form == "thoughts" and found.row["answer"] == answer)
    )
    assert {k: v for k, v in found.row.items() if k != found.after.column} == {
        k: v for k, v in row.items() if k != found.after.column
    }
    # The thoughts that are kept, in order.
    wanted = [before.thoughts[i] for i in kept]
    if form != "thoughts":
        wanted[-1] = wanted[-1].rstrip()
    assert list(found.after.thoughts) == wanted
    assert found.after.text.count(OPEN) == found.after.text.count(CLOSE) == 1
    assert after.text == found.after.text
    if tau == 1:
        assert found.row is row and before.text == found.after.text
    if form == "messages":
        assert found.row["messages"][:-1] == row["messages"][:-1]


def test_a_trace_as_epic_writes_it():
    trace = "\n\n".join(f"Thought {i}." for i in range(6))
    row = {"question": "?", "answer": f"{OPEN}\n{trace}\n{CLOSE}\n\nSo 4."}
    kept = "Thought 0.\n\nThought 1.\n\nThought 5."
    assert condense(row, 0.5).row["answer"] == f"{OPEN}\n{kept}\n{CLOSE}\n\nSo 4."
    kept = "Thought 0.\n\nThought 1.\n\nThought 2."
    assert condense(row, 0.5, "head").row["answer"] == f"{OPEN}\n{kept}\n{CLOSE}\n\nSo 4."
    listed = {"question": "?", "thoughts": ["One.", "Two."], "answer": "So 4."}
    assert find_trace(listed).text == f"{OPEN}\nOne.\n\nTwo.\n{CLOSE}\n\nSo 4."


def tagged(text):
    return {"question": "?", "answer": text}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (tagged("4"), "no <think> in 'answer' and no list 'thoughts'"),
        (tagged(f"{OPEN}a"), "1 <think> and 0 </think> in 'answer'; write"),
        (tagged(f"a{CLOSE}4"), "0 <think> and 1 </think>"),
        (tagged(f"{CLOSE}a{OPEN}4"), "in the wrong order"),
        (tagged(f"{OPEN}a{CLOSE}{OPEN}b{CLOSE}4"), "2 <think> and 2 </think>"),
        (tagged(f"{OPEN}It is 4.{CLOSE}\n "), "the answer is inside the trace only"),
        (tagged(f"{OPEN} \n\n {CLOSE}4"), "no thought between <think> and </think>"),
        ({"question": "?"}, "no 'answer', a text"),
        ({"question": "?", "thoughts": ["a"]}, "no 'answer', a text"),
        ({"answer": f"{OPEN}a{CLOSE}4"}, "no 'question', a text"),
        ({"question": "?", "thoughts": [], "answer": "4"}, "an empty one"),
        ({"question": "?", "thoughts": "a", "answer": "4"}, "no list of texts"),
        ({"question": "?", "thoughts": ["a", " "], "answer": "4"}, "thought 2 of 'thoughts' is"),
        ({"question": "?", "thoughts": ["a", 1], "answer": "4"}, "thought 2 of 'thoughts' is"),
        ({"question": "?", "thoughts": [f"a{CLOSE}"], "answer": "4"}, "holds a think tag"),
        ({"question": "?", "thoughts": ["a"], "answer": f"{OPEN}4"}, "leave one of them out"),
        ({"question": "?", "thoughts": ["a"], "answer": " "}, "'answer' is empty"),
        ({"messages": []}, "no list of turns"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "no <think> in 'messages'"),
    ],
)
def test_rows_that_cannot_be_condensed(row, said):
    with pytest.raises(UserError) as caught:
        condense(row)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 1.5}, "tau is 1.5; it must be from 0 to 1"),
        ({"tau": -0.1}, "tau is -0.1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"head_share": 2}, "head_share is 2"),
        ({"policy": "edges"}, "policy 'edges' is unknown; use one of edge, head"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(UserError, match=said):
        select(4, **{"tau": 0.5, **options})
    with pytest.raises(UserError, match="mode 'word' is unknown"):
        split_thoughts("a", "word")


def test_no_jax_is_needed():
    code = "import sys, jaxlib_unlearn.cot; assert not {'jax', 'numpy', 'optax'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
