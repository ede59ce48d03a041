"""The start of a configuration: a preset, or the configuration of another run.

Every program with presets reads its first argument here. A preset is a module, or a record, with
`PRESET` (a configuration), `SUMMARY` (a line about it) and `SMOKE` (the changes of `--smoke`). It
may have `OPTIMIZERS`: optimizers tuned for it, by name, each with the other options it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.options import cli, config_files, optimizers
from train.options.config import replace
from train.options.optimizers import OPTIMIZERS
from train.runtime import suggest


class Start(NamedTuple):
    """The configuration that a command line overrides, and the rest of the command line.

    Args:
        preset: The preset that the command line names, or that its file came from; None: a file
            without a preset.
        config: The configuration to start from.
        rest: The other arguments.
        prog: The program with its first argument, for messages.
        summary: A line about the preset or the file.
    """

    preset: Any
    config: Any
    rest: Sequence[str]
    prog: str
    summary: str


def start_of(argv: Sequence[str], cls: type, presets: Mapping[str, Any], program: str) -> Start:
    """The preset or the file that a command line starts with.

    Args:
        argv: The command line: `PRESET ...`, or `--config FILE ...`.
        cls: The dataclass of the configuration that a file holds.
        presets: The presets by name.
        program: The name of the program, such as `train.unlearn`.

    Raises:
        UserError: no preset or file is given, the name is unknown, or the file cannot be read.
    """
    first, rest = argv[0], argv[1:]
    if first == "--config":
        if not rest:
            raise UserError("--config needs the config.json of a run or a YAML file")
        config = config_files.read_config(cls, Path(rest[0]), presets)
        summary = f"rerun the configuration {rest[0]}"
        return Start(
            presets.get(config.preset), config, rest[1:], f"{program} --config FILE", summary
        )
    if first.startswith("-"):
        raise UserError(f"the first argument is a preset ({', '.join(presets)}), got {first!r}")
    preset = suggest.choose(first, presets, "preset")
    return Start(preset, preset.PRESET, rest, f"{program} {first}", preset.SUMMARY)


def with_optimizer(config: Any, rest: Sequence[str], preset: Any) -> Any:
    """The configuration with the optimizer that the command line names, if it names another one."""
    name = cli.option_value(rest, "--optimizer.name")
    if name is None or name == config.optimizer.name:
        return config
    return tuned(config, name, preset)


def tuned(config: Any, name: str, preset: Any) -> Any:
    """The configuration with another optimizer, as tuned for the preset, else at its row's rate."""
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    optimizer, changes = getattr(preset, "OPTIMIZERS", {}).get(row.name, (None, {}))
    if optimizer is None:
        optimizer = optimizers.other(config.optimizer, row.name)
        if row.learning_rate is not None:
            optimizer = replace(optimizer, learning_rate=row.learning_rate)
    return replace(config, optimizer=optimizer, **changes)


def shortened(
    config: Any, rest: Sequence[str], preset: Any, steps: Callable[[Any], int], **more: Any
) -> Any:
    """The configuration with the changes of `--smoke`, if the command line says `--smoke`.

    Args:
        config: The configuration.
        rest: The command line.
        preset: The preset with the changes in `SMOKE`; None: nothing changes.
        steps: A function `steps(config)` that returns the number of steps of the shortened run,
            which the optimizer's periods must fit.
        more: Further changes, made after those of the preset.
    """
    if "--smoke" not in rest or preset is None:
        return config
    config = replace(config, smoke=True, **{**preset.SMOKE, **more})
    if not hasattr(config, "optimizer"):
        return config
    return replace(config, optimizer=optimizers.fitted(config.optimizer, steps(config)))


def show_presets(words: str | None, presets: Mapping[str, Any]) -> None:
    """Print a program's description, and its presets with a line about each."""
    print(words)
    print("Presets:")
    width = max(map(len, presets))
    for name, preset in presets.items():
        print(f"  {name:{width}}  {preset.SUMMARY}")
