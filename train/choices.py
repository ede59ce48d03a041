"""What `--help` shows: the options people use first, and the words an option can have.

The words come from the tables that check them, so that neither can say something else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Annotated, Any

# In the order of a first run: what is forgotten, from what model, how, and where it goes.
FIRST = (
    "--seed --smoke --output --data.path --data.forget --data.retain --data.forget-split "
    "--model.path --stage.original --stage.cache --retain-log --objective.name --objective.retain "
    "--optimizer.name --optimizer.learning-rate --combine --lora.rank --unlearn.steps "
    "--unlearn.batch-size --report-to"
).split()


class Option(typing.NamedTuple):
    """An option: its name on the command line, type, default, text, and where it stands."""

    name: str
    kind: Any
    default: Any
    text: str
    group: str


@functools.cache
def words() -> dict[str, tuple[str, ...]]:
    """The words an option can have, by the end of its name (the longest that fits counts)."""
    from jaxlib_unlearn.objectives import OBJECTIVES, ObjectiveConfig
    from train import checks, optimizers, tasks
    from train.config import LoraConfig
    from train.costs import PROGRAMS
    from train.runtime import reporters

    retain = typing.get_type_hints(ObjectiveConfig)["retain"]
    forms = dict.fromkeys(form for row in OBJECTIVES.values() for form in row.compat)
    return {
        "data.source": tasks.sources(),
        "model.dtype": checks.COMPUTE,
        "model.remat": tuple(checks.REMAT),
        "objective.name": tuple(OBJECTIVES),
        "objective.retain": typing.get_args(typing.get_args(retain)[0]),
        "objective.compat": tuple(forms),
        "optimizer.name": tuple(optimizers.OPTIMIZERS),
        "optimizer.schedule": optimizers.SCHEDULES,
        "optimizer.bases": optimizers.BASES,
        "optimizer.state-dtype": optimizers.DTYPES,
        "optimizer.comm-dtype": optimizers.DTYPES,
        "combine": tuple(optimizers.COMBINERS),
        "lora.targets": LoraConfig().targets,
        "evaluate.judge": checks.JUDGES,
        "evaluate.leak-question": checks.QUESTIONS,
        "export-dtype": tuple(checks.DTYPES),
        "report-to": tuple(reporters.REPORTERS),
        "programs": PROGRAMS,
    }


def words_of(name: str) -> tuple[str, ...]:
    """The words of one option; none: it takes numbers, paths or free text.

    Example:
        >>> words_of("--finetune.optimizer.schedule")
        ('constant', 'linear', 'cosine')
    """
    known, plain = words(), name.removeprefix("--")
    while plain not in known and "." in plain:
        plain = plain.partition(".")[2]
    return known.get(plain, ())


def texts(cls: type) -> dict[str, str]:
    """What the docstring of a class says about its arguments.

    Example:
        >>> from train.config import StageConfig
        >>> texts(StageConfig)["original"]
        'a model (HF folder or GGUF) that already knows the facts.'
    """
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    block, _, _ = block.partition("\n\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def options(cls: type, default: Any, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration, with the defaults of one of its values."""
    hints, said = typing.get_type_hints(cls), {}
    for base in reversed(cls.__mro__):
        said |= texts(base)
    for field in dataclasses.fields(cls):
        kind, value = hints[field.name], getattr(default, field.name)
        name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(kind):
            yield from options(typing.cast(type, kind), value, name + ".")
        else:
            yield Option(f"--{name}", kind, value, said.get(field.name, ""), prefix.rstrip("."))


def grouped(cls: type, default: Any) -> type:
    """The same options as a dataclass for `--help`, those of `FIRST` in front of the others."""
    import tyro

    every = {option.name: option for option in options(cls, default)}
    groups = {"most used": [every[name] for name in FIRST if name in every]}
    for option in every.values():
        if option.name not in FIRST:
            groups.setdefault(option.group or "run", []).append(option)
    fields = []
    for title, members in groups.items():
        shown = []
        for i, option in enumerate(members):
            look = tyro.conf.arg(
                name=option.name.removeprefix("--"),
                prefix_name=False,
                help=option.text,
                metavar=_metavar(option),
            )
            field = dataclasses.field(default=option.default)
            shown.append((f"option_{i}", Annotated[option.kind, look], field))
        group = dataclasses.make_dataclass("Options", shown, namespace={"__doc__": ""})
        look = tyro.conf.arg(name=title)
        field = dataclasses.field(default_factory=group)
        fields.append((title.replace(" ", "_").replace(".", "_"), Annotated[group, look], field))
    return dataclasses.make_dataclass("Help", fields, namespace={"__doc__": ""})


def _metavar(option: Option) -> str | None:
    """`{a,b}` for an option that is one of some words; None: tyro's own for its type."""
    known = words_of(option.name)
    if not known:
        return None
    several = " ..." if typing.get_origin(option.kind) is tuple else ""
    several = ",..." if option.name == "--report-to" else several
    nothing = "|None" if type(None) in typing.get_args(option.kind) else ""
    return f"{{{','.join(known)}}}{nothing}{several}"
