"""Per-item evaluation logs: two file formats read into one structure.

OpenUnlearning's EVAL.json, which this project also writes, and the aggregated log of the original
TOFU code. A published log of a retrained model can thus be the reference of a run here, without
that model.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import likelihood, privacy
from jaxlib_unlearn.reading import check_spelling, exists, number, read_json, reading

# Split -> prefix of its metrics in EVAL.json. Holdout texts serve the membership attacks alone.
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
# These two have no paraphrase: the answer itself is the correct text of their truth ratio, and
# their probability is normalised over the offered answers.
WITH_OPTIONS = ("real_authors", "world_facts")
# Split -> block of the aggregated TOFU log.
TOFU_BLOCKS = {
    "forget": "eval_log_forget",
    "retain": "eval_log",
    "real_authors": "eval_real_author_wo_options",
    "world_facts": "eval_real_world_wo_options",
}


class EvalLog(NamedTuple):
    """One evaluation of one model, from either file format.

    source: for error messages. items: flat metric name -> (n,) float64 values per item; truth
    ratios are R = P(wrong)/P(correct). auc: attack name -> area under the curve. stated: flat
    name -> a number that a file gives without the values behind it.
    """

    source: str
    items: dict[str, np.ndarray]
    auc: dict[str, float]
    stated: Mapping[str, float] = MappingProxyType({})


# Tables of one split, and tables that belong to no split, in EVAL.json.
TABLES = ("Q_A_Prob", "Q_A_PARA_Prob", "Q_A_PERT_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE")
WHOLE = ("extraction_strength", "exact_memorization", "privleak")
# Metrics between 0 and 1, by the end of their flat name.
SHARES = ("_probability", "_rouge", "extraction_strength", "exact_memorization")

Log = EvalLog | Mapping[str, Any]

# Metrics in other programs' logs that are not computed here: name in EVAL.json -> key of an item.
# The name is kept, in lower case.
OTHERS = {
    "forget_Q_A_gibberish": "score",
    "forget_gibberish": "score",
    "forget_knowmem_ROUGE": "rougeL_f1",
    "retain_knowmem_ROUGE": "rougeL_f1",
    "forget_verbmem_ROUGE": "rougeL_f1",
}


def load_log(path: str | Path) -> EvalLog:
    """Read an evaluation log: OpenUnlearning's EVAL.json or TOFU's aggregated JSON.

    Args:
        path: the file.

    Returns:
        An `EvalLog` with every metric found in the file.

    Raises:
        UserError: the file cannot be read, is not JSON, or is not an evaluation log.

    Example:
        >>> load_log("absent.json")
        Traceback (most recent call last):
        ...
        jaxlib_unlearn.errors.UserError: absent.json: No such file or directory; check the path

    TOFU, arXiv 2401.06121; OpenUnlearning, arXiv 2506.12618.
    """
    if not exists(Path(path), "check the path"):
        raise UserError(f"{path}: No such file or directory; check the path")
    data = read_json(path, "write or download it again", what="not JSON")
    return parse_log(data, source=str(path))


def parse_log(data: Any, source: str = "evaluation log") -> EvalLog:
    """The same as `load_log` for content that is already in memory.

    Args:
        data: the parsed JSON.
        source: its name in error messages.

    Returns:
        An `EvalLog`.

    Raises:
        UserError: the content is not an evaluation log.

    Example:
        >>> log = {"forget_Q_A_Prob": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5}}}}
        >>> parse_log(log).items
        {'forget_probability': array([0.5])}
    """
    with reading(source, "give the full log of one evaluation", "not an evaluation log"):
        _check_tables(data, source)
        log = _parse(data, source)
        _check_ranges(log)
        return log


def _names() -> list[str]:
    """Entries of EVAL.json that this project writes."""
    tables = [f"{prefix}_{name}" for prefix in PREFIXES.values() for name in TABLES]
    attacks = [f"mia_{attack}" for attack in likelihood.ATTACKS]
    return [*tables, *map(truth_ratio_name, PREFIXES), *attacks, *WHOLE]


def has_metrics(log: Mapping[str, Any]) -> bool:
    """Whether a log has an entry that `parse_log` reads: of EVAL.json, or of TOFU's own form.

    Args:
        log: the parsed JSON.

    Returns:
        False if `parse_log` would say that it is not an evaluation log.

    Example:
        >>> has_metrics({"forget_Q_A_ROUGE": {}}), has_metrics({"my_metric": {}})
        (True, False)
    """
    known = {*_names(), *OTHERS, *TOFU_BLOCKS.values()}
    return any(name.removesuffix(".json") in known or name.startswith("mia_") for name in log)


def _check_tables(data: Any, source: str) -> None:
    """Raise `UserError` for a metric that is misspelt by one letter, or that has no items."""
    if not isinstance(data, Mapping):
        return
    blocks = [*TOFU_BLOCKS.values(), *(f"{block}.json" for block in TOFU_BLOCKS.values())]
    names = [*_names(), *blocks]
    check_spelling(data, names, source, "correct it, or evaluate the model again")
    for name, table in data.items():
        odd = name in names and name != "privleak" and not isinstance(table, Mapping | None)
        if odd or (isinstance(table, Mapping) and table.get("value_by_index") == {}):
            raise UserError(
                f"{source}: not an evaluation log ({name} is not a table of items); give the full "
                "log, not a summary"
            )


def _check_ranges(log: EvalLog) -> None:
    """Raise `UserError` for values outside the range of their metric."""
    for name, values in [*log.items.items(), *log.auc.items()]:
        share = name in log.auc or name.endswith(SHARES)
        high = 1.0 + 1e-6 if share else np.inf  # probabilities are rounded
        if np.ndim(values) > 1:
            raise UserError(
                f"{log.source}: {name} is not one number per item; evaluate the model again"
            )
        odd = np.min(values) < 0 or np.max(values) > high
        if odd and (share or name.endswith("truth_ratio")):
            wanted = "between 0 and 1" if share else "0 or more"
            raise UserError(
                f"{log.source}: {name} has a value that is not {wanted}; evaluate the model again"
            )


def _parse(data: Any, source: str) -> EvalLog:
    if not isinstance(data, Mapping):
        data = {}
    blocks = {name.removesuffix(".json"): block for name, block in data.items()}
    if any(block in blocks for block in TOFU_BLOCKS.values()):
        items, auc, stated = _read_tofu(blocks, source), {}, {}
    else:
        items, auc, stated = _read_open_unlearning(data, source)
    arrays = {name: np.array(list(v.values()), np.float64) for name, v in items.items() if v}
    if not arrays and not auc and not stated:
        raise UserError(
            f"{source}: not an evaluation log; give an EVAL.json of OpenUnlearning or this "
            "project, or an aggregated log of TOFU"
        )
    for name, values in [*arrays.items(), *auc.items(), *stated.items()]:
        if not np.isfinite(values).all():
            where = "" if np.isscalar(values) else f" of item {_worst(items[name])}"
            raise UserError(f"{source}: {name}{where} is not finite; evaluate the model again")
    return EvalLog(source, arrays, auc, stated)


def as_log(log: Log) -> EvalLog:
    """An `EvalLog`, given one or the dict that `build_log` returns.

    Args:
        log: either form.

    Returns:
        The `EvalLog`.

    Raises:
        UserError: the dict is not an evaluation log.

    Example:
        >>> as_log(EvalLog("mine", {}, {})).source
        'mine'
    """
    return log if isinstance(log, EvalLog) else parse_log(log)


Column = dict[int, Any]


def _worst(column: Column) -> int:
    """Index of the first item of a column that is not finite."""
    return next(index for index, value in column.items() if not np.isfinite(value).all())


def _column(table: Any, what: str, source: str, key: str | None = None) -> Column:
    """{index: value} in index order, without the items that have no value (no target tokens)."""
    try:
        rows = [(int(index), row) for index, row in table.items() if row is not None]
        values = {index: row if key is None else row[key] for index, row in sorted(rows)}
        column = {index: _floats(value) for index, value in values.items() if value is not None}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: {what} has no readable per-item {key or 'values'}; "
            "give the full log, not a summary"
        ) from error
    if any(not np.isfinite(value).all() for value in column.values()):
        raise UserError(
            f"{source}: {what} {key or 'value'} of item {_worst(column)} is not finite; evaluate "
            "the model again"
        )
    return column


def _floats(value: Any) -> float | list[float]:
    values = [number(x) for x in value] if isinstance(value, list) else [number(value)]
    if not values:
        raise ValueError("an empty list")
    return values if isinstance(value, list) else values[0]


def _zip(function: Any, first: Column, second: Column) -> Column:
    if function is likelihood.truth_ratio:
        for column in (first, second):
            _check_losses(column)
    return {i: float(function(first[i], second[i])) for i in first if i in second}


def _check_losses(column: Column) -> Column:
    """Raise `ValueError` for a negative mean NLL, which would go unnoticed in a ratio."""
    for index, loss in column.items():
        if np.min(loss) < 0:
            raise ValueError(f"item {index} has the loss {loss}")
    return column


def _means(column: Column) -> Column:
    return {index: float(np.mean(value)) for index, value in column.items()}


def _read_open_unlearning(
    data: Mapping, source: str
) -> tuple[dict[str, Column], dict[str, float], dict[str, float]]:
    def read(metric: str, key: str) -> Column:
        if metric not in data:
            return {}
        table = data[metric]
        table = table.get("value_by_index") if isinstance(table, Mapping) else None
        return _column(table, metric, source, key)

    items: dict[str, Column] = {}
    for split, prefix in PREFIXES.items():
        answer, wrong = f"{prefix}_Q_A_Prob", f"{prefix}_Q_A_PERT_Prob"
        correct = answer if split in WITH_OPTIONS else f"{prefix}_Q_A_PARA_Prob"
        items[f"{split}_probability"] = read(answer, "prob")
        if split in WITH_OPTIONS:
            items[f"{split}_probability"] = read(f"{answer}_normalised", "prob") or _zip(
                likelihood.normalised_probability, read(answer, "prob"), read(wrong, "prob")
            )
        items[f"{split}_rouge"] = read(f"{prefix}_Q_A_ROUGE", "rougeL_recall")
        # From the losses where present: the stored scores may be R or, with the aggregator
        # "prob_mean", R', and the file does not say which.
        ratios = {}
        if correct in data and wrong in data:
            ratios = _zip(
                likelihood.truth_ratio, read(correct, "avg_loss"), read(wrong, "avg_loss")
            )
        items[f"{split}_truth_ratio"] = ratios or read(truth_ratio_name(split), "score")
    items["forget_paraphrased_probability"] = _means(read("forget_Q_A_PARA_Prob", "prob"))
    items["forget_perturbed_probability"] = _means(read("forget_Q_A_PERT_Prob", "prob"))
    for metric in ("extraction_strength", "exact_memorization"):
        items[metric] = read(metric, "score")

    for metric, key in OTHERS.items():
        items[metric.lower()] = read(metric, key)

    # Including attacks that are not computed here (gradient norm, reference model).
    auc, stated = {}, {}
    for name, table in data.items():
        attack = name.removeprefix("mia_")
        if attack == name or not isinstance(table, Mapping):
            continue
        sides = [table.get(side) for side in ("forget", "holdout")]
        if all(isinstance(side, Mapping) and side.get("value_by_index") for side in sides):
            scores = [_column(side["value_by_index"], name, source, "score") for side in sides]  # pyright: ignore
            auc[attack] = privacy.auc(*(list(side.values()) for side in scores))
        elif isinstance(table.get("agg_value"), float | int):
            auc[attack] = float(table["agg_value"])
    table = data.get("privleak")
    if "min_k" not in auc and isinstance(table, Mapping):
        if isinstance(table.get("agg_value"), float | int):
            stated["privleak"] = float(table["agg_value"])
    return items, auc, stated


def _read_tofu(blocks: Mapping, source: str) -> dict[str, Column]:
    items: dict[str, Column] = {}
    for split, name in TOFU_BLOCKS.items():
        block = blocks.get(name)
        if not isinstance(block, Mapping):
            continue

        def read(field: str, block: Mapping = block, name: str = name) -> Column:
            return _column(block.get(field), f"{name}, field {field},", source)

        def exp(losses: Column) -> Column:
            _check_losses(losses)
            return {index: np.exp(-np.asarray(loss)) for index, loss in losses.items()}

        answer, wrong = exp(read("avg_gt_loss")), exp(read("average_perturb_loss"))
        items[f"{split}_probability"] = answer
        if split in WITH_OPTIONS:
            items[f"{split}_probability"] = _zip(likelihood.normalised_probability, answer, wrong)
        items[f"{split}_rouge"] = read("rougeL_recall")
        items[f"{split}_truth_ratio"] = (
            read("truth_ratio")
            if "truth_ratio" in block
            else _zip(
                likelihood.truth_ratio, read("avg_paraphrased_loss"), read("average_perturb_loss")
            )
        )
        if split == "forget":
            items["forget_paraphrased_probability"] = exp(read("avg_paraphrased_loss"))
            items["forget_perturbed_probability"] = _means(wrong)
    return items


def truth_ratio_name(split: str) -> str:
    """The entry of a split's truth ratio in EVAL.json."""
    return "forget_truth_ratio" if split == "forget" else f"{PREFIXES[split]}_Truth_Ratio"
