"""The report of a run: verdicts, table and pictures in one self-contained HTML file."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.evaluators import chosen
from train.evaluators.base import Picture, Results, arranged
from train.reporting import metrics_table, tables, verdict
from train.reporting.provenance import adapter_of, command, facts, limitations, made_by, title
from train.reporting.runlogs import read_evals, samples
from train.reporting.tables import Run
from train.runtime import files
from train.runtime.plain import clean, shown
from train.runtime.steplog import read_steps

LEAD = (
    "A model was made to forget a part of what it knows. Below: whether it forgot, what it kept, "
    "and how that was measured."
)


class Built(NamedTuple):
    """The page of a run, the run, and the verdict at its top."""

    path: Path
    run: Run
    verdict: verdict.Verdict


class Drawn(NamedTuple):
    """A picture of the page; without PNG bytes (not enough data) `missing` says why."""

    name: str
    title: str
    alt: str
    caption: str
    missing: str
    png: bytes | None
    photo: bool = False


def curves(run: Run, steps: Sequence[dict[str, Any]]) -> Picture:
    """The picture of the training curves; its text ends with the evaluators' first pair."""
    pair = next((pair for row in chosen(run.evaluators) for pair in row.pairs), None)
    ends = () if pair is None else (pair.x, pair.y)

    def draw(results: Results) -> Any:
        from train.evaluators import plots

        return plots.curves(steps, run.summary.get(run.roles.reference), run.roles)

    return Picture(
        "curves.png",
        "While it unlearns",
        draw,
        lambda results: (
            f"Lines over {len(steps)} logged unlearning steps."
            + "".join(f" {metrics_table.describe(n).label}: {results.across(n)}." for n in ends)
        ),
        "Forget and retain while unlearning. The forget line should come down to the level of a "
        "model that never saw the facts, the retain line should stay up.",
        f"No curves: metrics.jsonl has no steps of the stage {run.roles.judged!r}.",
    )


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` about the judged model."""
    logged = read_steps(run.folder / "metrics.jsonl", _say)
    return [row for row in logged if row["stage"] == run.roles.judged]


def pictures(run: Run, logs: dict[str, dict[str, Any]]) -> list[Drawn]:
    """The pictures of a run: its training curves, and those of its evaluators."""
    from train.evaluators import plots

    steps = steps_of(run)
    results = Results(run.summary, logs, run.roles, steps=steps)
    rows = arranged(picture for row in chosen(run.evaluators) for picture in row.pictures)
    if not any(row.name == "curves.png" for row in rows):
        rows = [curves(run, steps), *rows]
    smoke = "SMOKE: " if run.config.get("smoke") else ""
    made = []
    for row in rows:
        figure = row.draw(results)
        png = figure and plots.png(figure, smoke + row.title)
        alt = row.alt(results)
        made.append(Drawn(row.name, row.title, alt, row.caption, row.missing, png, row.photo))
    return made


def _say(message: str) -> None:
    print(shown(message), file=sys.stderr)


def write(path: Path, data: bytes) -> None:
    """Write a file; a failure is a `UserError`."""
    try:
        files.write(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from None


def _rows(run: Run, models: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in metrics_table.ordered(
        n for m in models for n in metrics_table.metrics_of(run.summary[m])
    ):
        metric = metrics_table.describe(name)
        if metric.log10_of:  # the same number again
            continue
        head, _, tail = metric.label.rpartition(" ")
        rows.append(
            {
                "head": head,
                "tail": tail,
                "explain": metric.words,
                "arrow": metric.arrow,
                "direction": metric.aim,
                "cells": [_cell(run.summary[m], m, name) for m in models],
            }
        )
    return rows


def build(run_dir: str | Path) -> Built:
    """Write `report.html` and its pictures (`curves.png` and others) into a run folder.

    Args:
        run_dir: folder with config.json, summary.json and optionally metrics.jsonl and evals/.

    Raises:
        UserError: not the folder of a finished run, a damaged file, or a failed write.
    """
    run = tables.load_run(run_dir)
    logs = read_evals(run)
    roles, models = run.roles, run.models
    made = pictures(run, logs)
    definitions = arranged(one for row in chosen(run.evaluators) for one in row.definitions)
    found = verdict.of_run(run, logs)
    reference = roles.held_to(roles.judged)
    own_reference = logs.get(reference) if reference in run.summary else None
    lead = next((row.lead for row in chosen(run.evaluators) if row.lead), "")
    page = render(
        "report.html.j2",
        smoke=bool(run.config.get("smoke")),
        title=title(run),
        made=made_by(run),
        topic="training" if lead else "unlearning",
        lead=lead or LEAD,
        verdict=found,
        missed=any(finding.state != "good" for finding in found.findings),
        directions=[
            (metrics_table.ARROWS[k], text)
            for k, text in metrics_table.DIRECTIONS.items()
            if k and (k in ("up", "down") or not lead)
        ],
        models=models,
        reference=roles.reference,
        rows=_rows(run, models),
        retain_log=bool(run.config.get("retain_log")),
        pictures=[embed(p, p.png) for p in made if p.png],
        no_pictures=[p.missing for p in made if not p.png],
        samples=samples(run, logs, own_reference),
        facts=facts(run, logs),
        command=clean(command(run), 4000),
        adapter=adapter_of(run),
        config=clean(json.dumps(run.config, indent=2, ensure_ascii=False), 20000),
        definitions=[one.text for one in definitions],
        limitations=limitations(run, logs),
    )
    for picture in made:
        if picture.png:
            write(run.folder / picture.name, picture.png)
    write(run.folder / "report.html", page.encode("utf-8", "replace"))
    return Built(run.folder / "report.html", run, found)


def _cell(scores: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    value = scores.get(name)
    known = metrics_table.number(value) is not None
    return {
        "name": f"{model}.{name}",
        "model": model,
        "value": json.dumps(value) if known else None,
        "text": metrics_table.format_number(value),
    }


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def embed(picture: Drawn, png: bytes) -> dict[str, Any]:
    """A picture as the values that the templates expect."""
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    return {
        "data": data,
        "width": width,
        "height": height,
        "alt": picture.alt,
        "title": picture.title,
        "caption": picture.caption,
        "photo": picture.photo,
    }
