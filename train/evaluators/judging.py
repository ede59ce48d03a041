"""Evaluating every model of a run in the same way: logs cached by their inputs, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.eval_log import EvalLog
from train.evaluators import EVALUATORS, chosen, evaluation, trace_judge
from train.options.config import to_json
from train.options.roles import ROLES, Roles
from train.runtime.stages import amend_json


def evaluation_inputs(
    model: Any, task: Any, evaluate: Any, data: Any, judge: Any, seed: int
) -> dict[str, Any]:
    """Everything an evaluation depends on: the inputs of its cache key."""
    folder = getattr(evaluate, "judge_model", None)
    named = {} if folder is None else {"judge_model": trace_judge.identity(folder)}
    return {
        **model.identity(),
        **named,
        "task": task.digest(),
        "evaluate": to_json(evaluate),
        "judge": None if judge is None else [judge.sha, to_json(judge.decoder.config)],
        "system_prompt": data.system_prompt,
        "max_length": data.max_length,
        "seed": seed,
        "version": evaluation.VERSION,
        "evaluators": [[row.name, row.version] for row in chosen(task.evaluators)],
    }


def log_of(config: Any, model: Any, task: Any, judge: Any, mesh: Any, name: str) -> Any:
    """The per-item log of a model that is on the devices.

    `config` is that of a run or of an evaluation, with `data`, `evaluate` and `seed`.
    """
    return evaluation.evaluate_model(
        model,
        task,
        config.evaluate,
        system_prompt=config.data.system_prompt,
        max_length=config.data.max_length,
        mesh=mesh,
        seed=config.seed,
        name=name,
        judge=None if judge is None else judge.to_device(),
    )


def check_rows(path: Path | None, log: EvalLog | None, rows: Mapping[str, Any]) -> None:
    """Raise `UserError` where a log in place of the reference's is about other rows.

    Args:
        path: the file of `--retain-log`, or None.
        log: its content.
        rows: the rows of every evaluated split, by its name.
    """
    known = 0 if log is None else len(log.items.get("forget_truth_ratio", ()))
    asked = len(rows.get("forget", ()))
    if asked and known not in (0, asked):
        raise UserError(
            f"--retain-log {path} is about {known} forget rows, and {asked} are asked here; "
            "give the log of the same rows, or leave it out"
        )


def held_to(
    name: str, logs: Mapping[str, Any], retain_log: Any, roles: Roles
) -> Mapping[str, Any] | None:
    """The log that a model is compared with; `retain_log` stands for the reference's."""
    other = roles.held_to(name)
    return retain_log if retain_log is not None and other == roles.reference else logs.get(other)


def summarize(
    logs: Mapping[str, Any], models: Mapping[str, Any], retain_log: Any, roles: Roles = ROLES
) -> dict[str, Any]:
    """Flat metrics of every model, each compared with the model that `roles` holds it to."""
    return {
        name: evaluation.summarize(log, held_to(name, logs, retain_log, roles), models[name])
        for name, log in logs.items()
    }


def compare_logs(
    root: Path, logs: Mapping[str, Any], retain_log: Any, roles: Roles = ROLES
) -> None:
    """Add the comparisons of `summarize` to the logs in `evals/`."""
    for name, log in logs.items():
        other = held_to(name, logs, retain_log, roles)
        for row in EVALUATORS.values():
            log = log if row.compare is None else row.compare(log, other)
        amend_json(root / "evals" / f"{name}.json", log)
