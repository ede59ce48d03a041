"""A control without an oracle: facts to forget against facts never seen, under the same model.

The never-seen rows are those that nobody trained on (split `holdout`); where a benchmark has none,
they are the rows to forget with their names exchanged (split `exchanged`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.evaluators.base import (
    REFERENCE,
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Log,
    Metric,
    Results,
    Rows,
    Verdict,
    items_of,
)
from train.evaluators.numbers import format_number as show
from train.evaluators.numbers import number
from train.evaluators.tofu import split_log

SPLITS = {"holdout": "rows that nobody trained on", "exchanged": "its rows with names exchanged"}
ALPHA = 0.05
P, ROUGE = "unseen_p", "unseen_rouge"
# Entries of a log: of the rows to forget, of the never-seen rows; the score of an item, its name in
# a sentence, and whether it is higher where a fact is known.
SIDES = (
    ("forget_Q_A_ROUGE", ROUGE, "rougeL_recall", "ROUGE-L", True),
    ("forget_Q_A_Prob", "unseen_probability", "prob", "probability", True),
    ("forget_truth_ratio", "unseen_truth_ratio", "score", "truth ratio", False),
)
METRICS = (
    Metric(ROUGE, "Never-seen ROUGE-L",
           "recall of the true answers in the greedy answers, rows that nobody trained on",
           "near", REFERENCE),
    Metric("unseen_probability", "Never-seen probability",
           "per-token probability of the true answers, rows that nobody trained on",
           "near", REFERENCE),
    Metric("unseen_truth_ratio", "Never-seen truth ratio",
           "1 when a right and a wrong answer are equally likely, rows that nobody trained on",
           "near", REFERENCE),
    Metric(P, "Never-seen control (p)",
           "p of tests that it knows the facts to forget no better than rows nobody trained on",
           "up"),
)  # fmt: skip


def split_in(rows: Rows) -> str | None:
    """The name of the split of never-seen rows; None where there is none."""
    return next((name for name in SPLITS if rows.get(name)), None)


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """Probability, ROUGE-L and truth ratio of the never-seen rows, as of the rows to forget."""
    split = split_in(rows)
    if split is None or "forget" not in rows:
        return {}
    alike = split_log(split, rows[split], context, "forget")
    return {mine: alike[entry] | {"split": split} for entry, mine, *_ in SIDES if entry in alike}


def _values(log: Log, entry: str, key: str) -> list[float]:
    found = (number(item.get(key)) for item in items_of(log, entry).values())
    return [value for value in found if value is not None]


def tests(log: Log) -> dict[str, tuple[float, float]]:
    """By measure: how often a fact to forget looks better known than one never seen, and p.

    AUC = P(x > y) + P(x = y) / 2, with p of a one-sided Mann-Whitney test.

    Args:
        log: the per-item log of a model.
    """
    from scipy.stats import mannwhitneyu

    found = {}
    for entry, control, key, words, rises in SIDES:
        mine, unseen = _values(log, entry, key), _values(log, control, key)
        if mine and unseen:
            if not rises:
                mine, unseen = unseen, mine
            statistic, p = mannwhitneyu(mine, unseen, alternative="greater")
            found[words] = (float(statistic) / (len(mine) * len(unseen)), float(p))
    return found


def derive(log: Log, reference: Any) -> dict[str, Any]:
    """The smallest p times the number of tests (Bonferroni), at most 1."""
    found = tests(log)
    return {P: min(1.0, len(found) * min(p for _, p in found.values()))} if found else {}


def known(results: Results) -> Finding | None:
    """The verdict of the control; it is left out where an oracle or its log says more."""
    roles, s = results.roles, results.scores(P)
    log = results.logs.get(roles.judged, {})
    compared = results.scores("forget_quality").judged is not None  # with a retain log
    if s.judged is None or compared or roles.held_to(roles.judged) in results.summary:
        return None
    question = "Does it know them better than facts that it never saw?"
    entry: Mapping[str, Any] = log.get(ROUGE) or {}
    which = SPLITS.get(str(entry.get("split")), SPLITS["holdout"])
    told = [f"{words} {show(auc)} (p = {show(p)})" for words, (auc, p) in tests(log).items()]
    text = f"There is no oracle. Under this model the facts to forget are compared with {which}"
    text += f": AUC of {', '.join(told)}; 0.500 means alike" if told else ""
    text += f". Above p = {ALPHA} in all tests together ({show(s.judged)}) it passes."
    text += f" The original has p = {show(s.start)}." if s.start is not None else ""
    text += (
        " This is weaker than an oracle: such rows may be harder or easier to guess than the facts "
        "were, and what a model without the facts would answer is not known."
    )
    if s.start is not None and s.start > ALPHA:
        text += " The tests do not even see that the original knows the facts."
        return Finding(question, "unknown", "the control has no power", text)
    if s.judged > ALPHA:
        return Finding(question, "good", "no better known than unseen facts", text)
    return Finding(question, "bad", "better known than unseen facts", text)


ROW = Evaluator(
    "control",
    run,
    METRICS,
    derive=derive,
    verdicts=(Verdict("control", known, after="kept"),),
    definitions=(
        Definition(
            "control",
            "Never-seen control: ROUGE-L, probability and truth ratio of the facts to forget "
            "against those of rows that nobody trained on, under the same model; p of one-sided "
            "Mann-Whitney tests, the smallest times their number.",
            after="membership",
        ),
    ),
)
