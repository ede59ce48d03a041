"""Evaluating every model of a run in the same way: logs cached by their inputs, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.evaluators import EVALUATORS, chosen, evaluation, trace_judge
from train.options.config import to_json
from train.options.roles import ROLES, Roles
from train.runtime.stages import amend_json, json_stage


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


def evaluate_cached(
    config: Any,
    model: Any,
    task: Any,
    judge: Any,
    root: Path,
    mesh: Any,
    name: str,
    cache: Path | None = None,
) -> Any:
    """The per-item log of a model, from `evals/NAME.json` when that has the same inputs.

    `config` is that of a run or of `train.evaluate`, with `data`, `evaluate` and `seed`.
    """
    inputs = evaluation_inputs(model, task, config.evaluate, config.data, judge, config.seed)

    def compute() -> Any:
        return evaluation.evaluate_model(
            model.to_device(),
            task,
            config.evaluate,
            system_prompt=config.data.system_prompt,
            max_length=config.data.max_length,
            mesh=mesh,
            seed=config.seed,
            name=name,
            judge=None if judge is None else judge.to_device(),
        )

    return json_stage(root / "evals" / f"{name}.json", inputs, compute, cache)


def summarize(
    logs: dict[str, Any], models: dict[str, Any], retain_log: Any, roles: Roles = ROLES
) -> dict[str, Any]:
    """Flat metrics of every model, compared with `retain_log` or else the reference's log."""
    reference = retain_log if retain_log is not None else logs.get(roles.reference)
    return {name: evaluation.summarize(log, reference, models[name]) for name, log in logs.items()}


def compare_logs(root: Path, logs: dict[str, Any], retain_log: Any, roles: Roles = ROLES) -> None:
    """Add comparisons with the reference, which is evaluated later, to the logs in `evals/`."""
    reference = retain_log if retain_log is not None else logs.get(roles.reference)
    for name, log in logs.items():
        for row in EVALUATORS.values():
            log = log if row.compare is None else row.compare(log, reference)
        amend_json(root / "evals" / f"{name}.json", log)
