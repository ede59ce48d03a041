"""The options as `--help` shows them: the most used first, with descriptions and choices.

All of it derives from the fields of the rows in use, and values are checked against these fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from jaxlib_unlearn.options import words_of
from train.options.rows import rows_of

# The order of a first run: the rows to forget, the model, the method, and the logs.
FIRST = (
    "--seed --smoke --output --data.path --data.forget --data.retain --data.forget-split "
    "--model.path --stage.original --stage.cache --retain-log --objective.name --objective.retain "
    "--optimizer.name --optimizer.learning-rate --combine --lora.rank --unlearn.steps "
    "--unlearn.batch-size --report-to"
).split()


# Words of options whose tables are in rooms above this one, which add them when imported.
LATER: dict[str, Callable[[], tuple[str, ...]]] = {}


# Groups that every program has; they follow the program's own groups.
EVERY = ("stage", "mesh", "distributed")


class Option(typing.NamedTuple):
    """An option: name on the command line, type, default, description, group, accepted words.

    Without words it accepts numbers, paths or free text.
    """

    name: str
    kind: Any
    default: Any
    text: str
    group: str
    words: tuple[str, ...] = ()


def texts(cls: type) -> dict[str, str]:
    """The descriptions of arguments in the docstring of a class, for fields without a text.

    Example:
        >>> from train.runtime.sharding import MeshConfig
        >>> texts(MeshConfig)["fsdp"]
        'the number of devices that split parameters and the batch.'
    """
    _, _, block = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    block, _, _ = block.partition("\n\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def options(cls: type, default: Any, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration, with the rows and the values of `default`."""
    hints, said = typing.get_type_hints(cls), {}
    for base in reversed(cls.__mro__):
        said |= texts(base)
    for field in dataclasses.fields(cls):
        kind, value, rows = hints[field.name], getattr(default, field.name), rows_of(field)
        name = f"{prefix}{field.name}".replace("_", "-")
        if rows is not None:
            for option in options(type(value), value, name + "."):
                words = tuple(rows.table) if option.name == f"--{name}.name" else option.words
                yield option._replace(words=words)
        elif dataclasses.is_dataclass(kind):
            yield from options(typing.cast(type, kind), value, name + ".")
        else:
            text = field.metadata.get("doc") or said.get(field.name, "")
            group = prefix.rstrip(".")
            yield Option(f"--{name}", kind, value, text, group, _words(f"--{name}", field))


def known_words(cls: type, prefix: str = "--") -> dict[str, tuple[str, ...]]:
    """Every option of a configuration, of all rows, and the words that it accepts.

    Example:
        >>> from train.options.config import RunConfig
        >>> known_words(RunConfig)["--finetune.optimizer.schedule"]
        ('constant', 'linear', 'cosine', 'hold')
    """
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name, kind, rows = prefix + field.name.replace("_", "-"), hints[field.name], rows_of(field)
        if rows is not None:
            words = rows.words().items()
            found |= {f"{name}.{option.replace('_', '-')}": known for option, known in words}
        elif dataclasses.is_dataclass(kind):
            found |= known_words(typing.cast(type, kind), name + ".")
        else:
            found[name] = _words(name, field)
    return found


def _words(name: str, field: dataclasses.Field) -> tuple[str, ...]:
    """The words that an option accepts."""
    return words_of(field) or LATER.get(name, tuple)()


def grouped(cls: type, default: Any) -> type:
    """The same options as a dataclass for `--help`; the options in `FIRST` come first."""
    import tyro

    every = {option.name: option for option in options(cls, default)}
    groups = {"most used": [every[name] for name in FIRST if name in every]}
    for option in every.values():
        if option.name not in FIRST:
            groups.setdefault(option.group or "run", []).append(option)
    fields = []
    titles = [*(t for t in groups if t not in EVERY), *(t for t in EVERY if t in groups)]
    for title, members in ((title, groups[title]) for title in titles):
        shown = []
        for i, option in enumerate(members):
            look = tyro.conf.arg(
                name=option.name.removeprefix("--"),
                prefix_name=False,
                help=option.text,
                metavar=_metavar(option),
                # By itself tyro quotes a text as a shell would: 'Let'"'"'s reason'.
                help_behavior_hint=lambda text: f"(default: {_unquoted(text)})",
            )
            field = dataclasses.field(default=option.default)
            shown.append((f"option_{i}", Annotated[option.kind, look], field))
        group = dataclasses.make_dataclass("Options", shown, namespace={"__doc__": ""})
        look = tyro.conf.arg(name=title)
        field = dataclasses.field(default_factory=group)
        fields.append((title.replace(" ", "_").replace(".", "_"), Annotated[group, look], field))
    return dataclasses.make_dataclass("Help", fields, namespace={"__doc__": ""})


def _unquoted(text: str) -> str:
    return text.replace("'\"'\"'", "'")


def _metavar(option: Option) -> str | None:
    """`{a,b}` for an option with a choice of words; None: tyro shows the type."""
    known = option.words
    if not known:
        return None
    several = " ..." if typing.get_origin(option.kind) is tuple else ""
    several = ",..." if option.name == "--report-to" else several
    nothing = "|None" if type(None) in typing.get_args(option.kind) else ""
    return f"{{{','.join(known)}}}{nothing}{several}"
