"""The step of a pre-training run as shapes, which a plan compiles without corpus or devices."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlib_unlearn import objectives
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder
from train.data.token_file import Tokens
from train.data.token_rows import TokenRows
from train.engine.trainable import trainable_of
from train.jobs.pretraining_options import PretrainConfig, batch_rows, num_steps, recipe_of
from train.options import checks, optimizers
from train.planning.programs import (
    AbstractProgram,
    param_shapes,
    shapes_of,
    step_program,
    update_of,
)
from train.runtime import sharding


def pretraining_program(config: PretrainConfig, decoder: Decoder, mesh: Mesh) -> AbstractProgram:
    """One step, accumulated as the run accumulates it.

    Raises:
        UserError: the batch does not divide over the mesh, or an optimizer that cannot take it.
    """
    rows, parts = batch_rows(config, sharding.batch_ways(mesh))
    recipe, learner = recipe_of(config, sharding.batch_ways(mesh)), DecoderLearner(decoder)
    objective, options = objectives.resolve("nll")
    checks.check_recipe(recipe, (objective, options), mesh, "training")
    checks.check_model(recipe, (objective, options), learner)
    context = config.data.context
    stream = TokenRows(Tokens(np.zeros(1, np.uint16), np.zeros(1, np.int64), ""), context)
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    return step_program(
        learner,
        (objective, options),
        optimizers.over_rows(config.optimizer, rows),
        trainable_of(param_shapes(decoder, mesh), objective),
        {"train": shapes_of(stream, rows, mesh)},
        mesh,
        f"a step of {rows} rows of {context} tokens ({rows * context} tokens){micro}",
        accumulate=parts,
        steps=num_steps(config),
    )


def pretraining_update(
    config: PretrainConfig, decoder: Decoder, mesh: Mesh
) -> tuple[Any, tuple] | None:
    """The optimizer's update alone and its shapes, as `programs.update_program`."""
    rows, _ = batch_rows(config, sharding.batch_ways(mesh))
    optimizer = optimizers.over_rows(config.optimizer, rows)
    return update_of(optimizer, "sum", param_shapes(decoder, mesh), mesh)
