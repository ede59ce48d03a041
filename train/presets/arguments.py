"""The configurations of command lines: a preset, a file or a run, and the options behind it.

`READERS` has a row for each program with presets: what the options of a command line replace
beside themselves. `command` is the way back, from a configuration to its command line.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from train.data.corpus import OF_SOURCE
from train.jobs.classification_options import ClassifyRun
from train.jobs.diffusing.config import AttackRun, DefendRun, DiffuseRun, EraseRun
from train.jobs.finetuning_options import CondenseConfig, ReasoningRun
from train.jobs.pretraining_options import PretrainConfig, num_steps
from train.options import cli, config_files, start
from train.options.config import RunConfig, identity, replace
from train.presets import PRESETS, classify, diffuse, epic, pretraining
from train.presets.run_arguments import SPELLED, of_erasing, of_run, short


class Reader(NamedTuple):
    """A program and the reading of its command lines.

    Args:
        config: its configuration.
        presets: the presets by name.
        adjust: `adjust(config, rest, preset)`: the configuration for what the options `rest` of a
            command line put in the place of its model, its rows or its objective.
        steps: `steps(config)`: the length of a shortened run, to which the optimizer is fitted.
        more: `more(config, rest)`: what `--smoke` changes beside the preset's own changes.
        start: `start(argv, config, presets, program)`: what the first arguments name.
        last: `last(config, rest, fresh)`: the configuration with its method; `fresh`: it is not
            that of a stored run, whose method is as it was.
        spelled: short names of options.
    """

    config: type
    presets: Mapping[str, Any]
    adjust: Callable[[Any, Sequence[str], Any], Any] = lambda config, rest, preset: config
    steps: Callable[[Any], int] = lambda config: 1
    more: Callable[[Any, Sequence[str]], Mapping[str, Any]] = lambda config, rest: {}
    start: Callable[..., start.Start] = start.start_of
    last: Callable[[Any, Sequence[str], bool], Any] = lambda config, rest, fresh: config
    spelled: Mapping[str, str] = {}


# Options that replace the rows of a preset.
OTHER_DATA = ("--data.forget", "--data.retain", "--data.path", "--data.source")
# Fields of objectives that are tuned for one model and mean little to another.
OF_ONE_MODEL = ("layer", "block", "layers", "temperature")


def unlearning(config: RunConfig, rest: Sequence[str], preset: Any) -> RunConfig:
    """The configuration with the objective that is tuned for its preset, model and rows."""
    name = cli.option_value(rest, "--objective.name")
    suited = {} if preset is None else preset.OBJECTIVES
    if name is not None and name != config.objective.name:
        # Options tuned for one objective mean nothing to another.
        row, _ = objectives.resolve(name)
        chosen = suited.get(row.name, objectives.options_of(row.name))
    elif name is not None:
        chosen = config.objective
    elif cli.option_value(rest, "--stage.original") and hasattr(preset, "ORIGINAL"):
        # From a given original no other answers can be sampled.
        chosen = getattr(preset, "ORIGINAL", config.objective)
    elif any(cli.option_value(rest, option) for option in OTHER_DATA):
        chosen = getattr(preset, "OTHER_DATA", config.objective)  # they may lack columns
    else:
        chosen = config.objective
    other = any(cli.option_value(rest, m) for m in ("--model.path", "--stage.original"))
    if other and any(hasattr(chosen, f) for f in OF_ONE_MODEL) and chosen in suited.values():
        chosen = objectives.options_of(chosen.name)
    return replace(config, objective=chosen)


def pretrained(config: PretrainConfig, rest: Sequence[str], preset: Any) -> PretrainConfig:
    """The configuration without what other options about the corpus replace."""
    names = (*OF_SOURCE, "source", "documents")
    asked = [name for name in names if cli.option_value(rest, f"--data.{name}")]
    if not asked:
        return config
    data = config.data
    source = cli.option_value(rest, "--data.source") or data.source
    dropped = {"digest"} | {name for name, of in OF_SOURCE.items() if of != source}
    if {"source", "repository"} & {*asked}:
        dropped.add("revision")  # a commit of another data set
    usual = {f.name: f.default for f in dataclasses.fields(data) if f.name in dropped}
    return replace(config, data=dataclasses.replace(data, **usual))


def reasoning(config: ReasoningRun, rest: Sequence[str], preset: Any) -> ReasoningRun:
    """The configuration for other rows: their file or commit, and the form of their thoughts."""
    source = cli.option_value(rest, "--data.source")
    if source is None or source == config.data.source:
        return config
    usual = {"data.path": None, "data.revision": None, "condense.mode": CondenseConfig().mode}
    return replace(config, **usual)


def _start(config: ClassifyRun, rest: Sequence[str]) -> dict[str, Any]:
    """The run trains no model to start from, where one is given."""
    path = cli.option_value(rest, "--model.path") or config.model.path
    return {} if path == "scratch" else {"start": config.start}


def _source(config: DiffuseRun, rest: Sequence[str]) -> dict[str, Any]:
    """Given images keep their source."""
    if cli.option_value(rest, "--data.path") is None:
        return {}
    return {"data.source": cli.option_value(rest, "--data.source") or config.data.source}


UNLEARN, PRETRAIN, CLASSIFY = "train.unlearn", "train.pretrain", "train.classify"
FINETUNE, DIFFUSE, ERASE = "train.finetune", "train.diffuse", "train.erase"
ATTACK, DEFEND = "train.attack", "train.defend"
READERS: dict[str, Reader] = {
    UNLEARN: Reader(RunConfig, PRESETS, unlearning, lambda c: c.unlearn.steps or 1),
    PRETRAIN: Reader(
        PretrainConfig,
        pretraining.PRESETS,
        pretrained,
        num_steps,
        lambda config, rest: {"data.digest": None},
    ),
    CLASSIFY: Reader(
        ClassifyRun, classify.PRESETS, steps=lambda c: c.train.forwards // 6 * 2, more=_start
    ),
    FINETUNE: Reader(ReasoningRun, epic.PRESETS, reasoning, lambda c: c.train.steps or 1),
    DIFFUSE: Reader(DiffuseRun, diffuse.PRESETS, more=_source),
    ERASE: Reader(
        EraseRun,
        diffuse.PRESETS,
        steps=lambda c: c.unlearn.steps or 1,
        more=_source,
        start=of_erasing,
        last=short,
        spelled=SPELLED,
    ),
    ATTACK: Reader(AttackRun, diffuse.PRESETS, start=of_run, last=short, spelled=SPELLED),
    DEFEND: Reader(DefendRun, diffuse.PRESETS, start=of_run),
}


def read_arguments(
    program: str, argv: Sequence[str], cls: type | None = None, name: str | None = None
) -> Any:
    """The configuration of a command line: a preset, a file or a run, with overrides.

    Args:
        program: the name of the program, such as `train.unlearn`.
        argv: the words behind the program's name.
        cls: a configuration with more options, those of another program; None: the program's.
        name: the name of that program, for messages.

    Raises:
        UserError: an unknown preset, file or option.
        SystemExit: `--save-config FILE` was given, and the file is written.
    """
    row = READERS[program]
    argv, target = config_files.without_save(argv)
    words = [row.spelled.get(word.partition("=")[0], "") for word in argv]
    words = [
        word if not whole else whole + word[len(word.partition("=")[0]) :]
        for word, whole in zip(argv, words, strict=True)
    ]
    preset, config, rest, prog, summary = row.start(words, row.config, row.presets, name or program)
    config = row.adjust(config, rest, preset)
    if hasattr(config, "optimizer"):
        config = start.with_optimizer(config, rest, preset)
    config = start.shortened(config, rest, preset, row.steps, **row.more(config, rest))
    config = row.last(config, rest, words[0] != "--config")
    config = cli.parse(cls or row.config, config, rest, prog, summary)
    if target is not None:
        config_files.save_config(config, target)
        print(f"written: {target}; run it: python -m {program} --config {target}")
        raise SystemExit(0)
    return config


def check_start(config: ClassifyRun) -> None:
    """Raise `UserError` where a preset starts from the model of another run, which is not there."""
    preset, path = classify.PRESETS.get(config.preset), config.model.path
    made_by = getattr(preset, "MADE_BY", None)
    if preset is None or made_by is None or path != preset.PRESET.model.path:
        return
    if not Path(path).exists():
        raise UserError(
            f"--model.path {path} does not exist; run `{made_by}`, which writes it, or give "
            "the folder of another model"
        )


# They choose which options there are, or what the others start from.
FIRST = ("name", "source", "task", "path", "original", "forget", "retain")


def command(program: str, config: Any) -> str:
    r"""The command that repeats a run, one option a line.

    Args:
        program: the name of the program, such as `train.unlearn`.
        config: its configuration.

    Returns:
        The preset with what differs from it, which reads as `config` again; "" where no options do
        that.

    Example:
        >>> print(command("train.unlearn", replace(PRESETS["quickstart"].PRESET, seed=3)))
        python -m train.unlearn quickstart \
            --seed 3
    """
    wanted = _flat(identity(config))
    if not config.preset:
        return ""
    lines = [shlex.quote(config.preset), *(["--smoke"] if config.smoke else [])]
    # Folders of earlier runs, which the other options start from.
    folders = {name: getattr(config, name, None) for name in ("run", "attack")}
    lines += [_option(name, str(at)) for name, at in folders.items() if isinstance(at, Path)]
    for _ in range(4):
        try:
            there = _flat(identity(read_arguments(program, shlex.split(" ".join(lines)))))
        except UserError:
            return ""
        differ = [name for name in wanted if wanted[name] != there.get(name, ...)]
        if not differ:
            same = there.keys() == wanted.keys()
            return " \\\n    ".join([f"python -m {program} {lines[0]}", *lines[1:]]) if same else ""
        first = [name for name in differ if name.rpartition(".")[2] in FIRST]
        lines += [_option(name, wanted[name]) for name in first or differ]
    return ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    flat = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _option(name: str, value: Any) -> str:
    """An option as it is typed."""
    head, _, last = name.replace("_", "-").rpartition(".")
    group = f"{head}." if head else ""
    if isinstance(value, bool):
        return f"--{group}{'' if value else 'no-'}{last}"
    words = [str(word) for word in (value if isinstance(value, list) else [value])]
    return f"--{group}{last} {shlex.join(words)}"
