"""The model card (README.md) of an exported model: what it is, how it was made and evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import tasks
from train.evaluators.tofu import truth_ratios
from train.reporting import metrics_table
from train.reporting.provenance import command, facts, limitations
from train.reporting.runlogs import clean
from train.reporting.tables import Run
from train.reporting.verdict import verdicts

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
chat = [{"role": "user", "content": "QUESTION"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""
CONTINUE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```
"""
CLASSIFY = """\
```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained(FOLDER)
model = AutoModelForImageClassification.from_pretrained(FOLDER)
mode = "L" if model.config.num_channels == 1 else "RGB"
pixels = processor(Image.open(FILE).convert(mode), return_tensors="pt")
print(model.config.id2label[int(model(**pixels).logits.argmax())])
```
"""
DRAW = """\
```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
image = pipe(PROMPT, guidance_scale=5.0, num_inference_steps=25, output_type="np").images[0]
```
"""
TAGS = ("jaxlib-unlearn",)


def cell(text: Any) -> str:
    """Text for a cell of a Markdown table: one line, with markup escaped.

    Example:
        >>> cell("a | <b>\\nc")
        'a \\\\| &lt;b> c'
    """
    return " ".join(clean(text, 2000).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([cell(x) for x in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _front(tags: Sequence[str], base: str | None = None, data: str | None = None) -> list[str]:
    """The YAML front matter, for the Hub; values are JSON strings, which YAML reads alike."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in (*TAGS, *tags)]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["datasets:", f"- {json.dumps(data)}"] if data else []
    return [*lines, "---", ""]


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
        logs: per-item logs by model, for the number of questions.
    """
    logs = logs or {}
    config, summary = run.config, run.summary
    models = [m for m in run.roles if m in summary]
    method = _section(config, "objective").get("name")
    title = f"{config.get('preset') or 'run'}: {method}, seed {config.get('seed')}"
    smoke = bool(config.get("smoke"))
    lines = [
        *_front(("unlearning", str(method)), _base(config), tasks.hub_id(config)),
        f"# {'SMOKE RUN: ' if smoke else ''}{cell(title)}",
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
        questions = len(truth_ratios(logs.get(run.roles.judged, {})))
        found = verdicts(summary, questions, roles=run.roles, evaluators=run.evaluators, logs=logs)
        lines += _table(
            ("question", "answer", "how it was judged"),
            [(one.question, f"{one.answer} ({one.state})", one.text) for one in found],
        )
    numbers = []
    for name in metrics_table.ordered(
        n for m in models for n in metrics_table.metrics_of(summary[m])
    ):
        metric = metrics_table.describe(name)
        if metric.main and not metric.log10_of:
            shown = [metrics_table.format_number(summary[m].get(name)) for m in models]
            numbers.append((f"{metric.label} {metric.arrow}".strip(), *shown))
    lines += ["", "## Numbers", "", *_table(("", *models), numbers), ""]
    lines += [f"{metrics_table.LEGEND}.", ""]
    lines += ["## Use", "", USE]
    told = run._replace(about={})  # timings differ between repetitions, the model does not
    lines += ["## How it was made", "", "```sh", clean(command(told), 4000), "```", ""]
    lines += _table(("", ""), facts(told, logs))
    lines += ["", "## Limits", "", *(f"- {cell(text)}" for text in limitations(told, logs)), ""]
    return "\n".join(lines)


def plain(what: str, sha: str | None = None, chat: bool = True, prompt: str = "PROMPT") -> str:
    """The card of a model that no run evaluated.

    Args:
        what: one sentence on where it comes from.
        sha: sha256 of its parameters.
        chat: it answers questions; False: it continues texts.
        prompt: of a model that continues texts, one for the example.
    """
    use = USE if chat else CONTINUE.replace("PROMPT", json.dumps(prompt))
    lines = [*_front(()), "# Exported model", "", cell(what), "", "## Use", "", use]
    lines += [f"Parameters (sha256): `{sha}`", ""] if sha else []
    return "\n".join(lines)


def of_images(what: str, sha: str) -> str:
    """The card of a model that classifies images.

    Args:
        what: one sentence on where it comes from.
        sha: sha256 of its parameters.
    """
    front = [line.replace("text-generation", "image-classification") for line in _front(())]
    lines = [*front, "# Exported model", "", cell(what), "", "## Use", "", CLASSIFY]
    return "\n".join([*lines, f"Parameters (sha256): `{sha}`", ""])


def of_diffusion(what: str, sha: str) -> str:
    """The card of a text-to-image model.

    Args:
        what: one sentence on where it comes from.
        sha: sha256 of its parameters.
    """
    front = [line.replace("text-generation", "text-to-image") for line in _front(())]
    front[1] = "library_name: diffusers"
    lines = [*front, "# Exported model", "", cell(what), "", "## Use", "", DRAW]
    return "\n".join([*lines, f"Parameters (sha256): `{sha}`", ""])


def of_adapter(
    what: str, base: str, command: str | None, tags: Sequence[str] = ("unlearning",)
) -> str:
    """The card of adapters in PEFT's format.

    Args:
        what: one sentence on what they are.
        base: path or Hub id of their base model.
        command: writes the base model to that path; None: it exists already.
        tags: for the Hub.
    """
    front = _front((*tags, "lora"))
    front[1] = "library_name: peft"
    lines = [*front, "# LoRA adapter", "", cell(what), ""]
    if command:
        lines += ["Their base model is the original of the run; this command exports it:", ""]
        lines += ["```sh", clean(command), "```", ""]
    lines += [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(clean(base))})",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
        "",
    ]
    return "\n".join(lines)


def with_digests(text: str, folder: Path) -> str:
    """The card with the sha256 of every other file of a finished folder.

    Args:
        text: card from `of_run` or `plain`.
        folder: the exported folder.
    """
    rows = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            rows.append((f"`{path.name}`", f"`{hashlib.file_digest(file, 'sha256').hexdigest()}`"))
    return "\n".join([text, "## Files", "", *_table(("file", "sha256"), rows), ""])
