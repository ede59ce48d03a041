"""CLIP text encoders in Hugging Face folders: names of their tensors, and `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, one_line, reading
from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.files.families import positive
from models.files.tensors import Slot, Table

# Words for the activation in `config.json`, the same as ours; `gelu` is used by v2's encoder.
ACTIVATIONS = ("quick_gelu", "gelu")
MODEL_TYPE = "clip_text_model"
# The defaults that transformers gives to keys that are left out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_positions": "max_position_embeddings",
}


def _slots() -> Iterator[Slot]:
    outer = "text_model.embeddings"
    yield Slot("embed/embedding", f"{outer}.token_embedding.weight", "", False)
    yield Slot("positions/embedding", f"{outer}.position_embedding.weight", "", False)
    block = "text_model.encoder.layers.{}"
    for path, name in {
        "final_norm": "text_model.final_layer_norm",
        "layers/attn_norm": f"{block}.layer_norm1",
        "layers/mlp_norm": f"{block}.layer_norm2",
    }.items():
        yield Slot(f"{path}/scale", f"{name}.weight", "", False)
        yield Slot(f"{path}/bias", f"{name}.bias", "", False)
    for path, name in {
        "attn/q": "self_attn.q_proj",
        "attn/k": "self_attn.k_proj",
        "attn/v": "self_attn.v_proj",
        "attn/o": "self_attn.out_proj",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
    }.items():
        yield Slot(f"layers/{path}/kernel", f"{block}.{name}.weight", "", True)
        yield Slot(f"layers/{path}/bias", f"{block}.{name}.bias", "", False)


# transformers 5 leaves the prefix out where it writes; old files have a buffer of 0 to 76.
HF = Table(
    tuple(_slots()),
    optional_prefix="text_model.",
    unused=r"^(text_model\.)?embeddings\.position_ids$",
)


def hf_config(raw: Mapping[str, Any], where: str) -> ClipTextConfig:
    """The configuration that a `config.json` describes.

    Args:
        raw: its content.
        where: the file, as messages name it.

    Returns:
        The configuration; keys that are left out have transformers' defaults, and keys that do not
        affect the computation are not read.

    Raises:
        UserError: another kind of model, a misspelt key, or a value that is not supported.

    Example:
        >>> hf_config({"model_type": MODEL_TYPE}, "config.json").hidden_size
        512
    """
    advice = "use the config.json the model was published with"
    if raw.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{where}: model_type {one_line(repr(raw.get('model_type')), 60)} is no text encoder "
            f"that is read; supported: {MODEL_TYPE}"
        )
    check_spelling(raw, ("model_type", *DEFAULTS), where, f"correct it, or {advice}")
    raw = {**DEFAULTS, **raw}
    if raw["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {one_line(repr(raw['hidden_act']), 60)} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    with reading(where, advice, "does not read"):
        found = ClipTextConfig(
            **{ours: positive(raw, theirs, int, where) for ours, theirs in SIZES.items()},
            norm_eps=positive(raw, "layer_norm_eps", float, where),
            activation=raw["hidden_act"],
        )
        ClipText(found)
    return found


def to_hf(config: ClipTextConfig) -> dict[str, Any]:
    """The `config.json` of a text encoder; `hf_config` reads it as the same configuration.

    Example:
        >>> to_hf(ClipTextConfig())["hidden_size"]
        768
    """
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }
