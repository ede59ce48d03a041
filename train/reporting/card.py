"""The model card (README.md) of an exported model: its origin, training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train import tasks
from train.reporting import metrics_table, verdict
from train.reporting.provenance import command, facts, limitations, made_by, title
from train.reporting.tables import Run
from train.runtime.cards import USE, cell, front, table
from train.runtime.plain import clean


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _base(config: dict[str, Any]) -> str | None:
    """The Hub id that a run started from; None for a folder, a file or random weights."""
    path = str(_section(config, "stage").get("original") or _section(config, "model").get("path"))
    owner, _, name = path.partition("/")
    is_id = owner and name and "/" not in name and not path.startswith((".", "~"))
    return path if is_id and not path.endswith(".gguf") and not Path(path).exists() else None


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
    for name in metrics_table.ordered(
        n for m in models for n in metrics_table.metrics_of(summary[m])
    ):
        metric = metrics_table.describe(name)
        if metric.main and not metric.log10_of:
            shown = [metrics_table.format_number(summary[m].get(name)) for m in models]
            numbers.append((f"{metric.label} {metric.arrow}".strip(), *shown))
    lines += ["", "## Numbers", "", *table(("", *models), numbers), ""]
    lines += [f"{metrics_table.LEGEND}.", ""]
    lines += ["## Use", "", USE]
    told = run._replace(about={})  # timings differ between repetitions, the model does not
    lines += ["## How it was made", "", "```sh", clean(command(told), 4000), "```", ""]
    lines += table(("", ""), facts(told, logs))
    lines += ["", "## Limits", "", *(f"- {cell(text)}" for text in limitations(told, logs)), ""]
    return "\n".join(lines)
