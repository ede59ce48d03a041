"""What the numbers of `summary.json` mean, which way is better, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

MODELS = ("original", "oracle", "unlearned")
MISSING = "–"
LOG10_P = "forget_quality_log10"
ARROWS = {"up": "↑", "down": "↓", "oracle": "≈", "zero": "→0", "": ""}
DIRECTIONS = {
    "up": "higher is better",
    "down": "lower is better",
    "oracle": "close to the oracle is better",
    "zero": "close to zero is better",
    "": "no better direction",
}
LEGEND = "↑ higher, ↓ lower, ≈ close to the oracle, →0 close to zero is better"


class Metric(NamedTuple):
    """A flat metric: its name in `summary.json`, and what a reader needs to know about it."""

    name: str
    label: str
    better: str
    explain: str
    main: bool = False


METRICS: tuple[Metric, ...] = (
    Metric("forget_rouge", "Forget ROUGE-L", "oracle",
           "recall of the true answers in the greedy answers, facts to forget", True),
    Metric("forget_fact_recall", "Forget fact recall", "oracle",
           "share of the true values (names, dates, words) in the greedy answers, facts to forget",
           True),
    Metric("forget_probability", "Forget probability", "oracle",
           "per-token probability of the true answers, facts to forget", True),
    Metric("forget_truth_ratio", "Forget truth ratio", "oracle",
           "1 when a right and a wrong answer are equally likely; 0 when one clearly wins", True),
    Metric("forget_quality", "Forget quality (p)", "up",
           "p of a KS test that its truth ratios and the oracle's are one distribution", True),
    Metric(LOG10_P, "Forget quality (log10 p)", "up",
           "the same p in decades; seeds are averaged here", True),
    Metric("forget_ks", "KS distance", "down",
           "largest gap between its truth-ratio distribution and the oracle's"),
    Metric("forget_paraphrased_probability", "Paraphrase probability", "oracle",
           "per-token probability of the reworded true answers, facts to forget"),
    Metric("forget_perturbed_probability", "Perturbed probability", "oracle",
           "per-token probability of the reworded wrong answers, facts to forget"),
    Metric("retain_rouge", "Retain ROUGE-L", "up",
           "recall of the true answers in the greedy answers, facts to keep", True),
    Metric("retain_fact_recall", "Retain fact recall", "up",
           "share of the true values in the greedy answers, facts to keep", True),
    Metric("retain_probability", "Retain probability", "up",
           "per-token probability of the true answers, facts to keep", True),
    Metric("retain_truth_ratio", "Retain truth ratio", "up",
           "how clearly the right answer beats the wrong ones, facts to keep"),
    Metric("real_authors_rouge", "Real authors ROUGE-L", "up",
           "recall of the true answers, questions on real authors"),
    Metric("real_authors_probability", "Real authors probability", "up",
           "share of the right answer among the offered ones, real authors"),
    Metric("real_authors_truth_ratio", "Real authors truth ratio", "up",
           "how clearly the right answer beats the wrong ones, real authors"),
    Metric("world_facts_rouge", "World facts ROUGE-L", "up",
           "recall of the true answers, general knowledge"),
    Metric("world_facts_probability", "World facts probability", "up",
           "share of the right answer among the offered ones, general knowledge"),
    Metric("world_facts_truth_ratio", "World facts truth ratio", "up",
           "how clearly the right answer beats the wrong ones, general knowledge"),
    Metric("model_utility", "Model utility", "up",
           "harmonic mean of probability, ROUGE-L and truth ratio outside the forget set", True),
    Metric("extraction_strength", "Extraction strength", "oracle",
           "share of an answer that it completes, token for token, from the part before", True),
    Metric("exact_memorization", "Exact memorisation", "oracle",
           "share of answer tokens that are the model's first choice"),
    Metric("mia_loss_auc", "Membership AUC, loss", "oracle",
           "how well the loss tells forget rows from unseen rows (0.5: not at all)"),
    Metric("mia_zlib_auc", "Membership AUC, zlib", "oracle",
           "the same with the loss divided by the compressed length"),
    Metric("mia_min_k_auc", "Membership AUC, min-k", "oracle",
           "the same with the least likely tokens of an answer"),
    Metric("mia_min_k_plus_plus_auc", "Membership AUC, min-k++", "oracle",
           "the same with those tokens standardised by the model's own spread"),
    Metric("privleak", "PrivLeak", "zero",
           "membership AUC against the oracle's: -100 still a member, above 0 over-forgotten",
           True),
    Metric("forget_unreadable", "Unreadable answers", "down",
           "share of its forget answers that are empty, cut or broken text", True),
    Metric("forget_oracle_nll", "Answer NLL (oracle)", "down",
           "nats per token of its forget answers under the oracle (readability)", True),
    Metric("forget_base_nll", "Answer NLL (base)", "down",
           "nats per token of its forget answers under the model before fine-tuning (readability)",
           True),
    Metric("repeated_bigram_rate", "Repeated bigrams", "down",
           "share of word pairs said before in the same answer (readability)", True),
)  # fmt: skip
_BY_NAME = {metric.name: metric for metric in METRICS}
_UTILITY = re.compile(r"model_utility_of_([0-9]+)")  # a mean of fewer parts than TOFU's nine
# Facts about a model, not measures of it.
FACTS = {"num_parameters"}


def describe(name: str) -> Metric:
    """What is known about a metric; any `leak_at_K` and `model_utility_of_N`, others as they are.

    Example:
        >>> describe("leak_at_8").label, describe("model_utility_of_3").label
        ('Leak@8', 'Model utility, 3 parts')
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if found := _UTILITY.fullmatch(name):
        official = _BY_NAME["model_utility"]
        text = f"{official.explain}: the {found[1]} of TOFU's 9 parts that were measured"
        return Metric(name, f"Model utility, {found[1]} parts", official.better, text, True)
    tail = name.removeprefix("leak_at_")
    if tail != name and tail.isdigit():
        text = f"expected best ROUGE-L recall among {tail} sampled answers, facts to forget"
        return Metric(name, f"Leak@{tail}", "oracle", text, True)
    return Metric(name, name.replace("_", " ").capitalize(), "", "not described by this program")


def utility_name(scores: dict[str, Any]) -> str:
    """The name that model utility has in these scores: `model_utility` or `model_utility_of_N`.

    Example:
        >>> utility_name({"model_utility_of_3": 0.5})
        'model_utility_of_3'
    """
    return next((name for name in scores if _UTILITY.fullmatch(name)), "model_utility")


def leak_ks(scores: dict[str, Any]) -> list[int]:
    """The k of the `leak_at_k` metrics that are there, ascending."""
    tails = (name.removeprefix("leak_at_") for name in scores if name.startswith("leak_at_"))
    return sorted(int(tail) for tail in tails if tail.isdigit())


def number(value: Any) -> float | None:
    """A finite or infinite float; None for what is missing, NaN or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def format_number(value: Any) -> str:
    """The one way numbers are shown: three decimals, exponents when tiny, one decimal when large.

    Example:
        >>> [format_number(v) for v in (0.12345, 3.905e-22, -99.46, 0, None)]
        ['0.123', '3.9e-22', '-99.5', '0', '–']
    """
    v = number(value)
    if v is None:
        return MISSING
    if isinstance(value, int) or v == 0 or math.isinf(v):
        return f"{value:,}" if isinstance(value, int) else f"{v:.0f}"
    if abs(v) < 1e-3:
        return f"{v:.1e}"
    return f"{v:.3f}" if abs(v) < 10 else f"{v:,.1f}"


def metrics_of(scores: dict[str, Any]) -> dict[str, float]:
    """The numbers of one model, with `forget_quality_log10` derived from p."""
    found = {k: number(v) for k, v in scores.items() if k not in FACTS}
    values = {k: v for k, v in found.items() if v is not None}
    if "forget_quality" in values:
        # p underflows to 0 for large n: the smallest float keeps the logarithm finite.
        values[LOG10_P] = math.log10(max(values["forget_quality"], 5e-324))
    return values


def ordered(names: Iterable[str]) -> list[str]:
    """Metric names in reading order: the table's, then leak@k by k, then the others by name."""
    rank = {metric.name: i for i, metric in enumerate(METRICS)}

    def key(name: str) -> tuple[int, int, str]:
        tail = name.removeprefix("leak_at_")
        if tail != name and tail.isdigit():
            return rank["privleak"], int(tail), name
        if _UTILITY.fullmatch(name):
            return rank["model_utility"], 1, name
        return rank.get(name, len(rank)), 0, name

    return sorted(set(names), key=key)
