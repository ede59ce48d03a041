"""The model of the pre-training job, which starts from random weights."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxlib_unlearn.errors import UserError
from models import Decoder, Tokenizer, bounds
from models.files import hub
from models.files.families import FAMILIES, new_config
from train.engine import base_models
from train.evaluators.evaluation import Model
from train.jobs.pretraining_options import PretrainConfig
from train.runtime import sharding
from train.runtime.checkpointing import params_sha256


def decoder_of(config: PretrainConfig) -> Decoder:
    """The decoder, without its weights.

    Raises:
        UserError: the sizes do not go together.
    """
    m = config.model
    kv_heads = m.num_heads if m.num_kv_heads is None else m.num_kv_heads
    rotary = "positions" not in FAMILIES[m.family].fields
    base_models.check_sizes(m.hidden_size, m.num_heads, kv_heads, rotary)
    shape = new_config(
        m.family,
        vocab_size=-(-m.vocab_size // 64) * 64,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=kv_heads,
        context=config.data.context,
        tie_embeddings=m.tie_embeddings,
        dtype=m.dtype,
    )
    return Decoder(shape, m.remat)


def tokenizer_of(config: PretrainConfig) -> Tokenizer | None:
    """The tokenizer that is given; None: one is trained.

    Raises:
        UserError: it is not found, or has more ids than the model.
    """
    name = config.data.tokenizer
    if name == "train":
        return None
    try:
        here = hub.local(name) if hub.is_here(name) else hub.download(name, weights=False)
        found = Tokenizer.from_folder(here)
    except UserError as error:
        raise UserError(f"--data.tokenizer {error}; or use --data.tokenizer train") from None
    if found.largest_id >= config.model.vocab_size:
        raise UserError(
            f"--data.tokenizer {name} has ids up to {found.largest_id}, the model "
            f"{config.model.vocab_size} (--model.vocab-size); give at least {found.largest_id + 1}"
        )
    return found


def base_model(config: PretrainConfig, tokenizer: Tokenizer, mesh: Any) -> Model:
    """The model with random weights, laid out on the mesh where it is drawn.

    Raises:
        UserError: it does not fit in memory.
    """
    decoder = decoder_of(config)
    shapes = decoder.shapes()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    bounds.check_memory(size, "--model.hidden-size and the other sizes", "make it smaller")
    where = sharding.param_shardings(shapes, mesh)
    params = jax.jit(decoder.init, out_shardings=where)(jax.random.key(config.seed))
    return Model(decoder, params, tokenizer, params_sha256(params))
