"""Checks before compute: of settings that cannot work, and of models that do not fit a stage."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlib_unlearn import objectives, options
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective
from models.decoder import lora, selection
from models.files.weights import DTYPES
from models.learner import check_questions
from train.options import optimizers
from train.options.config import LoraConfig, SelectConfig
from train.options.optimizers import Options
from train.options.recipe import Recipe
from train.runtime import remote, reporters, sharding, suggest


def check_numbers(config: Any, prefix: str = "--") -> None:
    """Raise `UserError` for a value of a configuration (nested ones too) that its field excludes.

    An objective's options are only checked for NaN and overflow here; its row checks the ranges.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_numbers(value, name + ".")
        elif isinstance(config, objectives.Options):
            options.check_number(value, name)
        else:
            options.check_value(field, value, name)


def check_config(config: Any) -> None:
    """Raise `UserError` for wrong values of the options that programs share.

    Args:
        config: The configuration of a program with presets.
    """
    check_numbers(config)
    reporters.check(reporters.chosen(config.report_to, getattr(config, "tensorboard", False)))
    if getattr(config, "profile", None) is not None:
        check_writable("--profile", config.profile)
    check_places(config)


def check_recipe(
    recipe: Recipe, objective: tuple[Objective, Any], mesh: Mesh, what: str, main: bool = True
) -> None:
    """Raise `UserError` for parts of a stage that do not go together, on any model.

    Args:
        recipe: The recipe by which the stage is trained.
        objective: A row of the objectives and its complete options.
        mesh: The mesh of the devices.
        what: The name of the stage, for messages.
        main: True for the stage that the mesh is chosen for: an axis that its optimizer cannot use
            is refused. In other stages the devices along such an axis repeat the work.
    """
    stage, optimizer = recipe.stage, recipe.optimizer
    optimizers.check(optimizer)
    objectives.check_accumulation(objective[0], stage.accumulate)
    optimizers.check_pair(optimizer, recipe.combine, *objective)
    check_estimators(optimizer, *objective)
    if recipe.adapters is not None:
        check_lora(recipe.adapters, optimizer)
        refuse_both(recipe.adapters, recipe.select)
    if recipe.select is not None:
        check_selection(recipe.select, optimizer)
    if main or optimizers.OPTIMIZERS[optimizer.name].sides:
        optimizers.check_mesh(optimizer, mesh, stage.batch_size, f"the {what}")
    sharding.check_batch(mesh, stage.batch_size, stage.accumulate, what)


def check_estimators(optimizer: Options, row: Objective, options: Any) -> None:
    """Raise `UserError` for a row that estimates gradients under an optimizer that has none."""
    if row.estimators is None or optimizers.OPTIMIZERS[optimizer.name].needs != "value":
        return
    if sides := ", ".join(row.estimators(options)):
        raise UserError(
            f"optimizer {optimizer.name} sees values of the loss alone, and objective {row.name!r} "
            f"estimates the gradient of its side {sides}; choose an optimizer with gradients"
        )


def check_model(
    recipe: Recipe, objective: tuple[Objective, Any], learner: Any, params: Any = None
) -> None:
    """Raise `UserError` for a model that a stage cannot train.

    Args:
        recipe: The recipe by which the stage is trained.
        objective: A row of the objectives and its complete options.
        learner: The learner of the model.
        params: The parameters of the model, or their shapes; None: the shapes of the learner.
    """
    row, options = objective
    params = learner.shapes() if params is None else params
    if recipe.adapters is not None:
        check_lora(recipe.adapters, recipe.optimizer, params)
    if recipe.select is not None:
        check_selection(recipe.select, recipe.optimizer, params)
    check_blocks(recipe.optimizer, learner.sizes.get("blocks", 0))
    check_questions(learner, row, options, train_from(params, recipe.select))


def train_from(params: Any, select: SelectConfig | None) -> int:
    """The first block that a gradient has to reach."""
    if select is None or not select.given:
        return 0
    return selection.select(params, select.leaves, select.blocks).train_from


def check_dtype(option: str, value: str) -> None:
    """Raise `UserError` for a dtype that weights cannot be exported in."""
    suggest.check_choice(option, value, tuple(DTYPES))


def check_blocks(optimizer: Options, num_layers: int) -> None:
    """Raise `UserError` for a model whose blocks the optimizer cannot train."""
    check_row = optimizers.OPTIMIZERS[optimizer.name].check_blocks
    if check_row is not None:
        check_row(optimizer, num_layers)


def check_lora(config: LoraConfig, optimizer: Options, params: Any = None) -> None:
    """Raise `UserError` for adapters that an optimizer or a model cannot have.

    `params` are the arrays or shapes of the model; None: the model has not been read yet.
    """
    if config.rank is None:
        odd = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        if odd:
            raise UserError(
                f"--lora.{odd[0].name} {getattr(config, odd[0].name)}: there are no adapters "
                "without --lora.rank; give it, or leave this option out"
            )
        return
    check_row = optimizers.OPTIMIZERS[optimizer.name].check_rank
    if check_row is not None:
        check_row(config.rank)
    if not config.targets:
        raise UserError("--lora.targets is empty; leave it out for all projections of a block")
    if params is None:
        return
    known = lora.kernels(params)
    for name in config.targets:
        _, (fan_in, fan_out) = suggest.choose(name, known, "--lora.targets")
        if config.rank > min(fan_in, fan_out):
            raise UserError(
                f"--lora.rank {config.rank} is larger than {name}'s matrices of this model "
                f"({fan_in} in, {fan_out} out); use at most {min(fan_in, fan_out)}, or leave "
                f"{name} out of --lora.targets"
            )


def check_selection(select: SelectConfig, optimizer: Options, params: Any = None) -> None:
    """Raise `UserError` for leaves and blocks that a model does not have or an optimizer refuses.

    `params` are the arrays or shapes of the model; None: the model has not been read yet.
    """
    for name in ("leaves", "blocks"):
        if getattr(select, name) == ():
            raise UserError(f"--train.{name} is empty; leave it out for all")
    if params is None or not select.given:
        return
    chosen = selection.select(params, select.leaves, select.blocks)
    row = optimizers.OPTIMIZERS[optimizer.name]
    if row.check_runs is not None and chosen.runs:
        runs = [(run.first, run.last) for run in chosen.runs if run.trained]
        row.check_runs(optimizer, runs, chosen.runs[-1].last)
    if row.sides and not any(path.endswith("kernel") for path in chosen.inner):
        raise UserError(
            f"--train.leaves: {row.name} moves one layer of a stack at a time, and no kernel of a "
            "block is among the leaves; choose one, or another --optimizer.name"
        )


def check_writable(option: str, folder: Path) -> None:
    """Raise `UserError` unless a local folder exists or can be made, and is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {folder} cannot be written: {error.strerror}; give another folder"
        ) from None


def check_places(config: Any) -> None:
    """Raise `UserError` where `--output` or `--stage.cache` cannot be written.

    Args:
        config: The configuration of a program that has both options.
    """
    remote.check(config.stage.cache, "--stage.cache")
    remote.check(config.output, "--output")
    cache = config.stage.cache
    if cache is None or remote.is_remote(cache):
        return
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--stage.cache: {there} is not a folder; give a folder, or leave it out")
    if not os.access(there, os.W_OK):
        raise UserError(
            f"--stage.cache {cache}: {there} cannot be written to; give another folder, or leave "
            "it out"
        )


def refuse_both(adapters: LoraConfig, select: SelectConfig | None) -> None:
    """Raise `UserError` for adapters and chosen leaves in one stage."""
    if adapters.rank is not None and select is not None and select.given:
        raise UserError(
            "--train.leaves and --train.blocks choose among the model's own parameters, which "
            "--lora.rank leaves as they are; use --lora.targets, or leave --lora.rank out"
        )
