"""TOFU's evaluation: probability, ROUGE-L and truth ratio of each split, forget quality.

All given answers to a question are scored in one pass, and one is generated greedily. The log uses
the names of OpenUnlearning's EVAL.json, so that each program reads the other's logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluators import utility
from train.evaluators.base import (
    REFERENCE,
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Log,
    Metric,
    Pair,
    Picture,
    Results,
    Rows,
    Samples,
    Verdict,
    generations,
)
from train.evaluators.kept import kept as kept_by
from train.evaluators.numbers import format_number as show
from train.evaluators.numbers import number

SPLITS = ("forget", "retain", "real_authors", "world_facts")
LOG10_P = "forget_quality_log10"
FORGET_RATIO = 1.5
UNSEEN = "unseen_rouge"  # of the evaluator `control`
ALPHA = 0.05
KEPT_BY = (
    ("retain_rouge", "ROUGE-L"),
    ("retain_probability", "probability"),
    ("retain_fact_recall", "fact recall"),
)

METRICS = (
    Metric("forget_rouge", "Forget ROUGE-L",
           "recall of the true answers in the greedy answers, facts to forget",
           "near", REFERENCE, main=True, compare=1),
    Metric("forget_probability", "Forget probability",
           "per-token probability of the true answers, facts to forget",
           "near", REFERENCE, main=True),
    Metric("forget_truth_ratio", "Forget truth ratio",
           "1 when a right and a wrong answer are equally likely; 0 when one clearly wins",
           "near", REFERENCE, main=True),
    Metric("forget_quality", "Forget quality (p)",
           "p of a KS test that its truth ratios and the oracle's are one distribution",
           "up", main=True),
    Metric(LOG10_P, "Forget quality (log10 p)",
           "the same p in decades; seeds are averaged here",
           "up", main=True, log10_of="forget_quality", compare=3),
    Metric("forget_ks", "KS distance",
           "largest gap between its truth-ratio distribution and the oracle's", "down"),
    Metric("forget_paraphrased_probability", "Paraphrase probability",
           "per-token probability of the reworded true answers, facts to forget",
           "near", REFERENCE),
    Metric("forget_perturbed_probability", "Perturbed probability",
           "per-token probability of the reworded wrong answers, facts to forget",
           "near", REFERENCE),
    Metric("retain_rouge", "Retain ROUGE-L",
           "recall of the true answers in the greedy answers, facts to keep",
           "up", main=True, compare=4),
    Metric("retain_probability", "Retain probability",
           "per-token probability of the true answers, facts to keep", "up", main=True),
    Metric("retain_truth_ratio", "Retain truth ratio",
           "how clearly the right answer beats the wrong ones, facts to keep", "up"),
    Metric("real_authors_rouge", "Real authors ROUGE-L",
           "recall of the true answers, questions on real authors", "up"),
    Metric("real_authors_probability", "Real authors probability",
           "share of the right answer among the offered ones, real authors", "up"),
    Metric("real_authors_truth_ratio", "Real authors truth ratio",
           "how clearly the right answer beats the wrong ones, real authors", "up"),
    Metric("world_facts_rouge", "World facts ROUGE-L",
           "recall of the true answers, general knowledge", "up"),
    Metric("world_facts_probability", "World facts probability",
           "share of the right answer among the offered ones, general knowledge", "up"),
    Metric("world_facts_truth_ratio", "World facts truth ratio",
           "how clearly the right answer beats the wrong ones, general knowledge", "up"),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The entries of TOFU's splits."""
    splits = [name for name in rows if name in SPLITS]
    return {k: v for name in splits for k, v in split_log(name, rows[name], context, name).items()}


def split_log(
    split: str, rows: Sequence[Mapping[str, Any]], context: EvaluationContext, named: str
) -> dict[str, Any]:
    """The entries of a split under the names that those of split `named` have."""
    from jaxlib_unlearn.metrics import tofu

    scores, answers = context.scores(split), context.answers(split)
    return tofu.split_log(
        named,
        tofu.SplitScores(
            scores["answers"],
            scores.get("paraphrased"),
            scores.get("perturbed"),
            [texts[0] for texts in answers.texts],
            [row["answer"] for row in rows],
            answers.prompts,
        ),
    )


def summarize(log: Log, reference: Any) -> dict[str, Any]:
    """All metrics of the EVAL.json format, including memorisation, membership and utility."""
    from jaxlib_unlearn.metrics import eval_log, tofu

    if not eval_log.has_metrics(log):
        return {}
    if isinstance(reference, Mapping) and not eval_log.has_metrics(reference):
        reference = None
    return dict(tofu.summarize(log, reference))


def truth_ratios(log: dict[str, Any]) -> list[float]:
    """The truth ratios R of the forget questions; empty when they were not measured.

    Raises:
        UserError: the log is not an evaluation log.
    """
    from jaxlib_unlearn.metrics.eval_log import has_metrics, parse_log

    items = parse_log(log, "evals").items if log and has_metrics(log) else {}
    return [float(value) for value in items.get("forget_truth_ratio", ())]


def forgot(results: Results) -> Finding:
    """Forget ROUGE-L, compared with the reference's."""
    question, s = "Did it forget?", results.scores("forget_rouge")
    if s.judged is None:
        return Finding(question, "unknown", "not measured", "No forget ROUGE-L in this run.")
    before = f" (before: {show(s.start)})" if s.start is not None else ""
    text = f"ROUGE-L of its answers on the facts to forget is {show(s.judged)}{before}"
    base, whose = s.reference, "the oracle, which never saw them, reaches"
    if base is None:
        base, whose = results.scores(UNSEEN).judged, "on facts that it never saw it reaches"
    if base is None:
        good = s.judged <= 0.5
        text += f"; there is no oracle here, so the limit is {show(0.5)}."
        half = s.start is not None and s.judged <= 0.75 * s.start
    else:
        limit = FORGET_RATIO * base
        good = s.judged <= limit
        text += f"; {whose} {show(base)}. The limit is {FORGET_RATIO} times that, {show(limit)}."
        half = s.start is not None and s.judged <= (s.start + base) / 2
    if s.start is not None and s.start < 0.5:
        text += " The original did not know the facts well to begin with, so this says little."
        if good or half:
            return Finding(question, "mixed", "hardly known before", text)
    if good:
        return Finding(question, "good", "forgotten", text)
    level = ("mixed", "partly forgotten") if half else ("bad", "not forgotten")
    return Finding(question, *level, text)


def kept(results: Results) -> Finding:
    """ROUGE-L, probability and fact recall of the facts to keep, and model utility."""
    metrics = (*KEPT_BY, (utility.name_in(results.judged), "model utility"))
    return kept_by(results, metrics, "the facts to keep")


def told_apart(results: Results) -> Finding:
    """Forget quality, where its test has any power."""
    question, s = "Can a test tell it from the oracle?", results.scores("forget_quality")
    if s.judged is None:
        text = "Forget quality needs an oracle or a retain log, and paraphrased and wrong answers."
        return Finding(question, "unknown", "not measured", text)
    questions = len(truth_ratios(results.logs.get(results.roles.judged, {})))
    text = (
        "A KS test compares its truth ratios with the oracle's"
        + (f" on {questions} questions" if questions else "")
        + f": p = {show(s.judged)}. Above {ALPHA} the test cannot tell the two models apart."
    )
    if s.start is not None:
        text += f" For the original p = {show(s.start)}."
        if s.start > ALPHA:
            text += " It cannot even tell the original from the oracle: it has no power here."
            return Finding(question, "unknown", "the test has no power", text)
    if s.judged > ALPHA:
        return Finding(question, "good", "not told apart from the oracle", text)
    if s.start is not None and s.judged > s.start and s.judged >= 10 * s.start:
        return Finding(question, "mixed", "told apart from the oracle, but closer to it", text)
    return Finding(question, "bad", "told apart from the oracle", text)


def draw(results: Results) -> Any:
    """Cumulative distributions of the truth ratio."""
    import numpy as np

    from train.evaluators import plots

    found = {m: truth_ratios(log) for m, log in results.logs.items()}
    values = {m: np.asarray(ratios) for m, ratios in found.items() if ratios}
    distance, p = (number(results.judged.get(name)) for name in ("forget_ks", "forget_quality"))
    return plots.truth_ratio(plots.Ratios(values, distance, p), results.roles)


PICTURE = Picture(
    "truth_ratio.png",
    "Truth ratios of the facts to forget",
    draw,
    lambda results: (
        "Cumulative distributions of the truth ratio on the forget questions. KS "
        f"distance to the oracle: {results.across('forget_ks')}."
    ),
    "Truth ratios on the forget questions. Where there is an oracle, the test behind forget "
    "quality asks whether its line and the unlearned one could be one; the black bar is their KS "
    "distance.",
    "No truth ratios in evals/.",
    after="leak.png",
)
PAIRS = (
    Pair(
        "forget_rouge",
        "retain_rouge",
        "Forget against retain",
        "Runs to the left forget more, runs further up keep more. The oracle shows how far to the "
        "left is far enough: further left is no better.",
    ),
    Pair(
        LOG10_P,
        "model_utility",
        "Forget quality against model utility",
        "To the right the KS test tells a model less well from the oracle; above log10 0.05 = -1.3 "
        "it does not tell them apart. Further up more of the rest is kept.",
    ),
)
DEFINITIONS = (
    Definition(
        "probability",
        "Probability: exp of the mean log-probability of an answer's tokens, end token "
        "included; mean over questions. On real authors and world facts it is divided by the "
        "sum over the right and the wrong answers.",
    ),
    Definition(
        "rouge",
        "ROUGE-L: length of the longest common word sequence of the greedy answer and the true "
        "one over the length of the true one (recall, stemmed).",
    ),
    Definition(
        "truth ratio",
        "Truth ratio of a question: R = exp(−mean loss of the wrong answers) / exp(−loss of the "
        "reworded true answer), losses per token. On the forget set the mean of min(R, 1/R) is "
        "reported, elsewhere the mean of max(0, 1 − R).",
    ),
    Definition(
        "forget quality",
        "Forget quality: p of the two-sided, two-sample Kolmogorov-Smirnov test between the "
        "values R of a model and of the oracle; KS distance: its statistic. Decades are log10 "
        "p.",
    ),
)
SAMPLES = tuple(
    Samples(f"Facts to {verb}", "questions", n, generations(entry, "rougeL_recall"), forget=n == 5)
    for verb, n, entry in (("forget", 5, "forget_Q_A_ROUGE"), ("keep", 3, "retain_Q_A_ROUGE"))
)
ROW = Evaluator(
    "tofu",
    run,
    METRICS,
    summarize,
    verdicts=(
        Verdict("forgot", forgot),
        Verdict("kept", kept),
        Verdict("told apart", told_apart),
    ),
    pictures=(PICTURE,),
    pairs=PAIRS,
    samples=SAMPLES,
    definitions=DEFINITIONS,
)
