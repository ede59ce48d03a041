"""Erasing a concept from a text-to-image model: in closed form, or in steps of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder import selection
from models.diffusion.denoiser import UNET
from train.data import captions
from train.data.captions import Noun
from train.data.noisy_latents import NoisyLatents
from train.engine.run import Run, Work, compute, phase, train
from train.jobs import diffusion, job
from train.jobs.diffusing import drawing, editing, held, painters, prompts, stored, training
from train.jobs.diffusing.config import EraseRun
from train.jobs.diffusing.drawing import Wanted
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Shown
from train.jobs.job import Job, Started
from train.options import checks
from train.options.recipe import Recipe, num_steps
from train.options.roles import NONE, Roles
from train.tasks import erasure as methods
from train.tasks import pictures
from train.tasks.pictures import Pictures

OBJECTIVES = {"esd": "esd", "finetune": "redirect"}
RETAINED = 4096  # the most images of the other classes to train on


def run(config: EraseRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. The judge and the model that draws the concept.
        sees, original = models(started)
        # 2. Make the concept's prompts read as another one's.
        changed = erased(started, original)
        # 3. Judge the model before and after alike: the concept by its name and by others, and the
        #    other classes.
        kinds = ("explicit", "names", "kept")
        shown = {"original": (Shown(original), kinds), "erased": (Shown(changed), kinds)}
        concept = started.rows.class_of(config.erase.concept)
        summary = diffusion.judge(started, sees, shown, concept)
        # 4. Hand it back, and show.
        export(started, original, changed, sees)
        return job.end(started.run, summary)


def recipe_of(config: EraseRun) -> Recipe:
    """The recipe of a method that trains."""
    return Recipe(config.unlearn, config.optimizer, combine=config.combine, select=config.train)


def check(config: EraseRun, mesh: Any) -> None:
    """Raise `UserError` for impossible stages, or a run that cannot be continued."""
    if config.run is None:
        diffusion.check(config, mesh)
    else:
        stored.read_run(config.run, "RUN", ("train.diffuse",))
    if config.erase.name in OBJECTIVES:
        checks.check_recipe(recipe_of(config), objective_of(config), mesh, "unlearning")


def load(config: EraseRun) -> Pictures:
    """The images, which must contain the class to erase."""
    erase: Any = config.erase
    found = diffusion.read(config)
    noun = found.nouns[found.class_of(erase.concept)]
    if erase.towards.strip().lower() in noun.names:
        raise UserError(
            f"--erase.towards {erase.towards!r} is a name of {erase.concept!r}, which is erased; "
            "name something else, or leave it out for the empty prompt"
        )
    if config.run is None:
        diffusion.check_rows(config, found)
    if erase.name in OBJECTIVES:
        row, _ = objective_of(config)
        if "retain" in row.streams and found.train is None:
            raise UserError(
                f"--erase.retain {erase.retain} trains on images of the other classes, and there "
                "are none; give --data.path, or --erase.retain none"
            )
        num_steps(config.unlearn, erase.images, config.optimizer)
    return found


def objective_of(config: EraseRun) -> tuple[objectives.Objective, Any]:
    """The row by which a method is trained, and its options."""
    erase: Any = config.erase
    given = {"keep": erase.retain, "forget_weight": erase.forget_weight}
    given["retain_weight"] = erase.retain_weight
    if isinstance(erase, methods.ESD):
        given["guidance"] = erase.guidance
    return objectives.resolve(OBJECTIVES[erase.name], objectives.DENOISING, **given)


def model(config: EraseRun, found: Pictures, mesh: Any) -> diffusion.Loaded:
    """The judge and the original of the given run; without one, those of `--model.path`."""
    if config.run is None:
        return diffusion.model(config, found, mesh)
    source = stored.read_run(config.run, "RUN", ("train.diffuse",))
    painter = stored.painter_of(source, mesh)
    if config.erase.name in OBJECTIVES:
        checks.check_selection(config.train, config.optimizer, painter.params)
        check_unet(painter.params, config.train)
    return diffusion.Loaded(stored.judge_of(source, mesh), painter)


JOB = Job("train.erase", Roles("original", NONE, "erased"), check, load, model, diffusion.fit)


def models(started: Started) -> tuple[Judge, Painter]:
    """The judge and the original, from the given run or made here."""
    if started.config.run is None:
        return diffusion.models(started)
    return started.model.judge, started.model.painter


def erased(started: Started, original: Painter) -> Painter:
    """The model without the concept."""
    with phase(started.run, "erased"):
        if started.config.erase.name in OBJECTIVES:
            return trained(started, original).to_host()
        return editing.edited(started, original).to_host()


def draw_concept(
    work: Work, painter: Any, texts: Any, draw: Any, seed: int
) -> dict[str, jax.Array]:
    """Latents that a model draws for prompts."""
    wanted = Wanted(texts, list(range(len(texts))))
    found = drawing.drawn(
        painter, wanted, draw, work.mesh, seed=seed, label="draw the concept", decode=False
    )
    return {"latents": jnp.asarray(found)}


def concept_latents(
    run: Run, config: Any, painter: Painter, noun: Noun, count: int
) -> tuple[np.ndarray, list[str]]:
    """The original's images of a concept as latents, and their prompts."""
    texts = [captions.prompt(noun, 0, run.seed, "concept", i).text for i in range(count)]
    shape = painter.denoiser.model.unet.config.latent_shape
    like: Any = held.arrays(latents=(count, *shape))
    found = compute(
        run, "concept", draw_concept, kind="draw", version=1, like=like,
        painter=painter, texts=texts, draw=config.draw, seed=run.seed + 1,
    )  # fmt: skip
    return np.asarray(found.params["latents"]), texts


def trained(started: Started, original: Painter) -> Painter:
    """The model after training by an objective that erases."""
    here, config, found = started.run, started.config, started.rows
    erase = config.erase
    target = found.class_of(erase.concept)
    noun = found.nouns[target]
    row, options = objective_of(config)
    check_unet(original.params, config.train)
    latents, texts = concept_latents(here, config, original, noun, erase.images)
    other = [""] * len(texts)
    if erase.towards:
        named = noun._replace(names=(erase.towards,) * 4)
        other = [captions.prompt(named, 0, here.seed, "concept", i).text for i in range(len(texts))]

    def tokens(texts: Sequence[str]) -> np.ndarray:
        return prompts.encode(original.tokenizer, texts, original.length, "prompts").tokens

    columns = {"tokens": tokens(texts), "other_tokens": tokens(other)}
    streams = {"forget": NoisyLatents(latents, columns, original.schedule, here.seed, "forget")}
    if "retain" in row.streams:
        assert found.train is not None
        rest = np.flatnonzero(found.train.labels != target)[:RETAINED]
        said = pictures.captions_of(found, here.seed)
        pixels = np.asarray(found.train.images)[rest]
        kept = drawing.encoded(
            original.vae.to_device(), pixels, training.ENCODED, here.mesh, "encode images"
        )
        mine = {"tokens": tokens([said[i] for i in rest])}
        streams["retain"] = NoisyLatents(kept, mine, original.schedule, here.seed, "retain")
    start: Any = original.denoiser
    made: Any = train(here, "erased", start, (row, options), streams, recipe_of(config))
    return original._replace(denoiser=made)


def check_unet(params: Any, select: Any) -> None:
    """Raise `UserError` for leaves outside the denoiser."""
    chosen = selection.select(params, select.leaves, select.blocks)
    odd = [path for path in (*chosen.inner, *chosen.outer) if not path.startswith(UNET)]
    if odd:
        raise UserError(
            f"--train.leaves chooses {odd[0]} of the text encoder, which stays as it is; name "
            "leaves of the denoiser (attn2, or unet for all)"
        )


def export(started: Started, original: Painter, changed: Painter, sees: Judge) -> None:
    """Write `RUN/export`, and for attacks on it `RUN/original` and `RUN/judge`."""
    erase, config = started.config.erase, started.config
    what = f"A text-to-image model from which {erase.concept!r} was erased by {erase.name}."
    diffusion.export(started, changed, sees, what)
    if config.model.path == "scratch":
        before = "The model before."
        job.export(
            started.run,
            lambda to: painters.export_painter(original, to, "float32", before),
            "original",
        )
