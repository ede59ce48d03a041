"""The job of `train.evaluate`: a model is judged as the models of an unlearning run are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.eval_log import load_log
from train.data.task import Task
from train.engine import base_models
from train.evaluators import judging
from train.evaluators.evaluation import Model, num_parameters
from train.jobs import job
from train.jobs.evaluating_options import EvaluateRun
from train.jobs.job import Fitted, Job
from train.options.config import RunConfig, to_json
from train.options.roles import ROLES
from train.reporting import tables
from train.runtime import distributed, files
from train.runtime.stages import digest, write_atomic
from train.tasks import fitting, load_task, subject
from train.tasks.task import prompt_format

MODEL = "model"


def run(config: EvaluateRun, command: str = "") -> Path:
    """Judge a model, and return the folder of its logs, metrics and page."""
    with job.start(JOB, config, command) as started:
        here, task = started.run, started.parts
        judged = job.judge(
            here,
            {MODEL: started.model},
            lambda model, name: judging.evaluation_inputs(
                model, task, config.evaluate, config.data, None, config.seed
            ),
            lambda model, name: judging.log_of(
                config, model.to_device(), task, None, here.mesh, name
            ),
            started.rows.retain_log,
        )
        others = distributed.of_first(lambda: beside(config, here.folder))
        return job.end(here, {**others, **judged.summary})


class Loaded(NamedTuple):
    """The rows of an evaluation, and the format of their prompts.

    Args:
        task: the rows that are asked.
        layout: the prompt format.
        retain_log: the log of a retain-only model, in the place of an oracle.
    """

    task: Task
    layout: Any
    retain_log: Any

    def digest(self) -> str:
        """sha256 of the rows and of those shown before every question."""
        return digest([self.task.digest(), self.layout.shots])


def check(config: EvaluateRun, mesh: Any) -> None:
    """Raise `UserError` for a damaged log of a run."""
    if config.retain_log is not None:
        files.check_key(config.retain_log)


def load(config: EvaluateRun) -> Loaded:
    """The rows, and the log of the reference.

    Raises:
        UserError: a file is unusable, or the log is about another number of rows.
    """
    layout = prompt_format(config.data)
    log = None if config.retain_log is None else load_log(config.retain_log)
    base_models.check_model(config.model)
    task = load_task(RunConfig(seed=config.seed, data=config.data))
    judging.check_rows(config.retain_log, log, task.evaluation)
    return Loaded(task, layout, log)


def model(config: EvaluateRun, loaded: Loaded, mesh: Any) -> Model:
    """The model to judge."""
    found = base_models.load_model(config.model, "none", mesh)
    if config.mask_all_pad_id_tokens:
        found = base_models.masking_pad_ids(found)
    return found._replace(tokenizer=found.tokenizer.formatted(loaded.layout))


def fit(config: EvaluateRun, loaded: Loaded, found: Model, mesh: Any) -> Fitted:
    """The rows that the model can read."""
    task = fitting.fit_task(loaded.task, found, config)
    words = f"{num_parameters(found.params) / 1e6:.1f} M parameters"
    return Fitted(task, words, task.notes, task.evaluators, subject(vars(config.data)))


def beside(config: EvaluateRun, root: Path) -> dict[str, Any]:
    """The metrics of the models before and without the facts, if a run has judged them alike.

    Their logs are copied into `root`, where the page reads them.
    """
    path = Path(config.model).parent
    try:
        known = tables.load_run(path)
    except UserError:
        return {}
    wanted = {name: to_json(config)[name] for name in ("data", "evaluate", "seed")}
    if any(known.config.get(name) != value for name, value in wanted.items()):
        return {}
    found = {}
    for name in (ROLES.start, ROLES.reference):
        log = path / "evals" / f"{name}.json"
        if name in known.summary and log.is_file() and not files.damaged(log):
            found[name] = known.summary[name]
            write_atomic(root / "evals" / f"{name}.json", log.read_text(encoding="utf-8"))
    return found


JOB = Job("train.evaluate", ROLES._replace(judged=MODEL), check, load, model, fit)
