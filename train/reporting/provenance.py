"""A run in words: its facts, the command that repeats it, the limitations of its numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from train.evaluators.base import items_of
from train.evaluators.leak import leak_scores
from train.evaluators.numbers import format_number
from train.evaluators.tofu import truth_ratios
from train.options.roles import QUESTION_ANSWERING
from train.reporting.tables import Run
from train.runtime.cards import Usage, adapter_usage
from train.runtime.plain import clean


def command(run: Run) -> str:
    """The command that repeats the run, one option per line.

    Where none is stored, it takes the stored configuration.
    """
    given = run.config.get("command") or run.about.get("command")
    if given:
        return given if isinstance(given, str) else shlex.join(map(str, given))
    program = run.about.get("program") or "train.unlearn"
    return f"python -m {program} --config RUN/config.json"


def _options(section: Any) -> str:
    if not isinstance(section, dict):
        return str(section)
    rest = {k: v for k, v in section.items() if k != "name" and v is not None and v != ""}
    text = ", ".join(f"{k} {v}" for k, v in rest.items() if not isinstance(v, dict | list))
    name = section.get("name", "")
    return f"{name} ({text})" if name and text else f"{name}{text}"


def _size(run: Run) -> int | None:
    for scores in (run.judged, run.config):
        if isinstance(scores.get("num_parameters"), int):
            return scores["num_parameters"]
    return None


def _tiny(run: Run) -> bool:
    size, model = _size(run), run.config.get("model")
    if size is not None:
        return size < 20e6
    from_scratch = isinstance(model, dict) and "path" in model and not _path(run)
    return run.config.get("preset") == "quickstart" or from_scratch and not _original(run)


def _path(run: Run) -> str:
    """The path of the model that the run started from; "" for random weights."""
    model = run.config.get("model")
    path = model.get("path") if isinstance(model, dict) else model
    return "" if path in (None, "scratch") else str(path)


def _original(run: Run) -> Any:
    stage = run.config.get("stage")
    return stage.get("original") if isinstance(stage, dict) else None


def _model(run: Run) -> str:
    size, text = _size(run), str(_original(run) or _path(run))
    if not text:
        text = "trained from scratch" if _tiny(run) else "the preset's own"
    return text + (f", {size / 1e6:,.1f} M parameters" if size else "") + ", tiny" * _tiny(run)


def _trains(run: Run) -> bool:
    """Whether steps of the optimizer were taken: closed forms and random tokens need none."""
    ways = {key: run.config.get(key) for key in ("erase", "attack")}
    names = {key: way.get("name") for key, way in ways.items() if isinstance(way, dict)}
    if not names:
        return True
    from train.tasks.erasure import ATTACKS, ERASING  # imports jax, which other pages do not

    tables = {"erase": ERASING.table, "attack": ATTACKS.table}
    rows = [tables[key].get(str(name)) for key, name in names.items()]
    return all(row is None or row.trains for row in rows)


def title(run: Run) -> str:
    """The title of a page or a card: what was forgotten from what, else how it was made."""
    subject = str(run.about.get("subject") or "")
    if not subject:
        return made_by(run)
    path = str(_original(run) or _path(run))
    model = Path(path).name if path else "a tiny model" if _tiny(run) else "its model"
    return f"{subject[0].upper()}{subject[1:]}, forgotten by {model}"


def made_by(run: Run) -> str:
    """The preset, the method and the seed of a run."""
    config = run.config
    objective, erase, attack = (config.get(name) for name in ("objective", "erase", "attack"))
    done = objective.get("name") if isinstance(objective, dict) else objective
    target = Path(str(config.get("run"))).name
    if isinstance(erase, dict):
        done = f"{erase.get('concept')} erased by {erase.get('name')}"
    elif "defend" in config:
        done = f"{target} defended"
    elif isinstance(attack, dict):
        done = f"{attack.get('name')} on {target}"
    parts = [config.get("preset") or run.folder.name, done, f"seed {config.get('seed')}"]
    return ", ".join(str(part) for part in parts if part)


class Adapter(NamedTuple):
    """The adapters of a run in words, and the lines that load them."""

    words: str
    usage: Usage


def adapter_of(run: Run) -> Adapter | None:
    """The adapters that a run saved in PEFT's format; None for a run without, or damaged ones."""
    folder = run.folder / "adapter"
    try:
        found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, rank = str(found["base_model_name_or_path"]), int(found["r"])
        served = not found["fan_in_fan_out"]  # GPT-2's layout: vLLM serves no adapters of it
    except (OSError, ValueError, KeyError, TypeError):
        return None
    words = (
        f"The run saved its LoRA adapters of rank {rank} in `RUN/adapter`, in PEFT's format, and "
        "the model with them merged in `RUN/export`; `RUN` is the folder of the run."
    )
    if Path(base).parent.resolve() == run.folder.resolve():
        base = f"RUN/{Path(base).name}"
        words += f" The command that writes their base, `{base}`, is in `RUN/adapter/README.md`."
    return Adapter(words, adapter_usage(base, rank, served))


def facts(run: Run, logs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The facts of a run, as pairs of name and text."""
    config, data = run.config, run.config.get("data")
    log = logs.get(run.roles.judged, {})
    counts = []
    for part, prefix in (
        ("forget", "forget"),
        ("retain", "retain"),
        ("real authors", "ra"),
        ("world facts", "wf"),
    ):
        n = max(
            (len(items_of(log, f"{prefix}_Q_A_{tail}")) for tail in ("ROUGE", "Prob")), default=0
        )
        counts += [f"{n} {part}"] if n else []
    leak_rows = leak_scores(log)
    if leak_rows:
        counts.append(f"{len(leak_rows[0])} sampled answers to each of {len(leak_rows)}")
    where = (data.get("path") if isinstance(data, dict) else None) or "the preset's own"
    if isinstance(data, dict) and data.get("digest"):
        where = f"corpus of {data.get('path') or data.get('source')}, sha256 {data['digest']}"
    split = data.get("forget_split") if isinstance(data, dict) else None
    if isinstance(data, dict) and data.get("forget"):
        where, split = f"your own: {data['forget']} to forget, {data.get('retain')} to keep", None
    subject = str(run.about.get("subject") or "") if split else ""
    smoke = " (smoke: shrunk, its numbers mean little)" if config.get("smoke") else ""
    rows = [
        ("Preset", str(config.get("preset", "")) + smoke),
        ("Seed", str(config.get("seed", ""))),
        ("Model", _model(run)),
        ("Data", f"{where}, forgetting {subject or split}" if split else str(where)),
        ("Questions evaluated", ", ".join(counts)),
        ("Of the run", str(config.get("run") or "")),
        ("Erased by", _options(config.get("erase", ""))),
        ("Attack", _options(config.get("attack", ""))),
        ("Defence", _options(config.get("defend", ""))),
        ("Objective", _options(config.get("objective", ""))),
        ("Optimizer", _options(config.get("optimizer", "")) if _trains(run) else ""),
    ]
    adapters = config.get("lora")
    if isinstance(adapters, dict) and adapters.get("rank"):
        alpha = adapters.get("alpha") or adapters["rank"]
        on = ", ".join(adapters.get("targets") or ())
        what = f"LoRA adapters of rank {adapters['rank']}, alpha {alpha}, on {on}"
        rows.append(("Trained", what))
    selected = config.get("train")
    if (
        _trains(run)
        and isinstance(selected, dict)
        and (selected.get("leaves") or selected.get("blocks"))
    ):
        names = ", ".join(selected.get("leaves") or ["all leaves"])
        blocks = ", ".join(map(str, selected.get("blocks") or ()))
        rows.append(("Trained", names + (f" of blocks {blocks}" if blocks else "")))
    if config.get("combine", "sum") != "sum":
        rows.append(("Gradients of the sides", str(config["combine"])))
    if not run.summary.get(run.roles.reference) and config.get("retain_log"):
        rows.append(("Retain log in place of the oracle", str(config["retain_log"])))
    minutes = run.about.get("minutes")
    if isinstance(minutes, dict):
        spent = [f"{name} {format_number(float(m))}" for name, m in minutes.items()]
        rows.append(("Minutes", ", ".join(spent)))
    versions = [f"{name} {run.about[name]}" for name in ("jax", "python") if name in run.about]
    if "device" in run.about:
        rows.append(("Ran on", ", ".join([str(run.about["device"]), *versions])))
    for model, scores in run.summary.items():
        if scores.get("params_sha256"):
            rows.append((f"Parameters of {model} (sha256)", str(scores["params_sha256"])))
    return [(name, clean(value)) for name, value in rows if value]


def limitations(run: Run, logs: dict[str, dict[str, Any]]) -> list[str]:
    """The limitations of the numbers, and the run's own notes."""
    questions = "tofu" in run.evaluators
    judged = run.summary.get(run.roles.judged, {})
    tested = questions and judged.get("forget_quality") is not None
    n = len(truth_ratios(logs.get(run.roles.judged, {}))) if tested else 0
    out = []
    if run.config.get("smoke"):
        out.append(
            "This is a smoke run: steps and samples are cut to see the program work. Its numbers "
            "say nothing about the method."
        )
    asked = bool(set(run.evaluators) & set(QUESTION_ANSWERING))
    if _tiny(run) and asked:
        out.append(
            "This is a tiny model, trained from scratch on generated facts. It shows that the "
            "method and the measurements work, not how a large model behaves."
        )
    if n:
        coarse = ", so p is coarse: read it in decades" if n < 300 else ""
        out.append(f"Forget quality rests on {n} questions{coarse}.")
    out += [
        "This is one seed. python -m train.report RUN RUN ... gives mean and spread over several.",
    ]
    if tested:
        out.append(
            "A p above .05 does not prove that the facts are gone. It says that this test does not "
            "tell the model from the oracle."
        )
    if asked:
        out += _OF_QUESTIONS
    out += [clean(note) for note in run.notes]
    return list(dict.fromkeys(out))


_OF_QUESTIONS = (
    "ROUGE-L counts words in order: the right sentence around a wrong fact still scores.",
    "Fine-tuning and quantising can bring facts back. Neither attack is part of this page.",
)
