"""The configuration of a command line of train.finetune: a preset or a file, and options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from train import cli, optimizers
from train.config import replace
from train.finetuning.config import ReasoningRun
from train.presets.epic import PRESETS


def read_arguments(argv: list[str]) -> ReasoningRun:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides."""
    if argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs the config.json of a run")
        default = cli.read_config(ReasoningRun, Path(argv[1]))
        preset, rest = PRESETS.get(default.preset), argv[2:]
        where, summary = "--config FILE", f"rerun the configuration {argv[1]}"
    else:
        preset, rest = PRESETS[argv[0]], argv[1:]
        default, where, summary = preset.config, argv[0], preset.summary
    source = cli.option_value(rest, "--data.source")
    if source is not None and source != default.data.source:
        # A file or a commit of other rows.
        default = replace(default, **{"data.path": None, "data.revision": None})
    if "--smoke" in rest and preset is not None:
        default = replace(default, smoke=True, **preset.smoke)
        short = optimizers.fitted(default.train.optimizer, default.train.steps or 1)
        default = replace(default, train=dataclasses.replace(default.train, optimizer=short))
    return cli.parse(ReasoningRun, default, rest, f"train.finetune {where}", summary)
