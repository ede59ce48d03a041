"""Fine-tuning on questions and answers of a file: the job of `train.finetune MODEL ROWS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train.data.task import Row
from train.data.tofu import check_rows, read_json
from train.engine import base_models
from train.engine.exports import export_model
from train.engine.replays import stored
from train.evaluators.evaluation import Model, num_parameters
from train.jobs import job
from train.jobs.finetuning_options import FinetuneRun
from train.jobs.job import Fitted, Job
from train.jobs.unlearning_stages import finetune
from train.options import checks
from train.options.config import ModelConfig, RunConfig, replace
from train.options.recipe import num_steps, recipe_of
from train.options.roles import NONE, Roles
from train.runtime.stages import digest
from train.tasks import fitting
from train.tasks.task import prompt_format

STAGE = "original"


def run(config: FinetuneRun) -> Path:
    """Fine-tune, export and return the run folder."""
    with job.start(JOB, config) as started:
        here, rows = started.run, started.parts
        settings = settings_of(config)
        tuned = finetune(here, settings, STAGE, started.model, rows, record=stored.NAME)
        job.export(here, lambda folder: export_model(tuned, folder, config.export_dtype))
        return job.end(here, {STAGE: {"params_sha256": tuned.sha}}, shown=False)


class Loaded(NamedTuple):
    """The rows of a file."""

    rows: list[Row]

    def digest(self) -> str:
        """sha256 of the rows."""
        return digest(self.rows)


def settings_of(config: FinetuneRun) -> RunConfig:
    """The settings of the same stage in a run of train.unlearn."""
    settings = RunConfig(seed=config.seed, finetune=config.train)
    names = ("system_prompt", "max_length", "template", "template_date")
    return replace(settings, **{f"data.{name}": getattr(config, name) for name in names})


def check(config: FinetuneRun, mesh: Any) -> None:
    """Raise `UserError` for errors that are known before rows and model are read."""
    prompt_format(settings_of(config).data, "--")
    checks.check_recipe(recipe_of(config.train), objectives.resolve("nll"), mesh, "fine-tuning")


def load(config: FinetuneRun) -> Loaded:
    """The rows of the file."""
    path = Path(config.rows)
    if not path.is_file():
        raise UserError(
            f"rows file {path} does not exist; give a JSON file with question and answer"
        )
    return Loaded(check_rows(read_json(path), ("question", "answer"), str(path)))


def model(config: FinetuneRun, loaded: Loaded, mesh: Any) -> Model:
    """The model to start from."""
    base = base_models.load_model(config.model, ModelConfig().remat, mesh)
    layout = prompt_format(settings_of(config).data, "--")
    return base._replace(tokenizer=base.tokenizer.formatted(layout))


def fit(config: FinetuneRun, loaded: Loaded, base: Model, mesh: Any) -> Fitted:
    """The rows that the model can read."""
    checks.check_model(recipe_of(config.train), objectives.resolve("nll"), base.learner)
    rows = fitting.fit_rows(loaded.rows, base, config.system_prompt, config.max_length, "rows")
    num_steps(config.train, len(rows), config.train.optimizer)
    return Fitted(rows, f"{num_parameters(base.params) / 1e6:.1f} M parameters", [], [])


JOB = Job("train.finetune", Roles("base", NONE, STAGE), check, load, model, fit)
