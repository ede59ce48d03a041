"""How a stage is trained, beside its model, its objective and its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train.options.config import LengthConfig, LoraConfig, SelectConfig, TrainConfig
from train.options.optimizers import Options, check_steps


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained.

    Args:
        stage: steps, batches, micro-batches, checkpoints.
        optimizer: how a step is taken.
        combine: how the gradients of the two sides become one.
        adapters: low-rank adapters in the place of the parameters; None: all parameters.
        row_tokens: about how many tokens a row holds that short examples share; 0: none is shared.
        profile: folder for a trace of a few steps.
        select: leaves that are trained, by name and by block; None: all.
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
    """Optimizer steps of a stage.

    Raises:
        UserError: there is none, or the optimizer cannot take that many.
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
