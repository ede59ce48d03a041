"""The model card (README.md) of an exported model: its origin, training and evaluation.

Its headline numbers are written in the Hub's form of evaluation results, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import yaml

from train import tasks
from train.evaluators.base import Metric
from train.reporting import metrics_table, verdict
from train.reporting.provenance import adapter_of, command, facts, limitations, made_by, title
from train.reporting.tables import Run
from train.runtime.cards import USE, cell, front, hub_model, table, usage_lines
from train.runtime.plain import clean


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _base(config: dict[str, Any]) -> str | None:
    """The Hub id that a run started from; None for a folder, a file or random weights."""
    stage, model = _section(config, "stage"), _section(config, "model")
    return hub_model(str(stage.get("original") or model.get("path")))


def _lasting(run: Run) -> Run:
    """The run without its timings, which differ between repetitions: the model does not."""
    return run._replace(about={k: run.about[k] for k in ("program", "command") if k in run.about})


def _headline(scores: Iterable[dict[str, Any]]) -> list[Metric]:
    """The metrics of a card, in reading order; `scores` are the metrics of some models."""
    names = {name for one in scores for name in metrics_table.metrics_of(one)}
    known = map(metrics_table.describe, metrics_table.ordered(names))
    return [metric for metric in known if metric.main and not metric.log10_of]


def results(run: Run) -> str | None:
    """The headline metrics of a run's judged model as `.eval_results/*.yaml` of the Hub.

    An entry is a data set, a task, a value of `summary.json` and a note, which says what was
    measured and the command that measures it again. The task is named after the forgotten split
    and the metric, such as `forget10_forget_rouge`; the Hub has a leaderboard only for tasks that
    the `eval.yaml` of the data set names. There are no dates, so that the same run gives the same
    text: the Hub takes the date of the commit.

    Args:
        run: configuration and summary.

    Returns:
        The YAML text; None for a smoke run, and for a run whose rows are no data set of the Hub:
        files, generated authors.
    """
    data_set, data = tasks.hub_id(run.config), _section(run.config, "data")
    if data_set is None or run.config.get("smoke"):
        return None
    again = re.sub(r"\s*\\\n\s*", " ", command(_lasting(run)))
    at = re.compile(rf"data: {re.escape(data_set)} at commit ([0-9a-f]{{40}})")
    commits = [found[1] for note in run.notes if (found := at.fullmatch(note))]
    entries, values = [], metrics_table.metrics_of(run.judged)
    for metric in _headline([run.judged]):
        if not math.isfinite(values[metric.name]):  # the Hub takes numbers
            continue
        task = {"id": data_set, "task_id": f"{data.get('forget_split')}_{metric.name}"}
        task |= {"revision": commits[0]} if commits else {}
        note = f"{metric.label}: {metric.aim}; {clean(again, 4000)}"
        entries.append({"dataset": task, "value": values[metric.name], "notes": note})
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=10**4)


def of_run(run: Run, logs: dict[str, dict[str, Any]] | None = None) -> str:
    """The card of a run's unlearned model, without file digests.

    Args:
        run: configuration and summary; the same run gives the same text.
        logs: per-item logs by model.
    """
    logs = logs or {}
    config, summary = run.config, run.summary
    models = [m for m in run.roles.models if m in summary]
    method = _section(config, "objective").get("name")
    smoke, found = bool(config.get("smoke")), verdict.of_run(run, logs)
    lines = [
        *front(("unlearning", str(method)), _base(config), tasks.hub_id(config)),
        f"# {'SMOKE RUN: ' if smoke else ''}{cell(title(run))}",
        "",
        f"**{cell(found.line)}**",
        "",
        f"{cell(made_by(run))}.",
        "",
        "A language model from which a part of what it knew was unlearned. `original` is the model "
        "before; `oracle`, where there is one, never saw what was to be forgotten.",
        "",
        "## Did it work?",
        "",
    ]
    if smoke:
        lines.append("A smoke run: steps and samples are cut, so there is no verdict.")
    else:
        rows = [(one.question, f"{one.answer} ({one.state})", one.text) for one in found.findings]
        lines += table(("question", "answer", "how it was judged"), rows)
    numbers = []
    for metric in _headline([summary[m] for m in models]):
        shown = [metrics_table.format_number(summary[m].get(metric.name)) for m in models]
        numbers.append((f"{metric.label} {metric.arrow}".strip(), *shown))
    lines += ["", "## Numbers", "", *table(("", *models), numbers), ""]
    lines += [f"{metrics_table.LEGEND}.", ""]
    lines += ["## Use", "", USE]
    if adapter := adapter_of(run):
        lines += ["### Its adapters", "", adapter.words, "", *usage_lines(adapter.usage)]
    told = _lasting(run)
    lines += ["## How it was made", "", "```sh", clean(command(told), 4000), "```", ""]
    lines += table(("", ""), facts(told, logs))
    lines += ["", "## Limits", "", *(f"- {cell(text)}" for text in limitations(told, logs)), ""]
    return "\n".join(lines)
