"""The configuration of a command line of train.unlearn: a preset or a file, and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlib_unlearn import objectives
from train.options import cli, start
from train.options.config import RunConfig, replace
from train.presets import PRESETS

# Options that replace the rows of a preset.
OTHER_DATA = ("--data.forget", "--data.retain", "--data.path", "--data.source")
# Fields of objectives that are tuned for one model and mean little to another.
OF_ONE_MODEL = ("layer", "block", "layers", "temperature")


def read_arguments(
    argv: list[str], cls: type[RunConfig] = RunConfig, program: str = "train.unlearn"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `RunConfig`, those of another `program`.
    """
    preset, default, rest, prog, summary = start.start_of(argv, RunConfig, PRESETS, program)
    name = cli.option_value(rest, "--objective.name")
    if name is not None and name != default.objective.name:
        # Options tuned for one objective mean nothing to another.
        objective, _ = objectives.resolve(name)
        suited = preset.OBJECTIVES if preset is not None else {}
        default = replace(
            default,
            objective=suited.get(objective.name, objectives.options_of(objective.name)),
        )
    elif name is None:
        default = replace(default, objective=_suited(rest, preset, default.objective))
    default = start.with_optimizer(default, rest, preset)
    other = any(cli.option_value(rest, m) for m in ("--model.path", "--stage.original"))
    bound = any(hasattr(default.objective, field) for field in OF_ONE_MODEL)
    if other and bound and preset is not None and default.objective in preset.OBJECTIVES.values():
        default = replace(default, objective=objectives.options_of(default.objective.name))
    default = start.shortened(default, rest, preset, lambda config: config.unlearn.steps or 1)
    return cli.parse(cls, default, rest, prog, summary)


def _suited(argv: Sequence[str], preset: Any, objective: Any) -> Any:
    """The objective of a preset for what the command line puts in the place of its model or rows.

    From a given original no other answers can be sampled, and other rows may lack columns.
    """
    if cli.option_value(argv, "--stage.original") and hasattr(preset, "ORIGINAL"):
        return preset.ORIGINAL
    if any(cli.option_value(argv, option) for option in OTHER_DATA):
        return getattr(preset, "OTHER_DATA", objective)
    return objective
