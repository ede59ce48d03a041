"""Model cards (README.md) of models that no run has judged, and the parts of all cards."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.runtime import files
from train.runtime.plain import clean

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
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes


def cell(text: Any) -> str:
    """Text for a cell of a Markdown table: one line, with markup escaped.

    Example:
        >>> cell("a | <b>\\nc")
        'a \\\\| &lt;b> c'
    """
    return " ".join(clean(text, 2000).split()).replace("|", "\\|").replace("<", "&lt;")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([cell(x) for x in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def front(tags: Sequence[str], base: str | None = None, data: str | None = None) -> list[str]:
    """The YAML front matter, for the Hub; values are JSON strings, which YAML reads alike."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in (*TAGS, *tags)]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["datasets:", f"- {json.dumps(data)}"] if data else []
    return [*lines, "---", ""]


def plain(what: str, sha: str | None = None, chat: bool = True, prompt: str = "PROMPT") -> str:
    """The card of a model that no run evaluated.

    Args:
        what: one sentence on its origin.
        sha: sha256 of its parameters.
        chat: whether it answers questions; if not, it continues texts.
        prompt: the prompt in the example, for a model that continues texts.
    """
    use = USE if chat else CONTINUE.replace("PROMPT", json.dumps(prompt))
    lines = [*front(()), "# Exported model", "", cell(what), "", "## Use", "", use]
    lines += [f"Parameters (sha256): `{sha}`", ""] if sha else []
    return "\n".join(lines)


def of_images(what: str, sha: str) -> str:
    """The card of a model that classifies images.

    Args:
        what: one sentence on its origin.
        sha: sha256 of its parameters.
    """
    head = [line.replace("text-generation", "image-classification") for line in front(())]
    lines = [*head, "# Exported model", "", cell(what), "", "## Use", "", CLASSIFY]
    return "\n".join([*lines, f"Parameters (sha256): `{sha}`", ""])


def of_diffusion(what: str, sha: str) -> str:
    """The card of a text-to-image model.

    Args:
        what: one sentence on its origin.
        sha: sha256 of its parameters.
    """
    head = [line.replace("text-generation", "text-to-image") for line in front(())]
    head[1] = "library_name: diffusers"
    lines = [*head, "# Exported model", "", cell(what), "", "## Use", "", DRAW]
    return "\n".join([*lines, f"Parameters (sha256): `{sha}`", ""])


def hub_model(path: str) -> str | None:
    """The repository that a model's name means; None for a folder, a file or random weights.

    Example:
        >>> hub_model("hub:owner/name@main"), hub_model("./owner/name"), hub_model("smollm2")
        ('owner/name', None, None)
    """
    repository = path.removeprefix("hub:").partition("@")[0]
    owner, _, name = repository.partition("/")
    is_id = owner and name and "/" not in name and not repository.startswith((".", "~"))
    return repository if is_id and not name.endswith(".gguf") and not Path(path).exists() else None


class Usage(NamedTuple):
    """The lines that load the adapters in `RUN/adapter` and the merged model in `RUN/export`."""

    python: str
    shell: str


def adapter_usage(base: str, rank: int, served: bool) -> Usage:
    """The lines that load adapters, with and without merging, in PEFT and in vLLM.

    Args:
        base: the path or Hub id of their base model.
        rank: their rank.
        served: whether vLLM serves adapters of such a model.
    """
    python = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(clean(base))})",
        'model = PeftModel.from_pretrained(base, "RUN/adapter")  # adapters beside their base',
        "model = model.merge_and_unload()  # merged, as the model in RUN/export is",
    ]
    shell = ["vllm serve RUN/export  # merged"]
    most = next((most for most in VLLM_RANKS if rank <= most), None)
    if served and most is not None:
        beside = "--enable-lora --lora-modules adapted=RUN/adapter --max-lora-rank"
        shell.insert(0, f"vllm serve {shlex.quote(clean(base))} {beside} {most}")
    return Usage("\n".join(python), "\n".join(shell))


def usage_lines(usage: Usage) -> list[str]:
    """The Markdown of a usage."""
    return ["```python", usage.python, "```", "", "```sh", usage.shell, "```", ""]


def of_adapter(
    what: str,
    base: str,
    command: str | None,
    usage: Usage,
    tags: Sequence[str] = ("unlearning",),
) -> str:
    """The card of adapters in PEFT's format.

    Args:
        what: one sentence that describes them.
        base: path or Hub id of their base model.
        command: the command that writes the base model to that path; None: it exists already.
        usage: the lines that load them.
        tags: the tags for the Hub.
    """
    head = front((*tags, "lora"), hub_model(base))
    head[1] = "library_name: peft"
    lines = [*head, "# LoRA adapter", "", cell(what), ""]
    if command:
        lines += ["Their base model is the original of the run; this command exports it:", ""]
        lines += ["```sh", clean(command), "```", ""]
    lines += ["`RUN` is the folder of the run, which holds these adapters in `RUN/adapter`.", ""]
    return "\n".join([*lines, *usage_lines(usage)])


def with_digests(text: str, folder: Path) -> str:
    """The card with the sha256 of every other file of a finished folder.

    Args:
        text: a card, as `of_run` or `plain` makes it.
        folder: the exported folder.
    """
    rows = [(f"`{name}`", f"`{digest}`") for name, digest in files.sums(folder).items()]
    return "\n".join([text, "## Files", "", *table(("file", "sha256"), rows), ""])
