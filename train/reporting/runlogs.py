"""The logs of a run folder per step and per question: `metrics.jsonl` and `evals/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train.evaluators.base import items_of
from train.evaluators.numbers import format_number
from train.evaluators.numbers import number as finite
from train.evaluators.readability import judge
from train.options.roles import ROLES, Roles
from train.reporting import tables
from train.reporting.tables import Run
from train.runtime import files
from train.runtime.plain import clean

SAMPLES = {"forget": 5, "retain": 3}


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


def score_of(item: dict[str, Any]) -> Any:
    """The ROUGE-L of a generation: the recall of an answer, the F1 of a continuation."""
    return item.get("rougeL_recall", item.get("rougeL_f1"))


def samples(
    logs: dict[str, dict[str, Any]],
    reference: dict[str, Any] | None = None,
    roles: Roles = ROLES,
) -> list[dict[str, Any]]:
    """Evenly spaced questions of each split, with every model's greedy answer.

    `reference` is the log that sets the limits of readability, where the run has one of its own.
    """
    out = []
    judged = {m: judge(log, reference) for m, log in logs.items()}
    unreadable = {m: found.reasons for m, found in judged.items() if found is not None}
    for part, count in SAMPLES.items():
        by_model = {
            m: items_of(log, f"{part}_Q_A_ROUGE") or items_of(log, f"{part}_verbatim")
            for m, log in logs.items()
        }
        items = by_model.get(roles.judged, {})
        keys = list(items)
        keys = [keys[int((i + 0.5) * len(keys) / count)] for i in range(count)] if keys else []
        entries = []
        for key in dict.fromkeys(keys):
            truth = items[key].get("ground_truth", "")
            answers = []
            for model, found in by_model.items():
                item = found.get(key, {})
                # A retain log of another split holds other questions: not answers to this one.
                if item and str(item.get("ground_truth", "")).strip() == str(truth).strip():
                    answers.append({
                        "model": model, "text": clean(item.get("generation", "")) or "(nothing)",
                        "score": "" if (score := finite(score_of(item))) is None
                        else format_number(score),
                        "unreadable": unreadable.get(model, {}).get(key, "")
                        if part == "forget" else "",
                    })  # fmt: skip
            question = clean(question_of(items[key].get("input", "")))
            entries.append({"question": question, "truth": clean(truth), "answers": answers})
        if entries:
            texts = any(f"{part}_verbatim" in log for log in logs.values())
            what, asked = ("Documents", "starts") if texts else ("Facts", "questions")
            out.append({
                "title": f"{what} to {'forget' if part == 'forget' else 'keep'}",
                "how": f"{len(entries)} of {len(items)} {asked}, evenly spaced through the "
                "split and not chosen by hand; greedy answers.",
                "entries": entries,
            })  # fmt: skip
    return out
