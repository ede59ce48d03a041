"""The logs of a run folder per step and per question: `metrics.jsonl` and `evals/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluators import chosen
from train.evaluators.base import Samples
from train.evaluators.readability import judge
from train.reporting import tables
from train.reporting.tables import Run
from train.runtime import files
from train.runtime.plain import clean


def read_evals(run: Run) -> dict[str, dict[str, Any]]:
    """Per-item logs by model; the retain log stands in for a reference that was not trained.

    Raises:
        UserError: a log exists and cannot be read.
    """
    models = run.roles.order([*run.summary, *run.roles.models])
    paths = {model: run.folder / "evals" / f"{model}.json" for model in models}
    reference = run.roles.reference
    if not paths[reference].exists() and run.config.get("retain_log"):
        paths[reference] = Path(str(run.config["retain_log"]))
    for path in paths.values():
        files.check_key(path)
    found = {m: tables.read_json(p) for m, p in paths.items() if p.is_file()}
    return {m: log for m, log in found.items() if isinstance(log, dict)}


def question_of(prompt: str) -> str:
    """The last question in a rendered prompt, without the tags of the usual chat templates.

    Example:
        >>> question_of("<|im_start|>user\\nWho wrote it?<|im_end|>\\n<|im_start|>assistant\\n")
        'Who wrote it?'
    """
    text = str(prompt)
    turns = re.split(
        r"<\|im_start\|>user|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user", text
    )
    if len(turns) > 1:
        text = re.split(r"<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|im_start\|>", turns[-1])[0]
    elif turns := re.findall(r"(?s)user\n+(.*?)\s*assistant\s*$", text):
        text = turns[-1].split("user\n")[-1]  # a chat template whose special tokens were dropped
    else:
        text = re.split(r"\[/INST\]", re.split(r"\[INST\]", text)[-1])[0]
        text = re.split(r"\n\s*Answer:", re.split(r"(?:^|\n)\s*Question:", text)[-1])[0]
        text = re.sub(r"<\|[^|<>]{1,40}\|>|</?s>", " ", text)
    return text.strip() or str(prompt).strip()


def samples(
    run: Run, logs: dict[str, dict[str, Any]], reference: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The samples of the run's evaluators, with the answer of every model.

    Args:
        run: the run.
        logs: its per-item logs by model.
        reference: the log that sets the limits of readability, where the run has one of its own.
    """
    judged = {m: judge(log, reference) for m, log in logs.items()}
    unreadable = {m: found.reasons for m, found in judged.items() if found is not None}
    rows = [part for row in chosen(run.evaluators) for part in row.samples]
    made = (_part(part, logs, run.roles.judged, unreadable if part.forget else {}) for part in rows)
    return [part for part in made if part["entries"]]


def _part(
    part: Samples,
    logs: Mapping[str, Any],
    judged: str,
    unreadable: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    by_model = {model: part.read(log) for model, log in logs.items()}
    items = by_model.get(judged, {})
    keys = list(items)
    keys = [keys[int((i + 0.5) * len(keys) / part.count)] for i in range(part.count) if keys]
    keys = list(dict.fromkeys(keys))
    entries = []
    for key in keys:
        asked, truth = items[key].question, items[key].truth
        # A retain log of another split holds other questions: not answers to this one.
        answers = [
            {
                "model": model,
                "text": clean(found[key].text) or "(nothing)",
                "score": clean(found[key].score),
                "unreadable": unreadable.get(model, {}).get(key, ""),
            }
            for model, found in by_model.items()
            if key in found and found[key].truth.strip() == truth.strip()
        ]
        question = clean(question_of(asked))
        entries.append({"question": question, "truth": clean(truth), "answers": answers})
    how = "all of them" if len(keys) == len(items) else "evenly spaced and not chosen by hand"
    return {
        "title": part.title,
        "how": f"{len(keys)} of {len(items)} {part.items}, {how}; {part.how}.",
        "entries": entries,
    }
