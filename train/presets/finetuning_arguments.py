"""The configuration of a command line of train.finetune: a preset or a file, and options."""

from __future__ import annotations

from typing import Any

from train.jobs.finetuning.config import CondenseConfig, ReasoningRun
from train.options import cli, start
from train.options.config import replace
from train.presets.epic import PRESETS


def read_arguments(
    argv: list[str], cls: type[ReasoningRun] = ReasoningRun, program: str = "train.finetune"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `ReasoningRun`, those of another `program`.
    """
    started = start.start_of(argv, ReasoningRun, PRESETS, program)
    preset, default, rest, prog, summary = started
    source = cli.option_value(rest, "--data.source")
    if source is not None and source != default.data.source:
        # A file or a commit of other rows, and what a thought of them is.
        usual = {"data.path": None, "data.revision": None, "condense.mode": CondenseConfig().mode}
        default = replace(default, **usual)
    default = start.with_optimizer(default, rest, preset)
    default = start.shortened(default, rest, preset, lambda c: c.train.steps or 1)
    return cli.parse(cls, default, rest, prog, summary)
