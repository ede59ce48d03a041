"""What is refused before compute: settings that cannot work, and rows that do not fit a model."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlib_unlearn import objectives, options
from jaxlib_unlearn.errors import UserError
from models.decoder import lora, selection
from models.files.weights import DTYPES
from train.options import optimizers
from train.options.config import (
    LoraConfig,
    SelectConfig,
    TrainConfig,
    UnlearnConfig,
)
from train.options.optimizers import Options
from train.runtime import remote, sharding, suggest


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


def check_stage(
    stage: TrainConfig | UnlearnConfig, optimizer: Options, mesh: Mesh, what: str
) -> None:
    """Raise `UserError` for an unknown optimizer or work that does not divide over the mesh."""
    optimizers.check(optimizer)
    optimizers.over_rows(optimizer, stage.batch_size, f"the {what}")
    if optimizers.OPTIMIZERS[optimizer.name].sides:
        optimizers.check_mesh(optimizer, mesh, stage.batch_size, f"the {what}")
    sharding.check_batch(mesh, stage.batch_size, stage.accumulate, what)


def check_finetuning(stage: TrainConfig, mesh: Mesh) -> None:
    """As `check_stage`, and raise for an optimizer that needs a forget and a retain side."""
    check_stage(stage, stage.optimizer, mesh, "fine-tuning")
    nll = objectives.resolve("nll")
    optimizers.check_pair(stage.optimizer, "sum", *nll)


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

    `params` (arrays or shapes) are the model's; None: it has not been read yet.
    """
    if config.rank is None:
        odd = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        if odd:
            raise UserError(
                f"--lora.{odd[0].name} {getattr(config, odd[0].name)}: no adapters without "
                "--lora.rank; give it, or leave this out"
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

    `params` (arrays or shapes) are the model's; None: it is not read yet.
    """
    for name in ("leaves", "blocks"):
        if getattr(select, name) == ():
            raise UserError(f"--train.{name} is empty; leave it out for all")
    if params is None or not select.given:
        return
    chosen = selection.select(params, select.leaves, select.blocks)
    row = optimizers.OPTIMIZERS[optimizer.name]
    if row.check_runs is not None:
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
        config: of a program that has both.
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
