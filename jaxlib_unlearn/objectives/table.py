"""The table of objectives, what a person asked of it, and how it is shown."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import alternate, gradient, preference, smoothing
from jaxlib_unlearn.objectives.base import Objective, ObjectiveConfig

OBJECTIVES: dict[str, Objective] = {
    row.name: row for row in (*gradient.ROWS, *preference.ROWS, *alternate.ROWS, *smoothing.ROWS)
}
"""Every objective by name. A new method is one more row."""

RETAIN_CHOICES = ("nll", "kl", "none")


def _nearest(word: object, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"


def _check_number(name: str, option: str, value: Any) -> None:
    positive = option in ("beta", "temperature")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    not_negative = option.endswith("weight") or option in ("push", "contrast")
    bad_sign = number and ((positive and value <= 0) or (not_negative and value < 0))
    if not number or not math.isfinite(value) or bad_sign:
        wanted = "greater than 0" if positive else "a finite number"
        wanted = "0 or more" if not_negative else wanted
        raise UserError(f"objective {name!r}: {option} is {value!r}; it must be {wanted}")


def _check_layers(name: str, layers: Any) -> tuple[int, ...]:
    layers = tuple(layers)
    if not layers:
        raise UserError(
            f"objective {name!r}: layers is empty, so the teacher would be the original model; "
            "name blocks, or leave layers out for all"
        )
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise UserError(
                f"objective {name!r}: layers holds {layer!r}; it takes block indices from 0"
            )
    return layers


def _specialise(
    row: Objective, retain: str | None, compat: str | None, contrast: float | None
) -> Objective:
    """The row as the chosen options make it: streams, caches and additivity."""
    streams, reference, additive = row.streams, dict(row.reference), row.additive
    form = None if compat is None else row.compat[compat]
    if contrast:
        reference["forget"] = "hidden_pair"
    if retain == "kl":
        reference["retain"] = "hidden"
    elif retain == "none":
        streams = tuple(stream for stream in streams if stream != "retain")
        reference.pop("retain", None)
    if form is not None:
        additive = additive and form.additive
        reference.update(form.reference or {})
    columns = {stream: row.columns[stream] for stream in streams}
    return dataclasses.replace(
        row,
        streams=streams,
        columns=columns,
        reference=reference,
        additive=additive,
        per_micro_batch=form is not None and form.per_micro_batch,
    )


def resolve(
    config: ObjectiveConfig | str, table: Mapping[str, Objective] | None = None
) -> tuple[Objective, ObjectiveConfig]:
    """The row a person asked for, and complete options.

    Args:
        config: an :class:`ObjectiveConfig`, or just a name.
        table: rows to choose from; None = ``OBJECTIVES``.

    Returns:
        The row with streams, columns, reference and additivity as the options make them (no retain
        stream with ``retain="none"``, a cache on it with ``"kl"``), and the config with every
        option that the row uses filled in.

    Raises:
        UserError: unknown name (naming the nearest), an option the objective does not use, an empty
            layer list, a value out of range, an unknown compat form.

    Example:
        >>> row, options = resolve(ObjectiveConfig("npo", retain="kl"))
        >>> (row.reference, options.beta)
        ({'forget': 'logps', 'retain': 'hidden'}, 0.1)
    """
    table = OBJECTIVES if table is None else table
    config = ObjectiveConfig(config) if isinstance(config, str) else config
    if config.name not in table:
        raise UserError(f"unknown objective {config.name!r}; {_nearest(config.name, table)}")
    row = table[config.name]
    given = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name != "name" and (value := getattr(config, field.name)) is not None
    }
    compat = given.pop("compat", None)
    if compat is not None and compat not in row.compat:
        hint = _nearest(compat, row.compat) if row.compat else "it has none; leave compat out"
        raise UserError(f"objective {row.name!r} has no compat form {compat!r}; {hint}")
    drops = () if compat is None else row.compat[compat].drops
    for option in given:
        if option not in row.defaults:
            takes = ", ".join(row.defaults) or "no options"
            raise UserError(f"objective {row.name!r} does not use {option}; it takes {takes}")
        if option in drops:
            raise UserError(
                f"objective {row.name!r} with compat {compat!r} does not use {option}; leave it out"
            )
    values = {key: value for key, value in row.defaults.items() if key not in drops} | given
    for option, value in (compat and row.compat[compat].sets or {}).items():
        if given.get(option, value) != value:
            raise UserError(
                f"objective {row.name!r}: compat {compat!r} is a form of {option}={value}, not of "
                f"{given[option]}; leave {option} out, or compat"
            )
        values[option] = value
    for option, value in values.items():
        if option == "retain":
            if value not in RETAIN_CHOICES:
                hint = _nearest(value, RETAIN_CHOICES)
                raise UserError(f"objective {row.name!r}: unknown retain {value!r}; {hint}")
        elif option == "layers":
            values[option] = None if value is None else _check_layers(row.name, value)
        else:
            _check_number(row.name, option, value)
    for option, other in row.only_with.items():
        if values[other]:
            continue
        if option in given:
            raise UserError(
                f"objective {row.name!r} uses {option} only with {other}; set {other} above 0, or "
                f"leave {option} out"
            )
        del values[option]
    options = ObjectiveConfig(name=row.name, compat=compat, **values)
    return _specialise(row, options.retain, compat, options.contrast), options


def describe(objective: Objective | str) -> str:
    """Everything about one objective, as text of several lines.

    Example:
        >>> print(describe("ga"))
        ga: gradient ascent on forget answers; diverges if left alone
          streams    forget (question, answer)
          reference  none
          options    forget_weight=1.0
          paper      Jang et al. 2022, arXiv 2210.01504
          compat     mean_of_means: mean over the micro-batches of each one's own mean ...
    """
    row = OBJECTIVES[objective] if isinstance(objective, str) else objective
    streams = ", ".join(f"{name} ({', '.join(row.columns[name])})" for name in row.streams)
    reference = ", ".join(
        f"{kind} of {stream}" + "".join(f" with {key}" for key in row.forward.get(stream, ()))
        for stream, kind in row.reference.items()
    )
    options = ", ".join(
        f"{key}={'all' if key == 'layers' and value is None else value}"
        for key, value in row.defaults.items()
    )
    lines = [
        f"{row.name}: {row.summary}",
        f"  streams    {streams}",
        f"  reference  {reference or 'none'}",
        f"  options    {options or 'none'}",
        f"  paper      {row.paper}",
    ]
    for name, form in row.compat.items():
        split = "" if form.additive else " (no accumulation)"
        lines.append(f"  compat     {name}: {form.note}{split}")
    return "\n".join(lines)


def list_objectives(table: Mapping[str, Objective] | None = None) -> list[str]:
    """One aligned line an objective: name, streams, reference, paper, what it does.

    Example:
        >>> list_objectives()[0].split()[:4]
        ['nll', 'train', '-', 'plain']
    """
    rows = (OBJECTIVES if table is None else table).values()
    cells = [
        (
            row.name,
            "+".join(row.streams),
            ", ".join(f"{kind}({stream})" for stream, kind in row.reference.items()) or "-",
            "" if row.paper == "-" else row.paper,
            row.summary,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True))
        + f"  {line[4]}"
        + (f" [{line[3]}]" if line[3] else "")
        for line in cells
    ]
