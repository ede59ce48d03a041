"""The configuration of a command line of train.pretrain: a preset or a file, and options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from train.data.corpus import OF_SOURCE, CorpusConfig
from train.jobs.pretraining.config import PretrainConfig, num_steps
from train.options import cli, start
from train.options.config import replace
from train.presets.pretraining import PRESETS


def read_arguments(
    argv: list[str], cls: type[PretrainConfig] = PretrainConfig, program: str = "train.pretrain"
) -> Any:
    """The configuration of a command line: a preset, or `--config FILE`, with overrides.

    `cls` may have more options than `PretrainConfig`, those of another `program`.
    """
    preset, default, rest, prog, summary = start.start_of(argv, PretrainConfig, PRESETS, program)
    default = start.with_optimizer(default, rest, preset)
    default = replace(default, data=_corpus(default.data, rest))
    no_digest = {"data.digest": None}
    default = start.shortened(default, rest, preset, num_steps, **no_digest)
    return cli.parse(cls, default, rest, prog, summary)


def _corpus(data: CorpusConfig, rest: Sequence[str]) -> CorpusConfig:
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
