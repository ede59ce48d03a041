"""Several runs on one page: forget against retain, and the numbers that decide.

python -m train.report RUN RUN ... --html FILE
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.reporting import metrics_table, plots, tables
from train.reporting.page import Picture, embed, render
from train.reporting.runlogs import clean
from train.reporting.tables import Column, Run
from train.reporting.verdict import SMOKE

# What is drawn against what, left to right and upwards; pairs that no run has are left out.
PAIRS = (
    ("forget_rouge", "retain_rouge", "Forget against retain"),
    (metrics_table.LOG10_P, "model_utility", "Forget quality against model utility"),
)
CAPTIONS = {
    "forget_rouge": "Runs to the left forget more, runs further up keep more. The oracle shows how "
    "far to the left is far enough: further left is no better.",
    metrics_table.LOG10_P: "To the right the KS test tells a model less well from the oracle; "
    "above log10 0.05 = -1.3 it does not tell them apart. Further up more of the rest is kept.",
}
SHOWN = (
    "forget_rouge",
    "forget_fact_recall",
    metrics_table.LOG10_P,
    "retain_rouge",
    "model_utility",
    "forget_unreadable",
    "privleak",
)
LONGEST = 24


def short_names(labels: Sequence[str]) -> list[str]:
    """Labels that fit a legend: cut where they are long, numbered where that makes two alike.

    Example:
        >>> short_names(["asu", "a very long label, part one", "a very long label, part two"])
        ['asu', 'a very long label, pa (2)', 'a very long label, pa (3)']
    """
    cut = [s if len(s) <= LONGEST else s[: LONGEST - 3].rstrip() for s in labels]
    return [
        f"{name} ({i})" if cut.count(name) > 1 else name + "…" * (name != label)
        for i, (name, label) in enumerate(zip(cut, labels, strict=True), 1)
    ]


def _utilities(runs: Sequence[Run]) -> list[str]:
    """The names that model utility has in the runs: of fewer than nine parts it has its own."""
    found = {n for run in runs for n in run.summary["unlearned"] if n.startswith("model_utility")}
    return sorted(found)


def _pairs(runs: Sequence[Run], model: str, x: str, y: str) -> list[tuple[float, float]]:
    values = [metrics_table.metrics_of(run.summary[model]) for run in runs if model in run.summary]
    return [(v[x], v[y]) for v in values if x in v and y in v]


def pictures(found: Sequence[tuple[str, list[Run]]], names: Sequence[str]) -> list[Picture]:
    """The scatter of every pair of metrics that the runs have.

    Args:
        found: experiments as `tables.groups` gives them.
        names: a short name each.
    """
    every = [run for _, members in found for run in members]
    smoke = "SMOKE: " if any(run.config.get("smoke") for run in every) else ""
    made = []
    pairs = [pair for pair in PAIRS if pair[1] != "model_utility"]
    for name in _utilities(every):
        pairs += [(x, name, title) for x, y, title in PAIRS if y == "model_utility"]
    for x, y, title in pairs:
        points = [
            plots.Point(name, _pairs(members, "unlearned", x, y))
            for name, (_, members) in zip(names, found, strict=True)
        ]
        fixed = {model: _pairs(every, model, x, y) for model in ("original", "oracle")}
        figure = plots.scatter(points, {m: pairs for m, pairs in fixed.items() if pairs}, x, y)
        if figure is not None:
            means = [(p.name, np.mean(p.values, axis=0)) for p in points if p.values]
            show = metrics_table.format_number
            said = "; ".join(
                f"{name} {show(float(a))} / {show(float(b))}" for name, (a, b) in means
            )
            labels = [metrics_table.describe(name).label for name in (x, y)]
            alt = f"{labels[0]} / {labels[1]}, means over seeds: {said}."
            caption = CAPTIONS[x] + " A large mark is the mean over an experiment's seeds."
            png = plots.png(figure, smoke + title)
            made.append(Picture(x, title, alt, caption, "", png))
    return made


def _row(column: Column, names: dict[str, str], shown: Sequence[str]) -> dict[str, Any]:
    cells = [column.cells[n].text() if n in column.cells else metrics_table.MISSING for n in shown]
    name = names.get(column.label, column.label)
    return {
        "name": clean(f"{name} · {column.model}" if name else column.model),
        "n": column.n,
        "cells": cells,
        "unlearned": column.model == "unlearned",
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
    wanted = [n for name in SHOWN for n in (_utilities(runs) if "utility" in name else [name])]
    shown = [n for n in wanted if any(n in column.cells for column in cols)]
    names = {label: name for (label, _), name in zip(found, short, strict=True)}
    if len(found) == 1:  # its columns carry no label
        names |= dict.fromkeys(("", "SMOKE"), short[0])
    heads = [metrics_table.describe(n) for n in shown]
    smoke = any(run.config.get("smoke") for run in runs)
    return render(
        "comparison.html.j2",
        title=f"{len(found)} experiments" if len(found) > 1 else short[0],
        smoke=SMOKE if smoke else "",
        pictures=[embed(p, p.png) for p in pictures(found, short) if p.png],
        heads=[
            {
                "label": m.label,
                "arrow": metrics_table.ARROWS[m.better],
                "direction": metrics_table.DIRECTIONS[m.better],
                "explain": m.explain,
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
