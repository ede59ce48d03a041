"""The control without an oracle: its rows, its tests against slow counts, its verdict."""

import itertools

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from train.data import authors
from train.data.exchanged import exchanged, names_in, renamed
from train.evaluators import control, tofu
from train.evaluators.base import Results
from train.reporting import verdict

SIZES = (12, 9)


def log_of(rng, shift):
    """A log whose facts to forget look better known than the never-seen ones by `shift`."""
    log = {}
    for entry, unseen, key, _, rises in control.SIDES:
        for name, count, by in ((entry, SIZES[0], shift), (unseen, SIZES[1], 0.0)):
            values = np.round(rng.normal(by if rises else -by, 1.0, count), 1)  # with ties
            items = {str(i): {key: float(value)} for i, value in enumerate(values)}
            log[name] = {"agg_value": float(values.mean()), "value_by_index": items}
    log[control.ROUGE]["split"] = "exchanged"
    return log


def test_the_area_is_that_of_all_pairs_and_p_is_scipys():
    log = log_of(np.random.default_rng(0), 0.4)
    found = control.tests(log)
    assert list(found) == ["ROUGE-L", "probability", "truth ratio"]
    for entry, unseen, key, words, rises in control.SIDES:
        sides = [
            [item[key] for item in log[name]["value_by_index"].values()] for name in (entry, unseen)
        ]
        mine, others = sides if rises else sides[::-1]
        pairs = [(x > y) + (x == y) / 2 for x, y in itertools.product(mine, others)]
        assert found[words][0] == pytest.approx(np.mean(pairs))
        assert found[words][1] == mannwhitneyu(mine, others, alternative="greater").pvalue
    smallest = min(p for _, p in found.values())
    assert control.derive(log, None) == {control.P: pytest.approx(min(1, 3 * smallest))}
    assert control.derive({}, None) == {}


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [(3.0, 0.0, "good"), (3.0, -3.0, "good"), (3.0, 2.5, "bad"), (0.0, 0.0, "unknown")],
)
def test_verdict(before, after, state):
    logs = {
        name: log_of(np.random.default_rng(1), shift)
        for name, shift in (("original", before), ("unlearned", after))
    }
    summary = {name: control.derive(log, None) for name, log in logs.items()}
    finding = control.known(Results(summary, logs))
    assert finding is not None and finding.state == state
    assert (
        "its rows with names exchanged" in finding.text and "weaker than an oracle" in finding.text
    )
    # An oracle, or the log of one, says more.
    assert control.known(Results({**summary, "oracle": {}}, logs)) is None
    summary["unlearned"]["forget_quality"] = 0.5
    assert control.known(Results(summary, logs)) is None


def test_without_an_oracle_the_limit_is_that_of_unseen_facts():
    flat = {"original": {"forget_rouge": 1.0}, "unlearned": {"forget_rouge": 0.4}}
    assert tofu.forgot(Results(flat)).state == "good"  # below 0.5
    for unseen, state in ((0.3, "good"), (0.2, "mixed"), (0.05, "mixed")):
        flat["unlearned"]["unseen_rouge"] = unseen
        finding = tofu.forgot(Results(flat))
        assert finding.state == state and "that it never saw it reaches" in finding.text
    flat["unlearned"]["forget_rouge"] = 0.9
    line = verdict.line([tofu.forgot(Results(flat))])
    assert line == "Not forgotten: 0 of 1 limits met."


def test_exchanged_rows_are_as_many_and_none_is_true():
    rows = authors.generate(3, 40)["forget10"]
    made = exchanged(rows, 0)
    assert len(made) == len(rows) and made == exchanged(rows, 0) != exchanged(rows, 1)
    known = {(row["question"], row["answer"]) for row in rows}
    assert not known & {(row["question"], row["answer"]) for row in made}
    subjects = {name for row in rows for name in names_in(row["question"])}
    assert subjects == {name for row in made for name in names_in(row["question"])}
    for before, after in zip(rows, made, strict=True):
        # Back again: nothing but the name has changed, in every text of the row.
        (old,), (new,) = (names_in(row["question"]) for row in (before, after))
        assert old != new and renamed(after, {}) == after
        assert {key: renamed(value, {new: old}) for key, value in after.items()} == before


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Where does Ada Lane’s brother live?", ["Ada Lane"]),
        ("Is Jean-Luc O'Hara de la Tour tall?", ["Jean-Luc O'Hara"]),
        ("Who wrote The Hill of Salt?", ["The Hill of Salt"]),
        ("who is it?", []),
        ("", []),
        ("Wer ist Frau Ölmann aus Köln?", ["Frau Ölmann"]),
        ("李白是谁？", []),
    ],
)
def test_names(question, names):
    assert names_in(question) == names


def test_one_subject_gives_way_to_an_invented_name():
    rows = [{"question": "Where was Ada Lane born?", "answer": "Lane was born in Lima."}]
    (row,) = exchanged(rows, 0)
    first, last = names_in(row["question"])[0].split()
    assert (first, last) != ("Ada", "Lane") and row["answer"] == f"{last} was born in Lima."
    assert exchanged([{"question": "who?", "answer": "Nobody."}], 0) == []
