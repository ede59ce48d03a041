"""The classification job: a model learns a task for a budget of forward passes, and is judged."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train.engine.replays import stored
from train.engine.run import Run, Watch, phase, train
from train.evaluators import EVALUATORS
from train.evaluators.evaluation import num_parameters
from train.jobs import job
from train.jobs.classification_options import TASKS, ClassifyRun, recipe_of
from train.jobs.job import Fitted, Job, Judged, Started
from train.jobs.labelled_context import LabelledContext
from train.options import checks, optimizers
from train.options.config import to_json
from train.options.roles import NONE, Roles
from train.runtime.stages import json_stage
from train.runtime.steplog import read_steps
from train.runtime.tracking import Timed, say
from train.tasks import labelled
from train.tasks.kinds import Kind

STAGE = "finetuned"


def run(config: ClassifyRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. Train the model to start from, where it is not a given one.
        base = begin(started)

        # 2. Learn the task, for as many forward passes as the budget has.
        finetuned = finetune(started, base)
        cost = cost_of(started, finetuned.sha)

        # 3. Judge the model before and after alike.
        judged = judge(started, {"base": base, STAGE: finetuned})

        # 4. Hand it back.
        what = f"A model that learned {config.task} with jaxlib-unlearn ({config.optimizer.name})."
        kind, dtype = kind_of(config), config.export_dtype
        job.export(started.run, lambda folder: kind.export(finetuned, folder, dtype, what))
        return end(started, judged.summary, cost)


class Encoded(NamedTuple):
    """The rows of a run as its model reads them.

    Args:
        splits: the rows by split.
        steps: the number of steps that the budget allows.
    """

    splits: Mapping[str, list[Any]]
    steps: int


def kind_of(config: ClassifyRun) -> Kind:
    """The kind of the model and of the rows."""
    return TASKS[config.task].kind


def objective_of(config: ClassifyRun) -> tuple[objectives.Objective, Any]:
    """The objective by which the rows of a run's task are learned."""
    return objectives.resolve(kind_of(config).objective, objectives.LEARNING)


def steps_of(config: ClassifyRun) -> int:
    """The steps that the budget allows.

    Raises:
        UserError: a budget below one step.
    """
    try:
        return optimizers.steps_within(config.optimizer, config.train.forwards)
    except UserError as error:
        raise UserError(f"--train.forwards {config.train.forwards}: {error}") from None


def check(config: ClassifyRun, mesh: Any) -> None:
    """Raise `UserError` for errors that are known before rows and model are read."""
    optimizers.check(config.optimizer)  # the number of steps depends on its options
    recipe = recipe_of(config, steps_of(config))
    checks.check_recipe(recipe, objective_of(config), mesh, "training")


def load(config: ClassifyRun) -> labelled.Rows:
    """The rows of the task."""
    # The data may come from the Hub: a path with a typo in it need not wait for that.
    kind_of(config).check(config)
    return labelled.load(TASKS[config.task], config.data, config.seed)


def model(config: ClassifyRun, rows: labelled.Rows, mesh: Any) -> Any:
    """The model to start from."""
    return kind_of(config).load(config, rows, mesh)


def fit(config: ClassifyRun, rows: labelled.Rows, base: Any, mesh: Any) -> Fitted:
    """The rows as the model reads them; checks that it can be trained as the run says."""
    kind, steps = kind_of(config), steps_of(config)
    recipe = recipe_of(config, steps)
    checks.check_model(recipe, objective_of(config), base.learner, base.params)
    splits = {
        split: kind.encode(base, getattr(rows, split), config.data, split)
        for split in ("train", "dev", "test")
    }
    words = f"{config.task}, {num_parameters(base.params) / 1e6:.1f} M parameters"
    return Fitted(Encoded(splits, steps), words, rows.notes, kind.evaluators)


JOB = Job("train.classify", Roles("base", NONE, STAGE), check, load, model, fit)


def begin(started: Started) -> Any:
    """The model that is fine-tuned, which the run may train too."""
    config, make = started.config, kind_of(started.config).begin
    if make is None:
        return started.model
    with phase(started.run, "start"):
        splits = started.parts.splits
        return make(config, started.run, started.rows, splits, started.model).to_host()


def log_of(started: Started, trained: Any, splits: tuple[str, ...], name: str) -> dict[str, Any]:
    """The per-item log of a model: the entries of the kind's evaluators."""
    kind = kind_of(started.config)
    encoded = {split: started.parts.splits[split] for split in splits}
    context = LabelledContext(
        kind, trained, encoded, started.config.evaluate, started.run.mesh, name
    )
    rows = {split: getattr(started.rows, split) for split in splits}
    for evaluator in kind.evaluators:
        context.log |= EVALUATORS[evaluator].run(trained, rows, context)
    return context.log


def finetune(started: Started, base: Any) -> Any:
    """The base model after training on the training rows until the budget is spent."""
    here, config, kind = started.run, started.config, kind_of(started.config)
    recipe = recipe_of(config, started.parts.steps)

    def look(trained: Any) -> dict[str, float]:
        with looking(here):
            log = log_of(started, trained, ("dev",), "look")
        return {name: entry["agg_value"] for name, entry in log.items()}

    def keep(trained: Any) -> None:
        if kind.export_adapter is not None:
            kind.export_adapter(trained, config.lora, base, config.model, here.folder, config.task)

    with phase(here, STAGE):
        stream = kind.stream(base, started.parts.splits["train"], config.train.batch_size)
        return train(
            here,
            STAGE,
            base,
            objective_of(config),
            {"train": stream},
            recipe,
            record=stored.NAME,
            watch=(Watch(look, config.train.curve_points),),
            keep=None if config.lora.rank is None else keep,
        ).to_host()


def looking(here: Run) -> contextlib.AbstractContextManager[None]:
    """Exclude the time that passes inside from that of training."""
    if isinstance(here.tracker, Timed):
        return here.tracker.looking()
    return contextlib.nullcontext()


def cost_of(started: Started, sha: str) -> dict[str, Any]:
    """The cost of the training; it is measured once, and kept with its result.

    `forwards`, `steps`, `seconds` (without compilations and looks; None where a run was stopped
    right behind its last step) and `step_mib`, the memory of a step on a device.
    """
    here, config, steps = started.run, started.config, started.parts.steps

    def measured() -> dict[str, Any]:
        lines = read_steps(here.folder / "metrics.jsonl", say)
        sizes = [
            line["step_mib"] for line in lines if line["stage"] == STAGE and "step_mib" in line
        ]
        seconds = here.tracker.seconds(steps) if isinstance(here.tracker, Timed) else None
        return {
            "forwards": optimizers.forwards(config.optimizer, steps),
            "steps": steps,
            "seconds": None if seconds is None else round(seconds, 2),
            "step_mib": max(sizes, default=None),
        }

    path = here.folder / "computed" / "cost.json"
    return json_stage(path, {"params": sha}, measured, here.cache)


def judge(started: Started, models: Mapping[str, Any]) -> Judged:
    """Judge the models alike, each by the rows held out."""
    config, kind = started.config, kind_of(started.config)

    def inputs(trained: Any, name: str) -> dict[str, Any]:
        return {
            **trained.identity(),
            "rows": started.rows.digest(),
            "data": {"max_length": config.data.max_length},
            "evaluate": to_json(config.evaluate),
            "kind": [kind.objective, kind.cache_version],
            "evaluators": [[e, EVALUATORS[e].version] for e in kind.evaluators],
        }

    return job.judge(
        started.run,
        models,
        inputs,
        lambda trained, name: log_of(started, trained.to_device(), ("dev", "test"), name),
    )


def end(started: Started, summary: Mapping[str, Any], cost: Mapping[str, Any]) -> Path:
    """The end of the run; the cost stands beside the trained model's metrics."""
    whole = {**summary, STAGE: {**summary[STAGE], **cost}}
    majority, notes = started.rows.majority_accuracy, []
    if majority is not None:
        notes = [f"always the commonest label of the training rows: accuracy {majority:.3f}"]
    return job.end(started.run, {**whole, "majority_accuracy": majority}, whole, notes)
