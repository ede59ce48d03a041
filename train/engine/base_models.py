"""The model that a run starts from: tiny with random weights, or loaded from a path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

import models
from jaxlib_unlearn.errors import UserError
from models import Decoder, DecoderConfig, Tokenizer, bounds
from models.files.hub import check_source
from models.files.weights import find_smollm2
from train.data.bpe import train_bpe
from train.data.task import Task, texts
from train.evaluators.evaluation import Model
from train.options.config import ModelConfig, RunConfig
from train.runtime import distributed, seal, sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.tracking import say


def train_tokenizer(task: Task, vocab_size: int, split_digits: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the task's own texts."""
    return train_bpe(texts(task), vocab_size, split_digits)


def check_sizes(hidden_size: int, num_heads: int, num_kv_heads: int, rotary: bool = True) -> None:
    """Raise `UserError` for sizes of a new decoder that do not divide one another."""
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise UserError(
            f"--model.hidden-size {hidden_size}, --model.num-heads {num_heads} and "
            f"--model.num-kv-heads {num_kv_heads} must divide one another in this order"
        )
    if rotary and hidden_size // num_heads % 2:
        raise UserError(
            f"--model.hidden-size {hidden_size} over --model.num-heads {num_heads} gives "
            "an odd head size, which rotary positions cannot split; use an even one"
        )


def scratch_shape(m: ModelConfig, vocab_size: int, context: int) -> DecoderConfig:
    """The configuration of a decoder that starts from random weights.

    Raises:
        UserError: sizes that do not divide one another.
    """
    check_sizes(m.hidden_size, m.num_heads, m.num_kv_heads)
    return DecoderConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.hidden_size // m.num_heads,
        max_position_embeddings=context,
        dtype=m.dtype,
    )


def base_model(config: RunConfig, task: Task, mesh: Any) -> Model:
    """The model before any fine-tuning: random and tiny (`scratch`), or loaded.

    Raises:
        UserError: nothing is found at the path.
    """
    m = config.model
    if m.path == "scratch":
        tokenizer = train_tokenizer(task, m.vocab_size, m.split_digits)
        model = scratch_model(m, tokenizer, config.data.max_length, config.seed, mesh)
    else:
        model = load_model(m.path, m.remat, mesh, m.dtype, m.revision, task.notes)
    return masking_pad_ids(model) if m.mask_all_pad_id_tokens else model


def scratch_model(
    m: ModelConfig, tokenizer: Tokenizer, context: int, seed: int, mesh: Any
) -> Model:
    """A model with random weights, drawn by the seed.

    Raises:
        UserError: sizes that do not divide one another, or do not fit in memory.
    """
    shape = scratch_shape(m, tokenizer.vocab_size, context)
    sharding.check_heads(mesh, m.num_heads)
    decoder = Decoder(shape, m.remat)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoder.shapes()))
    bounds.check_memory(size, "--model.hidden-size and the other sizes", "make it smaller")
    params = sharding.put_params(jax.jit(decoder.init)(jax.random.key(seed)), mesh)
    return Model(decoder, params, tokenizer, params_sha256(params))


def masking_pad_ids(model: Model) -> Model:
    """The model with all tokens of the padding id masked from attention.

    Raises:
        UserError: the tokenizer has no padding token.
    """
    if model.tokenizer.pad_id is None:
        raise UserError(
            "--model.mask-all-pad-id-tokens: the tokenizer has no padding and no end token; leave "
            "the option out"
        )
    shape = dataclasses.replace(model.decoder.config, unattended=model.tokenizer.pad_id)
    return model._replace(decoder=dataclasses.replace(model.decoder, config=shape))


def model_source(path: str) -> str | Path:
    """The place that `models.load` reads: of `smollm2` the file of the installed package.

    Raises:
        UserError: that package is not installed.
    """
    if path != "smollm2":
        return path
    found = find_smollm2()
    if found is None:
        raise UserError(
            "SmolLM2 is not installed; run `make smollm2`, or give --model.path a folder or "
            ".gguf file"
        )
    return found


def check_model(path: str, revision: str | None = None) -> None:
    """Raise `UserError` for a `--model.path` without a model, before anything is read."""
    if path != "scratch":
        check_source(model_source(path), revision)
    elif revision is not None:
        raise UserError("--model.revision does not go with --model.path scratch; leave it out")


def load_model(
    path: str,
    remat: str,
    mesh: Any,
    dtype: str = "float32",
    revision: str | None = None,
    notes: list[str] | None = None,
) -> Model:
    """A model from an HF folder, a `.gguf` file, a Hub id or `smollm2`, to compute in `dtype`.

    For a Hub id the commit is printed and added to `notes`.

    Raises:
        UserError: nothing is found at the path, an export there is damaged, or the mesh splits more
            heads than there are.
    """
    distributed.of_first(lambda: seal.check(Path(path).expanduser()))
    with distributed.together():
        loaded = models.load(
            model_source(path),
            revision=revision,
            shardings=lambda name, shape: sharding.sharding_of(name, shape, mesh),
        )
        sharding.check_heads(mesh, loaded.decoder.config.num_heads)
    if loaded.commit is not None:
        note = f"model: {path} at commit {loaded.commit}"
        say(note)
        if notes is not None:
            notes.append(note)
    shape = dataclasses.replace(loaded.decoder.config, dtype=dtype)
    decoder = dataclasses.replace(loaded.decoder, config=shape, remat=remat)
    return Model(decoder, loaded.params, loaded.tokenizer, params_sha256(loaded.params))
