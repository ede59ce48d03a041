"""Several runs on one page: forget against retain, curves of training, and the main metrics.

python -m train.report RUN RUN ... --html FILE
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.evaluators import chosen, plots
from train.evaluators.base import Overlay, Pair
from train.reporting import metrics_table, tables
from train.reporting.page import Drawn, embed, render, steps_of
from train.reporting.tables import SMOKE, Column, Run
from train.runtime.plain import clean

LONGEST = 32


def short_names(labels: Sequence[str]) -> list[str]:
    """Labels that fit a legend: long ones are cut, and numbered where two become alike.

    Example:
        >>> short_names(["asu", f"{'long ' * 6}one", f"{'long ' * 6}two"])
        ['asu', 'long long long long long long (2)', 'long long long long long long (3)']
    """
    cut = [s if len(s) <= LONGEST else s[: LONGEST - 3].rstrip() for s in labels]
    return [
        f"{name} ({i})" if cut.count(name) > 1 else name + "…" * (name != label)
        for i, (name, label) in enumerate(zip(cut, labels, strict=True), 1)
    ]


def _measured(runs: Sequence[Run]) -> set[str]:
    """The names of the metrics of the runs' judged models."""
    return {name for run in runs for name in metrics_table.metrics_of(run.judged)}


def _pairs(found: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    values = [metrics_table.metrics_of(scores) for scores in found]
    return [(v[x], v[y]) for v in values if x in v and y in v]


def _drawn(runs: Sequence[Run]) -> list[Pair]:
    """The pairs of metrics of the runs' evaluators, under the names that the runs have."""
    rows = chosen(name for run in runs for name in run.evaluators)
    names = _measured(runs)
    return [
        pair._replace(x=x, y=y)
        for pair in (pair for row in rows for pair in row.pairs)
        for x in metrics_table.variants(pair.x, names)
        for y in metrics_table.variants(pair.y, names)
    ]


def pictures(found: Sequence[tuple[str, list[Run]]], names: Sequence[str]) -> list[Drawn]:
    """A scatter plot of every pair of metrics that the runs have.

    Args:
        found: the experiments, as `tables.groups` gives them.
        names: a short name for each.
    """
    every = [run for _, members in found for run in members]
    smoke = "SMOKE: " if any(run.config.get("smoke") for run in every) else ""
    made = []
    for x, y, title, caption in _drawn(every):
        points = [
            plots.Point(name, _pairs([run.judged for run in members], x, y))
            for name, (_, members) in zip(names, found, strict=True)
        ]
        figure = plots.scatter(
            points,
            _beside(found, names, x, y),
            metrics_table.describe(x),
            metrics_table.describe(y),
        )
        if figure is not None:
            means = [(p.name, np.mean(p.values, axis=0)) for p in points if p.values]
            show = metrics_table.format_number
            said = "; ".join(
                f"{name} {show(float(a))} / {show(float(b))}" for name, (a, b) in means
            )
            labels = [metrics_table.describe(name).label for name in (x, y)]
            alt = f"{labels[0]} / {labels[1]}, means over seeds: {said}."
            words = caption + " A large mark is the mean over an experiment's seeds."
            png = plots.png(figure, smoke + title)
            made.append(Drawn(x, title, alt, words, "", png))
    return made


def _beside(
    found: Sequence[tuple[str, list[Run]]], names: Sequence[str], x: str, y: str
) -> list[plots.Fixed]:
    """The start and the target of every experiment; those with equal values share a mark."""
    marks: dict[tuple[Any, ...], list[int]] = {}
    for i, (_, members) in enumerate(found):
        for role in ("start", "reference"):
            model = getattr(members[0].roles, role)
            pairs = _pairs([run.summary[model] for run in members if model in run.summary], x, y)
            if pairs:
                marks.setdefault((role, model, *sorted(pairs)), []).append(i)
    alike = collections.Counter((role, model) for role, model, *_ in marks)
    made = []
    for (role, model, *pairs), (owner, *others) in marks.items():
        more = f" and {len(others)} more" if others else ""
        shared = alike[role, model] == 1
        label = model if shared else f"{model}: {names[owner]}{more}"
        made.append(plots.Fixed(label, role == "start", pairs, None if shared else owner))
    return made


def overlays(found: Sequence[tuple[str, list[Run]]], names: Sequence[str]) -> list[Drawn]:
    """A picture of every quantity that runs evaluated during training.

    Args:
        found: the experiments, as `tables.groups` gives them.
        names: a short name for each.
    """
    every = [run for _, members in found for run in members]
    evaluators = chosen(name for run in every for name in run.evaluators)
    rows = [row for evaluator in evaluators for row in evaluator.overlays]
    if not rows:
        return []
    smoke = "SMOKE: " if any(run.config.get("smoke") for run in every) else ""
    # Read once for all pictures: damage is reported when a file is read.
    logged = [[steps_of(run) for run in members] for _, members in found]
    made = []
    for row in rows:
        bands = [
            band
            for name, (_, members), lines in zip(names, found, logged, strict=True)
            if (band := _band(row, name, members, lines)) is not None
        ]
        if not bands:
            continue
        ends = "; ".join(f"{band.name} {band.values[:, -1].mean():.3f}" for band in bands)
        caption = f"{row.words} A line is the mean over an experiment's seeds, its band reaches "
        caption += "from the lowest to the highest of them."
        png = plots.png(plots.overlay(bands, row.x, row.y, row.rises), smoke + row.title)
        alt = f"{row.title}; at the end: {ends}."
        made.append(Drawn(row.name, row.title, alt, caption, "", png))
    return made


def _band(
    row: Overlay, name: str, members: Sequence[Run], logged: Sequence[list[dict[str, Any]]]
) -> plots.Band | None:
    """The evaluations during training that all seeds of an experiment have; None without any."""
    looks = [dict(zip(*plots.series(lines, row.name), strict=True)) for lines in logged]
    each = row.each(members[0].config, members[0].judged)
    steps = sorted(set.intersection(*map(set, looks)))
    if not steps or each is None:
        return None
    values = np.array([[look[step] for step in steps] for look in looks])
    return plots.Band(name, each * np.array(steps), values)


def _row(column: Column, names: dict[str, str], shown: Sequence[str]) -> dict[str, Any]:
    cells = [column.cells[n].text() if n in column.cells else metrics_table.MISSING for n in shown]
    name = names.get(column.label, column.label)
    return {
        "name": clean(f"{name} · {column.model}" if name else column.model),
        "n": column.n,
        "cells": cells,
    }


def page(runs: Sequence[Run]) -> str:
    """The comparison as one self-contained page.

    Args:
        runs: finished runs, seeds and methods mixed.
    """
    found = tables.groups(runs)
    labels = [clean(label, 200) for label, _ in found]
    short = short_names(labels)
    cols = tables.columns(runs)
    measured = {name for column in cols for name in column.cells}
    wanted = sorted((m for m in metrics_table.metrics() if m.compare), key=lambda m: m.compare)
    shown = [n for m in wanted for n in metrics_table.variants(m.name, measured)]
    names = {label: name for (label, _), name in zip(found, short, strict=True)}
    if len(found) == 1:  # its columns carry no label
        names |= dict.fromkeys(("", "SMOKE"), short[0])
    heads = [metrics_table.describe(n) for n in shown]
    smoke = any(run.config.get("smoke") for run in runs)
    pairs = [embed(p, p.png) for p in pictures(found, short) if p.png]
    curves = [embed(p, p.png) for p in overlays(found, short) if p.png]
    for number, picture in enumerate((*pairs, *curves), 1):
        picture["number"] = number
    sections = [("pairs", "Forget against retain", pairs), ("curves", "While they train", curves)]
    rows = chosen(name for run in runs for name in run.evaluators)
    return render(
        "comparison.html.j2",
        title=f"{len(found)} experiments" if len(found) > 1 else short[0],
        smoke=SMOKE if smoke else "",
        topic="unlearning" if any(row.pairs for row in rows) else "training",
        sections=[section for section in sections if section[-1]],
        heads=[
            {
                "label": m.label,
                "arrow": m.arrow,
                "direction": m.aim,
                "explain": m.words,
            }
            for m in heads
        ],
        rows=[_row(column, names, shown) for column in cols],
        legend=metrics_table.LEGEND,
        runs=[
            {
                "name": name,
                "label": label,
                "seeds": ", ".join(str(run.config.get("seed")) for run in members),
                "folders": ", ".join(clean(run.folder.resolve().name, 200) for run in members),
            }
            for name, label, (_, members) in zip(short, labels, found, strict=True)
        ],
    )
