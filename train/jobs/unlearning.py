"""The unlearning job: a model learns, forgets, and is judged beside one that never knew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.eval_log import load_log
from models.decoder.learner import DecoderLearner
from train.data.task import Task
from train.engine import base_models, exports
from train.evaluators import judging, trace_judge
from train.evaluators.evaluation import Model, num_parameters
from train.jobs import job
from train.jobs.alternates import check_alternates, find_alternates, lacks_alternates
from train.jobs.job import Fitted, Job, Judged, Started
from train.jobs.traces import check_room, check_traces, find_traces, lacks_traces
from train.jobs.unlearning_stages import (
    finetune,
    forgetting,
    learning,
    resolved,
    unlearn,
)
from train.options import checks
from train.options.config import RunConfig, identity
from train.options.recipe import num_steps
from train.options.roles import ROLES
from train.reporting import card, tables
from train.runtime import distributed, files
from train.runtime.stages import digest
from train.runtime.tracking import say
from train.tasks import fitting, load_task, subject
from train.tasks.task import prompt_format


def run(config: RunConfig, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        here, task, base = started.run, started.parts, started.model
        retain_log, models = started.rows.retain_log, {}

        # 1. Train the original, which knows, and the oracle, which never knew. Models wait in
        #    host memory.
        knows = task.forget + task.retain
        models["original"] = base
        if config.stage.original is None:
            models["original"] = finetune(here, config, "original", base, knows).to_host()
        if config.oracle and retain_log is None and config.stage.original is None:
            oracle = finetune(here, config, "oracle", base, task.retain, knows)
            models["oracle"] = oracle.to_host()
        elif config.oracle and retain_log is None:
            say(
                "oracle: trained from the same start is not possible with --stage.original; give "
                "--retain-log to compare"
            )

        # 2. Forget.
        forgets = find_alternates(here, config, base, task)
        forgets = find_traces(here, config, models["original"], forgets)
        models["unlearned"] = unlearn(here, config, models["original"], forgets, base).to_host()

        # 3. Judge all of them alike.
        judged = judge(started, models)

        # 4. Hand it back.
        job.export(here, lambda folder: export(started, models["unlearned"], judged, folder))
        return job.end(here, judged.summary)


class Loaded(NamedTuple):
    """The rows of a run, and the format of their prompts.

    Args:
        task: the rows that are forgotten, kept and asked.
        layout: the prompt format.
        retain_log: the log of a retain-only model, in the place of an oracle.
    """

    task: Task
    layout: Any
    retain_log: Any

    def digest(self) -> str:
        """sha256 of the rows and of those shown before every question."""
        return digest([self.task.digest(), self.layout.shots])


def check(config: RunConfig, mesh: Any) -> None:
    """Raise `UserError` for errors that are known before rows and model are read."""
    nll, objective = objectives.resolve("nll"), objectives.resolve(config.objective)
    checks.check_recipe(forgetting(config), objective, mesh, "unlearning")
    checks.check_recipe(learning(config), nll, mesh, "fine-tuning", main=False)
    trace_judge.check(config.evaluate.judge_model)
    if config.retain_log is not None:
        files.check_key(config.retain_log)  # where it is the log of a run
    if config.stage.original is not None and config.model.revision is not None:
        raise UserError(
            "--model.revision does not go with --stage.original, in whose place nothing else is "
            "loaded; write --stage.original owner/name@revision"
        )


def load(config: RunConfig) -> Loaded:
    """The rows of a run, and the log in place of the oracle's.

    Raises:
        UserError: a file is unusable, or the log is about another number of rows.
    """
    layout = prompt_format(config.data)
    retain_log = None if config.retain_log is None else load_log(config.retain_log)
    # The data may come from the Hub: a path with a typo in it need not wait for that.
    base_models.check_model(config.stage.original or config.model.path, config.model.revision)
    task = load_task(config)
    judging.check_rows(config.retain_log, retain_log, task.evaluation)
    return Loaded(task, layout, retain_log)


def model(config: RunConfig, loaded: Loaded, mesh: Any) -> Model:
    """The model before training, or the given original."""
    task, given, m = loaded.task, config.stage.original, config.model
    if given is None:
        base = base_models.base_model(config, task, mesh)
    else:
        base = base_models.load_model(given, m.remat, mesh, m.dtype, notes=task.notes)
        if m.mask_all_pad_id_tokens:
            base = base_models.masking_pad_ids(base)
        if "holdout" in task.evaluation:
            task.notes.append(
                "The model came from outside. Where it was trained on the rows taken as "
                "non-members, the membership metrics (privleak) and the control mean nothing."
            )
    return base._replace(tokenizer=base.tokenizer.formatted(loaded.layout))


def fit(config: RunConfig, loaded: Loaded, base: Model, mesh: Any) -> Fitted:
    """The rows that the model can read; checks that the stages can be trained on them."""
    data = config.data
    task = fitting.fit_task(loaded.task, base, config)
    check_stages(config, task, base.learner, loaded.retain_log)
    if config.traces.path is None and lacks_traces(objectives.resolve(config.objective)[0], task):
        where = {"system_prompt": data.system_prompt, "max_length": data.max_length}
        check_room(base, task.forget, config.traces, **where)
    resolved(config, base, task)
    size = num_parameters(base.params) / 1e6
    words = f"{size:.1f} M parameters"
    return Fitted(task, words, task.notes, task.evaluators, subject(vars(data)))


def check_stages(
    config: RunConfig, task: Task, learner: DecoderLearner, retain_log: Any = None
) -> None:
    """Raise `UserError` for a stage without steps, or an impossible objective or optimizer."""
    objective, options = objectives.resolve(config.objective)
    objectives.reference_forward(objective, options, learner.decoder.config.num_layers)
    checks.check_model(forgetting(config), (objective, options), learner)
    if config.data.alternates and lacks_alternates(objective, task):
        check_alternates(config)
    elif lacks_traces(objective, task):
        check_traces(config, objective, task)
    else:
        task.rows_of(objective, config.seed)
    both = len(task.forget) + len(task.retain)
    if config.stage.original is None:
        checks.check_model(learning(config), objectives.resolve("nll"), learner)
        num_steps(config.finetune, both, config.finetune.optimizer)
        if config.oracle and retain_log is None:
            num_steps(config.finetune, len(task.retain), config.finetune.optimizer)
    rows = both if "train" in objective.streams else len(task.forget)
    num_steps(config.unlearn, rows, config.optimizer)


JOB = Job("train.unlearn", ROLES, check, load, model, fit)


def judge(started: Started, models: Mapping[str, Model]) -> Judged:
    """Judge all models alike, in comparison with the oracle or the log in its place."""
    here, config, task = started.run, started.config, started.parts
    asked = config.evaluate.judge
    fluent = started.model if asked == "base" else models.get(asked)
    return job.judge(
        here,
        models,
        lambda model, name: judging.evaluation_inputs(
            model, task, config.evaluate, config.data, fluent, config.seed
        ),
        lambda model, name: judging.log_of(
            config, model.to_device(), task, fluent, here.mesh, name
        ),
        started.rows.retain_log,
    )


def export(started: Started, unlearned: Model, judged: Judged, folder: Path) -> None:
    """The unlearned model, with its results and a card that says how it was judged."""
    here, config = started.run, started.config
    done = tables.Run(
        here.folder,
        identity(config),
        judged.summary,
        here.about,
        notes=tuple(here.notes),
        evaluators=tuple(here.about["evaluators"]),
    )
    text, tokens = card.of_run(done, judged.logs), config.evaluate.max_new_tokens
    results = card.results(done)
    exports.export_model(unlearned, folder, config.export_dtype, text, tokens, results=results)
    if results is not None and config.lora.rank is not None:
        distributed.of_first(lambda: exports.add_results(here.folder / "adapter", results))
