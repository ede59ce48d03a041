"""TOFU: forget quality, model utility, and the evaluation log that they are computed from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import likelihood, privacy, text
from jaxlib_unlearn.metrics.eval_log import (
    PREFIXES,
    WITH_OPTIONS,
    Log,
    as_log,
    parse_log,
    truth_ratio_name,
)
from jaxlib_unlearn.metrics.eval_log import EvalLog as EvalLog
from jaxlib_unlearn.metrics.eval_log import load_log as load_log
from jaxlib_unlearn.metrics.likelihood import Scored

UTILITY = tuple(
    f"{split}_{quantity}"
    for split in ("retain", *WITH_OPTIONS)
    for quantity in ("probability", "rouge", "truth_ratio")
)


class SplitScores(NamedTuple):
    """Measurements on one split: lists in item order, None where nothing was measured.

    answers: the right answers. paraphrased: their paraphrases (forget and retain only).
    perturbed: the wrong answers, a list for each item. generations: greedy answers, with the
    references they are compared to and the prompts they continue.
    """

    answers: Sequence[Scored]
    paraphrased: Sequence[Scored] | None = None
    perturbed: Sequence[Sequence[Scored]] | None = None
    generations: Sequence[str] | None = None
    references: Sequence[str] | None = None
    prompts: Sequence[str] | None = None


def forget_quality(log: Log, retain_log: Log) -> privacy.KSTest:
    """Whether the model treats the forget set like a model that never saw it.

        p-value of the two-sample KS test between {R_i} of the two models

    Args:
        log: the log of the evaluated model.
        retain_log: the log of the model trained without the forget set, on the same items.

    Returns:
        `KSTest(statistic, p_value)`; p = 1: the two models cannot be distinguished, p near 0: they
        can.

    Raises:
        UserError: a log has no truth ratios of the forget set, or their numbers of items differ.

    Example:
        >>> log = EvalLog("mine", {"forget_truth_ratio": np.array([0.2, 0.4])}, {})
        >>> forget_quality(log, log).p_value
        1.0

    TOFU, arXiv 2401.06121, forget quality.
    """
    logs = as_log(log), as_log(retain_log)
    for one in logs:
        if "forget_truth_ratio" not in one.items:
            raise UserError(
                f"{one.source}: no truth ratios of the forget set; evaluate paraphrased and "
                "perturbed answers of it"
            )
    mine, retain = (one.items["forget_truth_ratio"] for one in logs)
    if len(mine) != len(retain):
        raise UserError(
            f"{logs[1].source}: {len(retain)} forget items against {len(mine)} of "
            f"{logs[0].source}; compare evaluations of the same items"
        )
    return privacy.ks_test(mine, retain)


def utility_components(log: Log) -> dict[str, float]:
    """The components of model utility that the log contains.

    Probability (normalised on authors and facts), ROUGE-L recall and truth ratio (mean of
    max(0, 1 - R)) on retain, real authors and world facts.

    Args:
        log: the log of the evaluated model.

    Returns:
        {flat metric name: value}, at most nine.

    Raises:
        UserError: a dict is given that is not an evaluation log.

    Example:
        >>> utility_components(EvalLog("mine", {"retain_rouge": np.array([0.5, 1.0])}, {}))
        {'retain_rouge': 0.75}

    TOFU, arXiv 2401.06121, model utility.
    """
    items = as_log(log).items
    return {name: _aggregate(name, items[name]) for name in UTILITY if name in items}


def utility_name(count: int) -> str:
    """The name of the harmonic mean of `count` components.

    Only the mean of all nine is TOFU's model utility; a mean of fewer is another quantity and has
    another name, so that it is never compared with a published one.

    Args:
        count: number of `utility_components`.

    Returns:
        `model_utility`, or `model_utility_of_N` for N < 9.

    Example:
        >>> utility_name(9), utility_name(3)
        ('model_utility', 'model_utility_of_3')

    TOFU, arXiv 2401.06121, model utility.
    """
    return "model_utility" if count == len(UTILITY) else f"model_utility_of_{count}"


def model_utility(log: Log) -> float:
    """Harmonic mean of the utility components that the log has; all nine in TOFU.

        MU = m / sum_i 1/u_i,   0 if any u_i is 0

    Args:
        log: the log of the evaluated model; `utility_components` lists its components.

    Returns:
        MU in [0, 1].

    Raises:
        UserError: the log has no component at all.

    Example:
        >>> items = {"retain_probability": np.array([0.5]), "retain_rouge": np.array([1.0])}
        >>> round(model_utility(EvalLog("mine", items, {})), 4)
        0.6667

    TOFU, arXiv 2401.06121, model utility.
    """
    log = as_log(log)
    values = list(utility_components(log).values())
    if not values:
        raise UserError(f"{log.source}: no utility metrics; evaluate retain, authors or facts")
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def summarize(log: Log, retain_log: Log | None = None) -> dict[str, float]:
    """All aggregates of a log under flat names.

    Args:
        log: the log of the evaluated model.
        retain_log: the log of the model trained without the forget set. Without it there is no
            `forget_quality` and `forget_ks`, and `privleak` compares with an AUC of 0.5.

    Returns:
        {flat metric name: value}, without metrics not measured. `model_utility` is present for
        all nine components, `model_utility_of_N` for fewer (`utility_name`).

    Raises:
        UserError: see `forget_quality`.

    Example:
        >>> summarize(EvalLog("mine", {"forget_rouge": np.array([0.5, 1.0])}, {"loss": 0.5}))
        {'forget_rouge': 0.75, 'mia_loss_auc': 0.5}

    TOFU, arXiv 2401.06121; OpenUnlearning, arXiv 2506.12618; MUSE, arXiv 2407.06460.
    """
    log = as_log(log)
    retain = None if retain_log is None else as_log(retain_log)
    summary = {name: _aggregate(name, values) for name, values in log.items.items()}
    summary |= log.stated
    if parts := utility_components(log):
        summary[utility_name(len(parts))] = model_utility(log)
    summary |= {f"mia_{attack}_auc": value for attack, value in log.auc.items()}
    if "min_k" in log.auc:
        reference = retain.auc.get("min_k", 0.5) if retain else 0.5
        summary["privleak"] = privacy.privleak(log.auc["min_k"], reference)
    if retain and "forget_truth_ratio" in log.items:
        test = forget_quality(log, retain)
        summary |= {"forget_quality": test.p_value, "forget_ks": test.statistic}
    return summary


def _aggregate(name: str, values: np.ndarray) -> float:
    if name == "forget_truth_ratio":
        return likelihood.closer_to_one(values)
    return likelihood.true_better(values) if "truth_ratio" in name else float(np.mean(values))


def with_reference(log: Mapping[str, Any], retain_log: Log | None) -> dict[str, Any]:
    """A log whose `privleak` compares with a retrained model, as in `summarize`.

    Args:
        log: a log as `build_log` returns it.
        retain_log: the log of the model trained without the forget set; None: an AUC of 0.5.

    Returns:
        The log; only `privleak` differs.

    Raises:
        UserError: `retain_log` is not an evaluation log.

    Example:
        >>> log = {"mia_min_k": {"auc": 0.75, "agg_value": 0.75}, "privleak": {"agg_value": -50.0}}
        >>> with_reference(log, EvalLog("retain", {}, {"min_k": 0.75}))["privleak"]
        {'agg_value': 0.0}

    MUSE, arXiv 2407.06460, criterion C3.
    """
    if "mia_min_k" not in log:
        return dict(log)
    mine = as_log(log).auc["min_k"]
    reference = 0.5 if retain_log is None else as_log(retain_log).auc.get("min_k", 0.5)
    return {**log, "privleak": {"agg_value": privacy.privleak(mine, reference)}}


def build_log(splits: Mapping[str, SplitScores]) -> dict[str, Any]:
    """The per-item log of a model, in the form and with the names of OpenUnlearning's EVAL.json.

    Args:
        splits: `forget`, `retain`, `real_authors`, `world_facts`, `holdout`, any of them.
            `holdout` needs answers alone: they are the non-members of the attacks.

    Returns:
        {metric: {"agg_value": ..., "value_by_index": {"0": {...}}}}, ready for `json.dump`.
        Metrics not measured are absent, as are items without label tokens, which have no value.
        `privleak` compares with an AUC of 0.5; see `with_reference`.

    Raises:
        UserError: a split is empty, or a log-probability of an item is not finite.
        ValueError: an unknown split, or lists of different lengths.

    Example:
        >>> one = np.ones(2)
        >>> item = Scored(-one, one > 0, -one, one, "an answer")
        >>> build_log({"forget": SplitScores([item])})["extraction_strength"]
        {'agg_value': 1.0, 'value_by_index': {'0': {'score': 1.0}}}

    OpenUnlearning, arXiv 2506.12618.
    """
    if unknown := set(splits) - {*PREFIXES, "holdout"}:
        raise ValueError(f"unknown split {sorted(unknown)}; known: {[*PREFIXES, 'holdout']}")
    log: dict[str, Any] = {}
    for split, scores in splits.items():
        _check(split, scores)
        if split != "holdout":
            log |= _split_metrics(split, scores)
    if "forget" in splits:
        log |= memorization_log(splits["forget"].answers)
        if "holdout" in splits:
            log |= membership_log(splits["forget"].answers, splits["holdout"].answers)
    return log | utility_log(log)


def split_log(split: str, scores: SplitScores) -> dict[str, Any]:
    """The part of `build_log` for one split: probability, ROUGE and truth ratio.

    Args:
        split: `forget`, `retain`, `real_authors` or `world_facts`.
        scores: the measurements on it.

    Returns:
        {metric: {"agg_value": ..., "value_by_index": {"0": {...}}}}.

    Raises:
        UserError: the split is empty, or a log-probability of an item is not finite.
        ValueError: lists of different lengths.

    Example:
        >>> one = np.zeros(2)
        >>> scores = SplitScores([Scored(one, one == 0, one, one, "an answer")])
        >>> split_log("retain", scores)["retain_Q_A_Prob"]["agg_value"]
        1.0

    TOFU, arXiv 2401.06121; OpenUnlearning, arXiv 2506.12618.
    """
    _check(split, scores)
    return _split_metrics(split, scores)


def memorization_log(answers: Sequence[Scored]) -> dict[str, Any]:
    """The part of `build_log` on memorisation of the right answers.

    Args:
        answers: the right answers of the forget set.

    Returns:
        `extraction_strength` and `exact_memorization`; items without label tokens are left out.

    Example:
        >>> one = np.ones(2)
        >>> log = memorization_log([Scored(-one, one > 0, -one, one, "an answer")])
        >>> log["exact_memorization"]["agg_value"]
        1.0

    OpenUnlearning, arXiv 2506.12618.
    """
    strength = [{"score": likelihood.extraction_strength(item)} for item in answers]
    exact = [{"score": _or_none(likelihood.exact_memorization(item))} for item in answers]
    log = _metric("extraction_strength", strength, "score")
    return log | _metric("exact_memorization", exact, "score")


def membership_log(members: Sequence[Scored], nonmembers: Sequence[Scored]) -> dict[str, Any]:
    """The part of `build_log` on membership attacks: their AUCs, and `privleak` against 0.5.

    Args:
        members: answers of the forget set.
        nonmembers: answers that no model was trained on.

    Returns:
        `mia_ATTACK` for every attack, and `privleak`.

    Raises:
        UserError: a list is empty, or a log-probability of an item is not finite.

    Example:
        >>> one = np.ones(2)
        >>> known, strange = (Scored(-n * one, one > 0, -one, one, "x") for n in (1, 2))
        >>> membership_log([known], [strange])["mia_loss"]["auc"]
        1.0

    MUSE, arXiv 2407.06460; OpenUnlearning, arXiv 2506.12618.
    """
    for split, answers in (("forget", members), ("holdout", nonmembers)):
        _check(split, SplitScores(answers))
    return _attacks(members, nonmembers)


def utility_log(log: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `build_log` on model utility, from the components that a log has.

    Args:
        log: a log as `build_log` returns it.

    Returns:
        {`utility_name`: {"agg_value": ...}}; empty where no component was measured.

    Raises:
        UserError: the log is not an evaluation log.

    Example:
        >>> table = {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}}}
        >>> utility_log({"retain_Q_A_Prob": table})
        {'model_utility_of_1': {'agg_value': 0.5}}

    TOFU, arXiv 2401.06121, model utility.
    """
    if not log:
        return {}
    parsed = parse_log(log)
    parts = utility_components(parsed)
    return {utility_name(len(parts)): {"agg_value": model_utility(parsed)}} if parts else {}


def _split_metrics(split: str, scores: SplitScores) -> dict[str, Any]:
    prefix = PREFIXES[split]
    options = split in WITH_OPTIONS
    answers = [_likelihood(item) for item in scores.answers]
    log = _metric(f"{prefix}_Q_A_Prob", answers, "prob")
    correct = answers if options else None
    if scores.paraphrased is not None and not options:
        correct = [_likelihood(item) for item in scores.paraphrased]
        log |= _metric(f"{prefix}_Q_A_PARA_Prob", correct, "prob")
    if scores.perturbed is not None:
        wrong = [_likelihoods(items) for items in scores.perturbed]
        log |= _metric(f"{prefix}_Q_A_PERT_Prob", wrong, "prob")
        if options:
            normalised = _combine(likelihood.normalised_probability, answers, wrong, "prob")
            items = [{"prob": value} for value in normalised]
            log |= _metric(f"{prefix}_Q_A_Prob_normalised", items, "prob")
        if correct is not None:
            ratios = _combine(likelihood.truth_ratio, correct, wrong, "avg_loss")
            name = truth_ratio_name(split)
            log |= _metric(name, [{"score": ratio} for ratio in ratios], "score")
            if known := [ratio for ratio in ratios if ratio is not None]:
                log[name]["agg_value"] = _aggregate(name.lower(), np.array(known))
    if scores.generations is not None and scores.references is not None:
        prompts = scores.prompts if scores.prompts is not None else [""] * len(scores.answers)
        triples = zip(scores.generations, scores.references, prompts, strict=True)
        items = [
            {**text.rouge(answer, truth), "input": prompt, "ground_truth": truth,
             "generation": answer}
            for answer, truth, prompt in triples
        ]  # fmt: skip
        log |= _metric(f"{prefix}_Q_A_ROUGE", items, "rougeL_recall")
    return log


def _attacks(members: Sequence[Scored], nonmembers: Sequence[Scored]) -> dict[str, Any]:
    log: dict[str, Any] = {}
    for attack, score in likelihood.ATTACKS.items():
        inside, outside = ([score(item) for item in side] for side in (members, nonmembers))
        area = privacy.auc(inside, outside)
        sides = (("forget", inside), ("holdout", outside))
        tables = [_metric(side, [{"score": v} for v in values], "score") for side, values in sides]
        log[f"mia_{attack}"] = {
            **tables[0],
            **tables[1],
            "auc": area,
            "agg_value": area,
        }
    log["privleak"] = {"agg_value": privacy.privleak(log["mia_min_k"]["auc"])}
    return log


def _likelihood(item: Scored) -> dict[str, Any]:
    loss, prob = likelihood.avg_loss(item), likelihood.probability(item)
    return {"prob": _or_none(prob), "avg_loss": _or_none(loss)}


def _likelihoods(items: Sequence[Scored]) -> dict[str, Any]:
    """Lists over the wrong answers of one item; those without label tokens do not count."""
    found = [_likelihood(item) for item in items if len(item.logp)]
    return {key: [one[key] for one in found] or None for key in ("prob", "avg_loss")}


def _combine(function: Any, correct: Iterable[dict], wrong: Iterable[dict], key: str) -> list:
    pairs = ((one[key], other[key]) for one, other in zip(correct, wrong, strict=True))
    return [None if None in pair else float(function(*pair)) for pair in pairs]


def _metric(name: str, items: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """{name: table} over the items that have a value; empty if none has."""
    kept = {str(index): item for index, item in enumerate(items) if item[key] is not None}
    if not kept:
        return {}
    mean = float(np.mean([np.mean(item[key]) for item in kept.values()]))
    return {name: {"agg_value": mean, "value_by_index": kept}}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # NaN is not JSON


def _check(split: str, scores: SplitScores) -> None:
    lengths = {name: len(v) for name, v in scores._asdict().items() if v is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"split {split}: lists of different lengths {lengths}")
    if not scores.answers:
        raise UserError(f"split {split}: no items; check the data set")
    for index in range(len(scores.answers)):
        texts = [("answer", scores.answers[index])]
        if scores.paraphrased is not None:
            texts.append(("paraphrased answer", scores.paraphrased[index]))
        if scores.perturbed is not None:
            texts += [(f"wrong answer {j}", one) for j, one in enumerate(scores.perturbed[index])]
        for what, one in texts:
            # Otherwise a diverged model's items would count as items without labels, outside the
            # means.
            if not np.isfinite(one.logp).all():
                raise UserError(
                    f"split {split}, item {index}: a log-probability of its {what} is not finite; "
                    "the model has diverged, take an earlier checkpoint"
                )
