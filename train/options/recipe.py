"""The recipe of a stage: its training without the model, the objective and the rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train.options.config import LengthConfig, LoraConfig, SelectConfig, TrainConfig
from train.options.optimizers import Options, check_steps


@dataclass(frozen=True)
class Recipe:
    """The settings by which a stage is trained.

    Args:
        stage: The steps, batches, micro-batches and checkpoints of the stage.
        optimizer: The optimizer's options.
        combine: The name of the function that makes one gradient of the two sides' gradients.
        adapters: The low-rank adapters that are trained in place of the parameters; None: all
            parameters.
        row_tokens: The approximate number of tokens of a row that short examples share; 0: no row
            is shared.
        profile: The folder for a trace of a few steps.
        select: The leaves that are trained, by name and by block; None: all leaves.
    """

    stage: LengthConfig
    optimizer: Options
    combine: str = "sum"
    adapters: LoraConfig | None = None
    row_tokens: int = 0
    profile: Path | None = None
    select: SelectConfig | None = None


def recipe_of(stage: TrainConfig, row_tokens: int = 0) -> Recipe:
    """The recipe of a stage that brings its own optimizer."""
    return Recipe(stage, stage.optimizer, row_tokens=row_tokens)


def num_steps(config: LengthConfig, rows: int, optimizer: Options) -> int:
    """The number of optimizer steps of a stage.

    Raises:
        UserError: there is no step, or the optimizer cannot take that many.
    """
    steps = (
        config.steps
        if config.steps is not None
        else round(config.epochs * rows / config.batch_size)
    )
    if steps < 1:
        raise UserError(f"a stage of {rows} rows has no step; raise its epochs or steps")
    check_steps(optimizer, steps)
    return steps
