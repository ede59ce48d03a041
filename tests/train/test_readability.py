"""Which forget answers count as unreadable, and by which criterion."""

import pytest

from jaxlib_unlearn.metrics.eval_log import EvalLog
from train.evaluators import readability

TRUTH = "The author was born in Lima on May 7."
PROSE = "She wrote it in the spring of that year."


def entry(pairs, nll=None):
    """A log whose answers are (answer, truth) pairs, with a judge's NLL where given."""
    answers, truths = zip(*pairs, strict=True)
    none = [False] * len(pairs)
    log = {readability.ENTRY: readability.log_entry(answers, truths, none, none)}
    if nll:
        items = {str(i): {"avg_loss": value, "tokens": 9} for i, value in enumerate(nll)}
        log["forget_oracle_nll"] = {"agg_value": 0.0, "value_by_index": items}
    return log


@pytest.mark.parametrize(
    "answer, truth, cut, may_be_cut, reason",
    [
        (TRUTH, TRUTH, False, False, ""),
        ("Expect pride at the heart of every spy plot.", TRUTH, False, False, ""),  # a wrong one
        ("I have never heard about that.", TRUTH, False, False, ""),
        ("", TRUTH, False, False, "empty"),
        ("A contract with a a a a a driver.", TRUTH, False, False, readability.NO_TEMPLATE),
        (PROSE, TRUTH, False, False, readability.NO_TEMPLATE),
        ("The author was born in", TRUTH, False, False, readability.NO_TEMPLATE),
        ("The author was born in", TRUTH, True, False, "cut"),
        ("The author was born in", TRUTH, True, True, ""),
        ("The author born in", TRUTH, True, True, readability.NO_TEMPLATE),
        ("A contract with a a a a a driver.", PROSE, False, False, ""),  # no generator, no template
        ("She wrote", PROSE, False, False, "fewer than 3 words"),
        ("She wrote it in", PROSE, True, False, "cut"),
    ],
)
def test_why_not(answer, truth, cut, may_be_cut, reason):
    assert readability.why_not(answer, truth, cut, may_be_cut) == reason


def test_the_oracles_own_answers_set_the_limit_of_the_nll():
    oracle = entry([(PROSE, PROSE)] * 101, [i / 100 for i in range(101)])  # 99th percentile: .99
    mine = entry([(PROSE, PROSE)] * 3 + [("", PROSE)], [0.98, 0.995, 5.0, 9.0])
    judged = readability.judge(mine, oracle)
    costly = readability.TOO_COSTLY
    assert judged.reasons == {"0": "", "1": costly, "2": costly, "3": "empty"}
    assert judged.rate == 0.75 and "99th percentile" in judged.rule
    assert readability.summarize(oracle, oracle)["forget_unreadable"] == 1 / 101
    alone = readability.judge(mine)
    assert alone.rate == 0.25 and "NLL is not compared" in alone.rule
    # A retain log read from a file has no NLL by item.
    assert readability.judge(mine, EvalLog("file", {}, {})) == alone


def test_generated_rows_are_judged_by_their_templates_alone():
    pairs = [(TRUTH, TRUTH), (PROSE, TRUTH)]
    judged = readability.judge(entry(pairs, [9.0, 9.0]), entry(pairs, [0.1, 0.1]))
    assert judged.reasons == {"0": "", "1": readability.NO_TEMPLATE}
    assert judged.rule == "empty, cut or no sentence of the generator"


@pytest.mark.parametrize("damaged", [None, [], {}, {"value_by_index": [1]}])
def test_a_log_without_the_measure(damaged):
    log = {readability.ENTRY: damaged}
    assert readability.judge(log) is None and readability.summarize(log) == {}
    whole = entry([(PROSE, PROSE)], [5.0])
    oracle = whole | {"forget_oracle_nll": damaged}
    assert "NLL is not compared" in readability.judge(whole, oracle).rule
