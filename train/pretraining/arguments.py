"""The configuration of a command line of train.pretrain: a preset or a file, and options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train import cli, optimizers, suggest
from train.config import replace
from train.data.corpus import OF_SOURCE, CorpusConfig
from train.optimizers import OPTIMIZERS
from train.presets.pretraining import PRESETS, Preset
from train.pretraining.config import PretrainConfig, num_steps


def read_arguments(
    argv: list[str], cls: type[PretrainConfig] = PretrainConfig, program: str = "train.pretrain"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `PretrainConfig`, those of another `program`.
    """
    if argv[0] == "--config":
        if len(argv) < 2:
            raise UserError("--config needs the config.json of a run")
        default = cli.read_config(PretrainConfig, Path(argv[1]))
        preset, rest = PRESETS.get(default.preset), argv[2:]
        prog, summary = f"{program} --config FILE", f"rerun the configuration {argv[1]}"
    elif argv[0].startswith("-"):
        raise UserError(f"the first argument is a preset ({', '.join(PRESETS)}), got {argv[0]!r}")
    else:
        preset = suggest.choose(argv[0], PRESETS, "preset")
        default, rest = preset.config, argv[1:]
        prog, summary = f"{program} {argv[0]}", preset.summary
    name = cli.option_value(rest, "--optimizer.name")
    if name is not None and name != default.optimizer.name:
        default = replace(default, optimizer=_optimizer(default, name, preset))
    default = replace(default, data=_corpus(default.data, rest))
    if "--smoke" in rest and preset is not None:
        default = replace(default, smoke=True, **{"data.digest": None}, **preset.smoke)
        fitted = optimizers.fitted(default.optimizer, num_steps(default))
        default = replace(default, optimizer=fitted)
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    return cli.parse(cls, cls(**fields), rest, prog, summary)


def _corpus(data: CorpusConfig, rest: list[str]) -> CorpusConfig:
    """A preset's or a stored run's corpus, without what the options of a command line replace."""
    asked = [
        n for n in (*OF_SOURCE, "source", "documents") if cli.option_value(rest, f"--data.{n}")
    ]
    if not asked:
        return data
    source = cli.option_value(rest, "--data.source") or data.source
    dropped = {"digest"} | {name for name, of in OF_SOURCE.items() if of != source}
    if {"source", "repository"} & {*asked}:
        dropped.add("revision")  # a commit of another data set
    fields = {f.name: f.default for f in dataclasses.fields(data)}
    return dataclasses.replace(data, **{name: fields[name] for name in dropped})


def _optimizer(config: PretrainConfig, name: str, preset: Preset | None) -> optimizers.Options:
    """Another optimizer: as tuned for the preset, else at its row's rate."""
    row = suggest.choose(name, OPTIMIZERS, "optimizer")
    if preset is not None and name in preset.optimizers:
        return preset.optimizers[name]
    found = optimizers.other(config.optimizer, name)
    return found if row.learning_rate is None else replace(found, learning_rate=row.learning_rate)
