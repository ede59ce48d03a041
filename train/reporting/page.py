"""The page of a run: its pictures, its table and what it says, as one self-contained HTML file."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from train.reporting import metrics_table, tables
from train.reporting.plain import shown
from train.reporting.provenance import command, facts, limitations
from train.reporting.runlogs import (
    clean,
    leak_scores,
    read_evals,
    read_steps,
    samples,
    truth_ratios,
)
from train.reporting.tables import Run
from train.reporting.verdict import SMOKE, verdicts
from train.runtime import files


class Picture(NamedTuple):
    """A picture of the page; without PNG bytes (not enough data) `missing` says why."""

    name: str
    title: str
    alt: str
    caption: str
    missing: str
    png: bytes | None


def pictures(run: Run, logs: dict[str, dict[str, Any]]) -> list[Picture]:
    """curves.png, facts.png, leak.png and truth_ratio.png of a run."""
    import numpy as np

    from train.reporting import plots

    s, show = run.summary, metrics_table.format_number
    logged = read_steps(run.folder / "metrics.jsonl", _say)
    steps = [r for r in logged if r["stage"] == "unlearned"]
    scores = {m: np.asarray(leak_scores(log), float) for m, log in logs.items() if leak_scores(log)}
    values = {m: np.asarray(truth_ratios(log)) for m, log in logs.items() if truth_ratios(log)}
    distance, p = (
        metrics_table.number(s["unlearned"].get(n)) for n in ("forget_ks", "forget_quality")
    )

    def across(name: str) -> str:
        pairs = [(m, s[m].get(name)) for m in metrics_table.MODELS if m in s]
        return ", ".join(f"{m} {show(v)}" for m, v in pairs if metrics_table.number(v) is not None)

    ks = metrics_table.leak_ks(s["unlearned"])
    at_k = across(f"leak_at_{ks[-1]}") if ks else ""
    made = (
        (
            "curves.png",
            "While it unlearns",
            plots.curves(steps, s.get("oracle")),
            f"Lines over {len(steps)} logged unlearning steps. At the end, forget ROUGE-L: "
            f"{across('forget_rouge')}; retain ROUGE-L: {across('retain_rouge')}.",
            "Forget and retain while unlearning. The forget line should come down to the oracle's "
            "level, the retain line should stay up.",
            "No curves: metrics.jsonl has no steps of the stage 'unlearned'.",
        ),
        (
            "facts.png",
            "Fact recall",
            plots.fact_recall(s),
            f"Bars, a pair a model. Facts to forget: {across('forget_fact_recall')}; facts to "
            f"keep: {across('retain_fact_recall')}.",
            "How many of the true values (names, dates, words) stand in the greedy answers. The "
            "oracle, which never saw the facts to forget, gets some of them right by chance.",
            "No fact recall: only generated authors say which words of an answer are the fact.",
        ),
        (
            "leak.png",
            "Leak under sampling",
            plots.leak(scores, s),
            "leak@k over k, a line a model" + (f"; at k = {ks[-1]}: {at_k}." if ks else "."),
            "leak@k: the best of k sampled answers, scored against the truth. A model that only "
            "hides the facts from greedy decoding rises towards the original's line.",
            "No leak@k: no answers were sampled (--evaluate.leak-samples).",
        ),
        (
            "truth_ratio.png",
            "Truth ratios of the facts to forget",
            plots.truth_ratio(plots.Ratios(values, distance, p)),
            "Cumulative distributions of the truth ratio on the forget questions. KS distance to "
            f"the oracle: {across('forget_ks')}.",
            "Truth ratios on the forget questions. The test behind forget quality asks whether the "
            "unlearned line and the oracle's could be one; the black bar is the KS distance.",
            "No truth ratios in evals/.",
        ),
    )
    smoke = "SMOKE: " if run.config.get("smoke") else ""
    return [
        Picture(n, t, alt, c, no, f and plots.png(f, smoke + t)) for n, t, f, alt, c, no in made
    ]


def _say(message: str) -> None:
    print(shown(message), file=sys.stderr)


def write(path: Path, data: bytes) -> None:
    try:
        files.write(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _rows(run: Run, models: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in metrics_table.ordered(
        n for m in models for n in metrics_table.metrics_of(run.summary[m])
    ):
        if name == metrics_table.LOG10_P:  # the same number again
            continue
        metric = metrics_table.describe(name)
        head, _, tail = metric.label.rpartition(" ")
        rows.append(
            {
                "head": head,
                "tail": tail,
                "explain": metric.explain,
                "arrow": metrics_table.ARROWS[metric.better],
                "direction": metrics_table.DIRECTIONS[metric.better],
                "cells": [_cell(run.summary[m], m, name) for m in models],
            }
        )
    return rows


def build(run_dir: str | Path) -> Path:
    """Write `report.html` and its pictures (`curves.png` and others) into a run folder.

    Args:
        run_dir: folder with config.json, summary.json, and if there metrics.jsonl and evals/.

    Returns:
        The path of the page.

    Raises:
        UserError: not the folder of a finished run, a damaged file, or a write that failed.
    """
    run = tables.load_run(run_dir)
    logs = read_evals(run)
    models = [m for m in metrics_table.MODELS if m in run.summary]
    models += sorted(set(run.summary) - set(models))
    made = pictures(run, logs)
    preset, seed = run.config.get("preset") or run.folder.name, run.config.get("seed")
    objective = run.config.get("objective")
    method = objective.get("name") if isinstance(objective, dict) else objective
    smoke = bool(run.config.get("smoke"))
    own_oracle = logs.get("oracle") if "oracle" in run.summary else None
    page = render(
        "report.html.j2",
        smoke=SMOKE if smoke else "",
        title=f"{preset}, {method}, seed {seed}" if method else f"{preset}, seed {seed}",
        lead="A model that knows a set of facts was made to forget a part of them. Below: whether "
        "it forgot, what it kept, and how that was measured.",
        verdicts=verdicts(run.summary, len(truth_ratios(logs.get("unlearned", {}))), smoke),
        directions=[
            (metrics_table.ARROWS[k], text) for k, text in metrics_table.DIRECTIONS.items() if k
        ],
        models=models,
        rows=_rows(run, models),
        retain_log=bool(run.config.get("retain_log")),
        pictures=[embed(p, p.png) for p in made if p.png],
        no_pictures=[p.missing for p in made if not p.png],
        samples=samples(logs, own_oracle),
        facts=facts(run, logs),
        command=clean(command(run), 4000),
        config=clean(json.dumps(run.config, indent=2, ensure_ascii=False), 20000),
        limitations=limitations(run, logs),
    )
    for picture in made:
        if picture.png:
            write(run.folder / picture.name, picture.png)
    write(run.folder / "report.html", page.encode("utf-8", "replace"))
    return run.folder / "report.html"


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


def embed(picture: Picture, png: bytes) -> dict[str, Any]:
    """A picture as the templates take it."""
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(png).decode("ascii")
    return {
        "data": data,
        "width": width,
        "height": height,
        "alt": picture.alt,
        "title": picture.title,
        "caption": picture.caption,
    }
