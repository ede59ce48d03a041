"""A trained model as a sealed Hugging Face folder, written once, and again if damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from models.files.export import RESULTS
from models.files.weights import Loaded
from train.data.examples import encode_qa, written_chat_template
from train.options.config import LoraConfig
from train.runtime import cards, distributed, files, remote, seal
from train.runtime.stages import digest
from train.runtime.tracking import say


def speaking(tokenizer: Any) -> Any:
    """The tokenizer, with a chat template that renders the prompts where its own does not."""
    if tokenizer.has_chat_template and tokenizer.format.tags is None:
        return tokenizer
    found = tokenizer.with_template(written_chat_template(tokenizer))
    alone = tokenizer.formatted(tokenizer.format._replace(shots=()))
    probe = {"question": "Who wrote it?", "answer": "Nobody did.", "max_length": 10**6}
    same = all(
        encode_qa(found, **probe, system_prompt=system)
        == encode_qa(alone, **probe, system_prompt=system)
        for system in (None, "Be brief.")
    )
    # A tokenizer may tokenise text differently after a special token written as text.
    return found if same else tokenizer


def export_model(
    model: Any,
    folder: Path,
    dtype: str,
    text: str | None = None,
    max_new_tokens: int | None = None,
    speaks: bool = True,
    results: str | None = None,
) -> None:
    """Export a model as an HF folder, unless the folder already holds it with the same card.

    `text` is the model card; None: one that says where the model comes from. `max_new_tokens` is
    the default maximum length of its answers; `speaks`: it answers questions, so its tokenizer is
    given the template of its prompts; `results`: its evaluation in the Hub's form.
    """
    text = (
        cards.plain("A model fine-tuned with jaxlib-unlearn.", model.sha) if text is None else text
    )

    def write() -> None:
        tokenizer = speaking(model.tokenizer) if speaks else model.tokenizer
        loaded = Loaded(model.decoder.config, model.to_device().params, tokenizer)
        models.export(
            loaded,
            folder,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            card=lambda written: cards.with_digests(text, written),
            results=results,
        )

    sealed(folder, f"{model.sha} {dtype}", [text, max_new_tokens, results], write)


def sealed(folder: Path, model: str, written: Any, write: Callable[[], None]) -> None:
    """Write and seal a folder, unless it is there already.

    Args:
        folder: the folder to write.
        model: the model that the files are made from, in a line.
        written: the other contents of the files, as JSON values.
        write: a function that writes the folder; every process calls it.
    """
    made_from = f"{model} {digest(written)[:16]}"

    home = remote.home(folder.parent)

    def there() -> bool:
        found = seal.read(folder)
        if found is not None and found[0] == made_from and found[1]:
            wrong = seal.damage(folder, None if home == folder.parent else home / folder.name)
            if not wrong:
                return True
            say(f"{folder / wrong[0]} is damaged; exporting it again")
        for stale in (folder, *folder.parent.glob(f".{folder.name}.*")):  # left by a killed export
            shutil.rmtree(stale, ignore_errors=True)
        return False

    if distributed.of_first(there):
        return
    with distributed.together():
        write()
    distributed.of_first(lambda: seal.put(folder, made_from))


def export_adapter(
    trained: Any, adapters: LoraConfig, family: str, folder: Path, base: str, text: str
) -> None:
    """Write adapters in PEFT's format.

    Args:
        trained: the adapters.
        adapters: the options that they were made with.
        family: the family of the model that they belong to.
        folder: the folder to write.
        base: the path or Hub id of that model.
        text: their card.
    """
    rank = adapters.rank or 1
    with distributed.together():
        models.export_adapter(
            trained,
            folder,
            rank=rank,
            alpha=rank if adapters.alpha is None else adapters.alpha,
            base=base,
            family=family,
            card=text,
        )


def add_results(folder: Path, results: str) -> None:
    """Write evaluation results in the Hub's form into a folder of adapters, if there is one."""
    if folder.is_dir():
        path = folder / RESULTS
        path.parent.mkdir(exist_ok=True)
        files.write(path, results)


def is_served(family: str) -> bool:
    """Whether vLLM serves adapters of a family of models (its "Supported Models", column LoRA)."""
    return family != "gpt2"


def base_of(path: str) -> str | None:
    """The base that adapters name: a folder or Hub id; None for what they cannot name.

    That is another format, and one commit of a Hub id.
    """
    if path.endswith(".gguf") or path == "smollm2":
        return None
    if Path(path).exists():
        return str(Path(path).absolute())
    return None if "@" in path else path.removeprefix("hub:")
