"""The table of objectives, what a person asked of it, and how it is shown."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxlib_unlearn import options as fields
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import (
    alternate,
    autoencoding,
    choice,
    denoising,
    gradient,
    misdirection,
    preference,
    reasoning,
    smoothing,
)
from jaxlib_unlearn.objectives.base import SIDES, Compat, Objective, Options
from jaxlib_unlearn.objectives.retain import RETAIN, with_kind

OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        *gradient.ROWS,
        *preference.ROWS,
        *alternate.ROWS,
        *smoothing.ROWS,
        *misdirection.ROWS,
        *reasoning.ROWS,
    )
}
"""Every objective of unlearning by name. A new method is one more row."""

LEARNING: dict[str, Objective] = {
    row.name: row for row in (OBJECTIVES["nll"], *choice.ROWS, *autoencoding.ROWS)
}
"""The objectives of training in which nothing is unlearned; see ``resolve``."""

DENOISING: dict[str, Objective] = {row.name: row for row in denoising.ROWS}
"""The objectives of denoisers, which learn images or forget concepts; see ``resolve``."""


def _nearest(word: object, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"


def options_of(name: str, table: Mapping[str, Objective] | None = None, /, **given: Any) -> Any:
    """The options of an objective by its name.

    Args:
        name: a row.
        table: rows to choose from; None = ``OBJECTIVES``.
        given: options of the row; None = the row's default.

    Returns:
        An instance of the row's own dataclass, ``OBJECTIVES[name].options``.

    Raises:
        UserError: an unknown name (naming the nearest), or an option that the row does not use.

    Example:
        >>> options_of("npo", beta=0.2).beta
        0.2
    """
    row = _row(name, table)
    for option in (given := {k: v for k, v in given.items() if v is not None}):
        if option not in (*row.defaults, "compat"):
            raise not_used(row, option)
    return row.options(**given)


def not_used(row: Objective, option: str) -> UserError:
    """The error for an option of another row."""
    takes = ", ".join(row.defaults) or "no options"
    return UserError(f"objective {row.name!r} does not use {option}; it takes {takes}")


def _row(name: str, table: Mapping[str, Objective] | None) -> Objective:
    table = OBJECTIVES if table is None else table
    if name not in table:
        raise UserError(f"unknown objective {name!r}; {_nearest(name, table)}")
    return table[name]


def resolve(
    options: Options | str, table: Mapping[str, Objective] | None = None, /, **given: Any
) -> tuple[Objective, Any]:
    """The row a person asked for, and its options, checked.

    Args:
        options: an instance of a row's options, or a row's name.
        table: rows to choose from; None = ``OBJECTIVES``.
        given: beside a name, options of that row.

    Returns:
        The row with streams, columns, reference and additivity as the options make them (no retain
        stream with ``retain="none"``, a cache on it with ``"kl"``), and the options with what
        follows from ``compat`` filled in.

    Raises:
        UserError: unknown name (naming the nearest), an option the objective does not use, an empty
            layer list, a value out of range, an unknown compat form.

    Example:
        >>> row, options = resolve("npo", retain="kl")
        >>> (row.reference, options.beta)
        ({'forget': 'logps', 'retain': 'hidden'}, 0.1)
        >>> resolve(OBJECTIVES["npo"].options(beta=0.2))[1].beta
        0.2
    """
    if isinstance(options, str):
        return resolve(options_of(options, table, **given), table)
    if given:
        raise TypeError("options beside an instance; give a name and options, or change those")
    row = _row(options.name, table)
    if not isinstance(options, row.options):
        raise TypeError(f"objective {row.name!r} takes {row.options.__name__}, got {options!r}")
    form = _form(row, options.compat)
    options = _with_form(row, options, form)
    fields.check(options, f"objective {row.name!r}: {{}}".format)
    if row.check is not None:
        row.check(options)
    for option, other in row.only_with.items():
        if not getattr(options, other) and option in fields.given(options):
            raise UserError(
                f"objective {row.name!r} uses {option} only with {other}; set {other} above 0, or "
                f"leave {option} out"
            )
    return _specialise(row, options, form), options


def _form(row: Objective, compat: str | None) -> Compat | None:
    if compat is None:
        return None
    if compat not in row.compat:
        hint = _nearest(compat, row.compat) if row.compat else "it has none; leave compat out"
        raise UserError(f"objective {row.name!r} has no compat form {compat!r}; {hint}")
    return row.compat[compat]


def _with_form(row: Objective, options: Options, form: Compat | None) -> Options:
    """The options with those that follow from the published form, or from there being none."""
    given, compat = fields.given(options), options.compat
    drops = () if form is None else form.drops
    for option in drops:
        if option in given:
            raise UserError(
                f"objective {row.name!r} with compat {compat!r} does not use {option}; leave it out"
            )
    sets = dict(form.sets or {}) if form is not None else {}
    for option, value in sets.items():
        if given.get(option, value) != value:
            raise UserError(
                f"objective {row.name!r}: compat {compat!r} is a form of {option}={value}, not of "
                f"{given[option]}; leave {option} out, or compat"
            )
    if "retain" in row.defaults and "retain" not in drops and row.defaults["retain"] is None:
        sets.setdefault("retain", given.get("retain", "nll"))
    return dataclasses.replace(options, **sets)


def _specialise(row: Objective, options: Any, form: Compat | None) -> Objective:
    """The row as the chosen options make it: streams, caches and additivity."""
    row = row if row.adapt is None else row.adapt(row, options)
    kind = RETAIN.get(getattr(options, "retain", None) or "")
    row = row if kind is None or "retain" not in row.streams else with_kind(row, kind)
    streams, additive, asks = row.streams, row.additive, dict(row.asks)
    reference: dict[str, str | None] = dict(row.reference)
    if row.also_cached is not None:
        reference |= row.also_cached(options)
    if form is not None:
        additive = additive and form.additive
        reference.update(form.reference or {})
    columns = {stream: row.columns[stream] for stream in streams}
    found = dataclasses.replace(
        row,
        streams=streams,
        columns=columns,
        reference={s: kind for s, kind in reference.items() if kind is not None and s in streams},
        asks=asks,
        additive=additive,
        per_micro_batch=form is not None and form.per_micro_batch,
    )
    where = getattr(options, "reference", "auto")
    if where == "cache" and "fork" in found.reference.values():
        raise UserError(
            f"objective {row.name!r}: --objective.reference cache does not go with hidden states "
            "of a block, which are asked in the step; use fork, or leave it out"
        )
    return found.forking() if where == "fork" else found


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
        f"{field.name}={field.metadata['none'] if field.default is None else field.default}"
        for field in dataclasses.fields(row.options)
        if field.name in row.defaults
    )
    lines = [
        f"{row.name}: {row.summary}",
        f"  streams    {streams}",
        f"  reference  {reference or 'none'}",
        *([f"  sides      {' and '.join(row.sides)}"] if row.sides != SIDES else []),
        f"  options    {options or 'none'}",
        f"  paper      {row.paper}",
    ]
    for name, form in row.compat.items():
        split = "" if form.additive else " (no accumulation)"
        lines.append(f"  compat     {name}: {form.note}{split}")
    return "\n".join(lines)


def list_objectives(table: Mapping[str, Objective] | None = None) -> list[str]:
    """One aligned line an objective: name, streams, reference, what it does, sides, paper.

    The sides stand there where the row has words of its own for them.

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
            row.summary + ("" if row.sides == SIDES else f" (sides {' and '.join(row.sides)})"),
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
