"""Command lines of programs that go on from runs about text-to-image models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from train.jobs.diffusing.config import DefendRun, EraseRun
from train.options import cli, optimizers, start
from train.options.config import replace
from train.options.rows import Rows
from train.options.start import Start
from train.presets.diffuse import PRESETS
from train.tasks.erasure import ATTACKS, ERASING

# Of a method in a smoke run.
FEW = {"images": 6, "steps": 3, "tokens": 2, "batch_size": 4}
SPELLED = {"--erase.method": "--erase.name", "--attack": "--attack.name"}


def of_erasing(argv: Sequence[str], cls: type, presets: Mapping[str, Any], program: str) -> Start:
    """The start of train.erase: a preset, the folder of a run of train.diffuse, or a file."""
    first, *rest = argv
    if first != "--config" and first not in presets and _path_like(first):
        config = _source(first, ("train.diffuse",), cls)
        return Start(None, config, rest, f"{program} RUN", "erase a concept from a run's model")
    begun = start.start_of(argv, cls, presets, program)
    if isinstance(begun.config, EraseRun):
        return begun
    return begun._replace(config=_as(cls, begun.config))


def of_run(argv: Sequence[str], cls: type, presets: Mapping[str, Any], program: str) -> Start:
    """The start of a program whose first arguments are folders of runs."""
    first, *rest = argv
    if first == "--config":
        return start.start_of(argv, cls, {}, program)
    if first in presets:  # how a report repeats a run
        base = cli.option_value(rest, "--run")
        if base is None:
            raise UserError(f"the first argument is the folder of a run, got the preset {first!r}")
        first = base
    elif first.startswith("-"):
        raise UserError(f"the first argument is the folder of a run, got {first!r}")
    defends = cls is DefendRun
    programs = ("train.erase",) if defends else ("train.erase", "train.defend")
    config, places = _source(first, programs, cls), "RUN"
    if defends:
        places = "RUN ATTACK"
        if rest and not rest[0].startswith("-"):
            config, rest = replace(config, attack=Path(rest[0])), rest[1:]
        elif cli.option_value(rest, "--attack") is None:
            raise UserError("the second argument is the folder of a run of train.attack; give it")
    return Start(None, replace(config, output=None), rest, f"{program} {places}", "options")


def _source(folder: str, programs: tuple[str, ...], cls: type) -> Any:
    """The configuration of a run, as that of another program that goes on from it."""
    from train.jobs.diffusing import stored

    source = stored.read_run(Path(folder), "RUN", programs)
    return replace(_as(cls, source.config), run=source.folder)


def _as(cls: type, config: Any) -> Any:
    """The configuration as that of another program, with what both have."""
    mine = {f.name for f in dataclasses.fields(cls)}
    shared = {f.name for f in dataclasses.fields(config)} & mine - {"run", "attack", "optimizer"}
    return cls(**{name: getattr(config, name) for name in shared})


def short(config: Any, rest: Sequence[str], fresh: bool) -> Any:
    """The configuration with the method that the command line names, made short in a smoke run.

    `fresh`: it is not that of a stored run, whose method is as it was.
    """
    place, rows = ("erase", ERASING) if isinstance(config, EraseRun) else ("attack", ATTACKS)
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
        if isinstance(config, EraseRun):
            config = replace(config, **{"unlearn.steps": 4, "unlearn.batch_size": 4})
            config = replace(config, optimizer=optimizers.fitted(config.optimizer, 4))
        known = {field.name for field in dataclasses.fields(chosen)}
        few = {name: value for name, value in FEW.items() if name in known}
        chosen = dataclasses.replace(chosen, **few)
    return replace(config, **{place: chosen})


def list_methods(option: str, rows: Rows) -> list[str]:
    """The methods of a table, a line each."""
    width = max(map(len, rows.table))
    lines = [f"  {row.name:{width}}  {row.summary}" for row in rows.table.values()]
    return [f"Methods ({option}):", *lines]


def _path_like(word: str) -> bool:
    return "/" in word or Path(word).expanduser().is_dir()
