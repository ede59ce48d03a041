"""The configuration of a command line of train.classify: a preset or a file, and options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.jobs.classification.config import ClassifyRun
from train.options import cli, start
from train.presets.classify import PRESETS


def read_arguments(
    argv: list[str], cls: type[ClassifyRun] = ClassifyRun, program: str = "train.classify"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `ClassifyRun`, those of another `program`.
    """
    started = start.start_of(argv, ClassifyRun, PRESETS, program)
    preset, default, rest, prog, summary = started
    default = start.with_optimizer(default, rest, preset)
    whole = default
    default = start.shortened(default, rest, preset, lambda c: c.train.forwards // 6 * 2)
    if (cli.option_value(rest, "--model.path") or default.model.path) != "scratch":
        default = replace(default, start=whole.start)  # the run trains no model to start from
    return cli.parse(cls, default, rest, prog, summary)


def check_start(config: ClassifyRun) -> None:
    """Raise `UserError` where a preset starts from the model of another run, which is not there."""
    preset, path = PRESETS.get(config.preset), config.model.path
    made_by = getattr(preset, "MADE_BY", None)
    if preset is None or made_by is None or path != preset.PRESET.model.path:
        return
    if not Path(path).exists():
        raise UserError(
            f"--model.path {path} does not exist; run `{made_by}`, which writes it, or give "
            "the folder of another model"
        )
