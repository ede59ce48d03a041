"""The job of train.diffuse: a small Stable Diffusion is trained, or read, and judged.

The jobs that continue from it (`diffusing/erasing.py`, `attacking.py`, `defending.py`) begin and
end with the same functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train.data import captions
from train.jobs import job
from train.jobs.diffusing import held, judges, judging, painters, training
from train.jobs.diffusing.config import ConceptRun, DiffuseRun
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Asked, Shown
from train.jobs.diffusing.training import ORIGINAL, tokenizer_of
from train.jobs.job import Fitted, Job, Started
from train.options import checks
from train.options.config import TrainConfig
from train.options.recipe import num_steps, recipe_of
from train.options.roles import NONE, Roles
from train.tasks import pictures
from train.tasks.pictures import Pictures


def run(config: DiffuseRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. A judge of images, then autoencoder, text encoder and denoiser.
        sees, original = models(started)

        # 2. Judge whether it draws what its prompts say.
        summary = judge(started, sees, {ORIGINAL: (Shown(original), ("kept",))}, concept=None)

        # 3. Hand it back, and show.
        export(started, original, sees, "A text-to-image model of jaxlib-unlearn.")
        return job.end(started.run, summary)


class Loaded(NamedTuple):
    """The models that are given; None for those that the run trains."""

    judge: Judge | None
    painter: Painter | None

    def to_host(self) -> Loaded:
        """The same record with its models in host memory."""
        return self


def made_here(config: Any) -> list[tuple[str, tuple[Any, Any]]]:
    """The stages that a run trains, each with its objective."""
    rows = []
    if config.judge.path == "scratch":
        rows += [("classifier", objectives.resolve("classes", objectives.LEARNING))]
    if config.model.path == "scratch":
        rows += [("vae", objectives.resolve("autoencode", objectives.LEARNING))]
        rows += [(ORIGINAL, objectives.resolve("denoise", objectives.DENOISING))]
    return rows


def check(config: DiffuseRun, mesh: Any) -> None:
    """Raise `UserError` for impossible stages."""
    for name, row in made_here(config):
        checks.check_recipe(recipe_of(getattr(config, name)), row, mesh, name, main=False)


def read(config: ConceptRun) -> Pictures:
    """The images, and the classes in words."""
    return pictures.load(config.data, multiple_of(config))


def load(config: DiffuseRun) -> Pictures:
    """The images, on which the stages can be trained."""
    found = read(config)
    check_rows(config, found)
    return found


def multiple_of(config: Any) -> int:
    """The number that divides the sides of images that all levels can halve."""
    m = config.model
    if m.path != "scratch":
        return 1
    return 2 ** max(len(m.vae_channels) + len(m.unet_channels) - 2, len(config.judge.channels))


def check_rows(config: DiffuseRun, found: Pictures) -> None:
    """Raise `UserError` for images that the stages cannot be trained on, or sizes that do not fit.

    Raises:
        UserError: there are no or too few images to train on, or the sizes do not go together.
    """
    rows = made_here(config)
    if found.train is None:
        if rows:
            raise UserError(
                f"--data.source {config.data.source} has no images of its own, which the "
                f"{rows[0][0]} would be trained on; give --data.path with a folder of images for "
                f"each class ({', '.join(found.names)}), or --model.path and --judge.path"
            )
        return
    for name, _ in rows:
        stage: TrainConfig = getattr(config, name)
        num_steps(stage, len(found.train.labels), stage.optimizer)
    with models_fit():
        held.new_judge(config, found.shape, len(found.nouns))
        if config.model.path == "scratch":
            vae = held.new_vae(config, found.shape)
            held.new_denoiser(config, vae.model.config, tokenizer_of(found).largest_id + 1)
    if config.model.path != "scratch":
        return
    # A template, three attributes, a quality, an article, a name of two words, a place of three.
    longest = max(len(t.format("").split()) for t in captions.TEMPLATES) + 10
    if config.model.length < longest + 2:
        raise UserError(
            f"--model.length {config.model.length}: captions have up to {longest} words; give at "
            f"least {longest + 2}"
        )


@contextlib.contextmanager
def models_fit() -> Iterator[None]:
    """Raise `UserError` for sizes that do not go together."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--model.* and --judge.*: {error}; choose other sizes") from None


def model(config: ConceptRun, found: Pictures, mesh: Any) -> Loaded:
    """The models at `--judge.path` and `--model.path`.

    Raises:
        UserError: they cannot be read, or are for other images than those of the data.
    """
    judge = None
    if config.judge.path != "scratch":
        judge = judges.given(config.judge.path, found.names, mesh)
    path = config.model.path
    if path == "scratch":
        return Loaded(judge, None)
    painter = painters.given(path, config, mesh)
    shape = painter.vae.model.config.image_shape
    if found.train is not None and found.shape != shape:
        raise UserError(
            f"--model.path {path} draws images of {shape[0]} x {shape[1]} x {shape[2]}, those of "
            f"{found.place} are {' x '.join(map(str, found.shape))}; bring them to that size"
        )
    return Loaded(judge, painter)


def fit(config: ConceptRun, found: Pictures, loaded: Any, mesh: Any) -> Fitted:
    """The size of the run in words."""
    return Fitted(None, found.place, [f"Images: {found.place}."], ["concept"])


JOB = Job("train.diffuse", Roles(ORIGINAL, NONE, ORIGINAL), check, load, model, fit)


def models(started: Started) -> tuple[Judge, Painter]:
    """The judge and the original, trained or given."""
    sees = training.classifier(started)
    if started.model.painter is not None:
        return sees, started.model.painter
    return sees, training.original(started, training.autoencoder(started))


def judge(
    started: Started,
    sees: Judge,
    models: Mapping[str, tuple[Shown, Sequence[str]]],
    concept: int | None,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """The metrics of every model, by its name; per-image logs go to `evals/`.

    Args:
        started: the run.
        sees: the classifier.
        models: the models by name, each with its kinds of prompts.
        concept: the number of the class that was erased; None: none was.
        known: other run folders that may hold the same images.
    """
    here, config, found = started.run, started.config, started.rows
    asked = Asked(here, sees, found, concept, config.draw, config.seed, tuple(known))
    judged = job.judge(
        here,
        {name: shown for name, (shown, _) in models.items()},
        lambda shown, name: judging.inputs_of(asked, shown, models[name][1]),
        lambda shown, name: judging.log_of(asked, shown, models[name][1], name),
    )
    if found.test is not None:
        right = training.judge_accuracy(started, sees)
        for metrics in judged.summary.values():
            metrics["judge_accuracy"] = right
    return judged.summary


def export(started: Started, painter: Painter, sees: Judge, what: str) -> None:
    """Write the model to `RUN/export`, and the classifier that judged it to `RUN/judge`."""
    dtype = started.config.export_dtype
    job.export(started.run, lambda to: painters.export_painter(painter, to, dtype, what))
    if started.config.judge.path == "scratch":
        job.export(started.run, lambda to: judges.store(sees, to), "judge")
