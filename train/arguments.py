"""The configuration of a command line: a preset or a file, overridden by options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train import cli, optimizers, suggest
from train.config import RunConfig, replace
from train.optimizers import OPTIMIZERS
from train.presets import PRESETS

# Options that replace the rows of a preset.
OTHER_DATA = ("--data.forget", "--data.retain", "--data.path", "--data.source")
# Fields of objectives that are tuned for one model and mean little to another.
OF_ONE_MODEL = ("layer", "layers", "temperature")


def read_arguments(
    argv: list[str], cls: type[RunConfig] = RunConfig, program: str = "train.unlearn"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `RunConfig`, those of another `program`.
    """
    if argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs the config.json of a run")
        default = cli.read_config(RunConfig, Path(argv[1]))
        preset, rest = PRESETS.get(default.preset), argv[2:]
        prog, summary = f"{program} --config FILE", f"rerun the configuration {argv[1]}"
    elif argv[0].startswith("-"):
        raise UserError(f"the first argument is a preset ({', '.join(PRESETS)}), got {argv[0]!r}")
    else:
        preset = suggest.choose(argv[0], PRESETS, "preset")
        default, rest = preset.PRESET, argv[1:]
        prog, summary = f"{program} {argv[0]}", preset.SUMMARY
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
    name = cli.option_value(rest, "--optimizer.name")
    if name is not None and name != default.optimizer.name:
        default = with_optimizer(default, name, preset)
    other = any(cli.option_value(rest, m) for m in ("--model.path", "--stage.original"))
    bound = any(hasattr(default.objective, field) for field in OF_ONE_MODEL)
    if other and bound and preset is not None and default.objective in preset.OBJECTIVES.values():
        default = replace(default, objective=objectives.options_of(default.objective.name))
    if "--smoke" in rest and preset is not None:
        default = replace(default, smoke=True, **preset.SMOKE)
        fitted = optimizers.fitted(default.optimizer, default.unlearn.steps or 1)
        default = replace(default, optimizer=fitted)
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    return cli.parse(cls, cls(**fields), rest, prog, summary)


def _suited(argv: list[str], preset: Any, objective: Any) -> Any:
    """The objective of a preset for what the command line puts in the place of its model or rows.

    From a given original no other answers can be sampled, and other rows may lack columns.
    """
    if cli.option_value(argv, "--stage.original") and hasattr(preset, "ORIGINAL"):
        return preset.ORIGINAL
    if any(cli.option_value(argv, option) for option in OTHER_DATA):
        return getattr(preset, "OTHER_DATA", objective)
    return objective


def with_optimizer(config: Any, name: str, preset: Any) -> Any:
    """The configuration with another optimizer: as tuned for the preset, else at its row's rate."""
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    optimizer, changes = getattr(preset, "OPTIMIZERS", {}).get(row.name, (None, {}))
    if optimizer is None:
        optimizer = optimizers.other(config.optimizer, row.name)
        if row.learning_rate is not None:
            optimizer = replace(optimizer, learning_rate=row.learning_rate)
    return replace(config, optimizer=optimizer, **changes)
