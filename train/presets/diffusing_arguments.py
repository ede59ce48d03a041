"""The configurations of command lines of the programs about text-to-image models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.jobs.diffusing.config import AttackRun, ConceptRun, DefendRun, DiffuseRun, EraseRun
from train.options import cli, optimizers, start
from train.options.config import replace
from train.options.rows import Rows
from train.presets.diffuse import PRESETS
from train.tasks.erasure import ATTACKS, ERASING

# Of a method in a smoke run.
FEW = {"images": 6, "steps": 3, "tokens": 2, "batch_size": 4}


def read_arguments(
    argv: list[str], cls: type[DiffuseRun] = DiffuseRun, program: str = "train.diffuse"
) -> Any:
    """The configuration of a command line of train.diffuse: a preset, or `--config FILE`.

    `cls` may have more options than `DiffuseRun`, those of another `program`.
    """
    preset, default, rest, prog, summary = start.start_of(argv, DiffuseRun, PRESETS, program)
    default = smoked(default, rest, preset)
    return cli.parse(cls, default, rest, prog, summary)


def read_erase(argv: list[str]) -> EraseRun:
    """That of train.erase: a preset, the folder of a run of train.diffuse, or `--config FILE`."""
    first, *rest = spelled(argv, "--erase.method", "--erase.name")
    if first != "--config" and first not in PRESETS and (_folder(first) or _path_like(first)):
        from train.jobs.diffusing import stored

        source = stored.read_run(Path(first), "RUN", ("train.diffuse",))
        config = replace(_as(EraseRun, source.config), run=source.folder)
        stored_one = False
        prog, summary = "train.erase RUN", "erase a concept from the model of a run"
    else:
        preset, config, rest, prog, summary = start.start_of(
            [first, *rest], EraseRun, PRESETS, "train.erase"
        )
        stored_one = isinstance(config, EraseRun)
        config = config if stored_one else _as(EraseRun, config)
        config = smoked(config, rest, preset)
    config = _short(_optimizer(config, rest), "erase", ERASING, rest, not stored_one)
    return cli.parse(EraseRun, config, rest, prog, summary)


def read_attack(argv: list[str]) -> AttackRun:
    """That of train.attack: the folder of a run, or `--config FILE`."""
    words = [argv[0], *spelled(argv[1:], "--attack", "--attack.name")]
    return _of_run(AttackRun, words, "train.attack", ("train.erase", "train.defend"), ())


def read_defend(argv: list[str]) -> DefendRun:
    """That of train.defend: the folders of a run and of an attack on it, or `--config FILE`."""
    return _of_run(DefendRun, argv, "train.defend", ("train.erase",), ("attack",))


def _of_run(
    cls: type, argv: Sequence[str], program: str, programs: tuple[str, ...], more: tuple[str, ...]
) -> Any:
    """The configuration of a program whose first arguments are folders of runs."""
    from train.jobs.diffusing import stored

    first, *rest = argv
    if first == "--config":
        if not rest:
            raise UserError("--config needs the config.json of a run")
        config = cli.read_config(cls, Path(rest[0]))
        return cli.parse(cls, _optimizer(config, rest[1:]), rest[1:], f"{program} --config", "")
    if first in PRESETS:  # how a report repeats a run
        base = cli.option_value(rest, "--run")
        if base is None:
            raise UserError(f"the first argument is the folder of a run, got the preset {first!r}")
        first = base
    elif first.startswith("-"):
        raise UserError(f"the first argument is the folder of a run, got {first!r}")
    source = stored.read_run(Path(first), "RUN", programs)
    given: dict[str, Any] = {"run": source.folder}
    for name in more:
        if not rest or rest[0].startswith("-"):
            if cli.option_value(rest, f"--{name}") is not None:
                break
            raise UserError(f"the second argument is the folder of a run of train.{name}; give it")
        given[name], rest = Path(rest[0]), rest[1:]
    config = dataclasses.replace(_as(cls, source.config), **given)
    config = _optimizer(replace(config, output=None), rest)
    if hasattr(config, "attack") and not isinstance(config.attack, Path):
        config = _short(config, "attack", ATTACKS, rest)
    places = " ".join(["RUN", *(name.upper() for name in more)])
    return cli.parse(cls, config, rest, f"{program} {places}", "options")


def _as(cls: type, config: ConceptRun) -> Any:
    """The configuration as that of another program, with what both have."""
    mine = {f.name for f in dataclasses.fields(cls)}
    shared = {f.name for f in dataclasses.fields(config)} & mine - {"run", "attack", "optimizer"}
    return cls(**{name: getattr(config, name) for name in shared})


def _short(config: Any, place: str, rows: Rows, rest: Sequence[str], fresh: bool = True) -> Any:
    """The configuration with the method that the command line names, made short in a smoke run.

    `fresh`: it is not that of a stored run, whose method is as it was.
    """
    chosen = getattr(config, place)
    name = cli.option_value(rest, f"--{place}.name")
    if name is not None and name != chosen.name:
        chosen, fresh = rows.other(chosen, name), True
    # Those tuned for the preset, in the place of the defaults.
    tuned = getattr(PRESETS.get(config.preset), place.upper(), {}).get(chosen.name)
    if fresh and tuned is not None:
        chosen = tuned
    if (fresh and config.smoke) or "--smoke" in rest:
        config = replace(config, smoke=True)
        if hasattr(config, "unlearn"):
            config = replace(config, **{"unlearn.steps": 4, "unlearn.batch_size": 4})
        known = {field.name for field in dataclasses.fields(chosen)}
        few = {name: value for name, value in FEW.items() if name in known}
        chosen = dataclasses.replace(chosen, **few)
    return replace(config, **{place: chosen})


def _optimizer(config: Any, rest: Sequence[str]) -> Any:
    """The configuration with the optimizer that the command line names, at its own rate."""
    if not hasattr(config, "optimizer"):
        return config
    config = start.with_optimizer(config, rest, None)
    if "--smoke" in rest and hasattr(config, "unlearn"):
        steps = config.unlearn.steps or 1
        config = replace(config, optimizer=optimizers.fitted(config.optimizer, steps))
    return config


def smoked(config: Any, rest: Sequence[str], preset: Any) -> Any:
    """The configuration with what `--smoke` changes, where the command line says `--smoke`."""
    if "--smoke" not in rest or preset is None:
        return config
    config = replace(config, smoke=True, **preset.SMOKE)
    if cli.option_value(rest, "--data.path") is not None:
        source = cli.option_value(rest, "--data.source") or preset.PRESET.data.source
        config = replace(config, **{"data.source": source})
    return config


def spelled(argv: Sequence[str], short: str, whole: str) -> list[str]:
    """A command line whose choice of a method is written as the name of its row.

    Example:
        >>> spelled(["RUN", "--attack", "cce"], "--attack", "--attack.name")
        ['RUN', '--attack.name', 'cce']
    """
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        found.append(whole + equals + value if name == short else word)
    return found


def list_methods(option: str, rows: Rows) -> list[str]:
    """The methods of a table, a line each."""
    width = max(map(len, rows.table))
    lines = [f"  {row.name:{width}}  {row.summary}" for row in rows.table.values()]
    return [f"Methods ({option}):", *lines]


def _folder(word: str) -> bool:
    return Path(word).expanduser().is_dir()


def _path_like(word: str) -> bool:
    return "/" in word
