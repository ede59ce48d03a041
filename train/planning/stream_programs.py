"""The steps of train.finetune and train.classify as shapes: compiled without rows or weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder
from models.files.architectures import config_of
from train.data.examples import Example
from train.data.packed_rows import pack_rows
from train.engine.base_models import scratch_shape
from train.engine.trainable import Trainable, trainable_of
from train.jobs.classification_options import TASKS, ClassifyRun
from train.jobs.classification_options import recipe_of as classification_recipe
from train.jobs.finetuning_options import ReasoningRun, stretched
from train.options import checks, optimizers
from train.options.recipe import Recipe
from train.planning.programs import (
    AbstractProgram,
    laid_out,
    param_shapes,
    shapes_of,
    step_program,
    update_of,
)

# Fine-tuning on traces


def finetuned_decoder(config: ReasoningRun) -> Decoder:
    """The decoder of a fine-tuning run, without its weights.

    Raises:
        UserError: the shapes of the model are not known, or it has learned positions.
    """
    m = config.model
    context = m.context or config.data.row_tokens
    shape = scratch_shape(m, m.vocab_size, context) if m.path == "scratch" else config_of(m.path)
    return Decoder(dataclasses.replace(stretched(shape, m), dtype=m.dtype), m.remat)


def finetuning_program(config: ReasoningRun, decoder: Decoder, mesh: Mesh) -> AbstractProgram:
    """One step on packed rows, all of whose slots are labels.

    Raises:
        UserError: the batch does not divide over the mesh, or an optimizer that cannot take it.
    """
    rows, length = config.train.batch_size, config.data.row_tokens
    objective, options = objectives.resolve("nll")
    recipe, learner = Recipe(config.train, config.optimizer), DecoderLearner(decoder)
    checks.check_recipe(recipe, (objective, options), mesh, "training")
    checks.check_model(recipe, (objective, options), learner)
    stream = pack_rows([Example([0] * (length + 1), 0)], length)
    return step_program(
        learner,
        (objective, options),
        optimizers.over_rows(config.optimizer, rows),
        trainable_of(param_shapes(decoder, mesh), objective),
        {"train": shapes_of(stream, rows, mesh)},
        mesh,
        f"a step of {rows} rows of {length} tokens ({rows * length} tokens)",
        accumulate=config.train.accumulate,
    )


def finetuning_update(
    config: ReasoningRun, decoder: Decoder, mesh: Mesh
) -> tuple[Any, tuple] | None:
    """The optimizer's update alone and its shapes, as `programs.update_program`."""
    optimizer = optimizers.over_rows(config.optimizer, config.train.batch_size)
    return update_of(optimizer, "sum", param_shapes(decoder, mesh), mesh)


# Classification in words


def check_planned(config: ClassifyRun) -> None:
    """Raise `UserError` for a task of a kind that is not planned."""
    if TASKS[config.task].kind.like is None:
        planned = [name for name, task in TASKS.items() if task.kind.like is not None]
        raise UserError(
            f"--task {config.task} is not planned; train.plan knows {', '.join(planned)}"
        )


def classified_decoder(config: ClassifyRun) -> Decoder:
    """The language model of a classification run, without its weights.

    Raises:
        UserError: its shapes are not known.
    """
    shape = config_of(config.model.path)
    return Decoder(dataclasses.replace(shape, dtype=config.model.dtype), config.model.remat)


def classification_program(
    config: ClassifyRun, decoder: Decoder, mesh: Mesh, length: int, options: int
) -> AbstractProgram:
    """One step on prompts of `length` tokens with one of `options` labels.

    Raises:
        UserError: the batch does not divide over the mesh, or an optimizer that cannot take it.
    """
    rows, kind = config.train.batch_size, TASKS[config.task].kind
    assert kind.like is not None  # `check_planned`
    objective = objectives.resolve(kind.objective, objectives.LEARNING)
    recipe, learner = classification_recipe(config, 1), DecoderLearner(decoder)
    checks.check_recipe(recipe, objective, mesh, "training")
    checks.check_model(recipe, objective, learner)
    words = f" of {options} options" if kind.objective == "choice" else ""
    return step_program(
        learner,
        objective,
        optimizers.over_rows(config.optimizer, rows),
        classified_part(config, decoder, mesh),
        {"train": shapes_of(kind.like(length, options), rows, mesh)},
        mesh,
        f"a step of {rows} rows of {length} tokens{words} ({rows * length} tokens)",
        accumulate=config.train.accumulate,
    )


def classified_part(config: ClassifyRun, decoder: Decoder, mesh: Mesh) -> Trainable:
    """The trainable part of a classification run, as shapes laid out on the mesh."""
    params = param_shapes(decoder, mesh)
    objective, _ = objectives.resolve(TASKS[config.task].kind.objective, objectives.LEARNING)
    return laid_out(trainable_of(params, objective, config.lora, dtype=decoder.config.dtype), mesh)


def classification_update(
    config: ClassifyRun, decoder: Decoder, mesh: Mesh
) -> tuple[Any, tuple] | None:
    """The optimizer's update alone and its shapes, as `programs.update_program`."""
    optimizer = optimizers.over_rows(config.optimizer, config.train.batch_size)
    return update_of(optimizer, "sum", classified_part(config, decoder, mesh).start, mesh)
