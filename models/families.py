"""What differs between model families, as data: Hugging Face configs and the names of tensors.

A family says which keys of `config.json` matter, what they default to, and which optional leaves
its blocks have; the tensor table is shared. `from_hf` and `to_hf` are inverses of each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, one_line, reading
from models import bounds
from models.decoder import DecoderConfig
from models.layers import RopeScaling

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Args:
        architecture: the class name transformers expects under `architectures`.
        defaults: what transformers assumes for a key that `config.json` leaves out.
        biases: `none`; `qkv`; `attention`: as `attention_bias` says; `config`: as `attention_bias`
            and `mlp_bias` say.
        windows: sliding window of `none`, `all` blocks, or `some` (`use_sliding_window` decides).
        qk_norm: whether queries and keys are normalised per head.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(hash=False)
    biases: str = "none"
    windows: str = "none"
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, biases="config"),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        biases="qkv",
        windows="some",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "head_dim": 128,
        },
        biases="attention",
        windows="some",
        qk_norm=True,
    ),
}


class Slot(NamedTuple):
    """A leaf of the parameter tree and its names in files; `{}` stands for the block index."""

    path: str
    hf: str
    gguf: str
    transpose: bool


def _slots() -> Iterator[Slot]:
    yield Slot("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", False)
    yield Slot("final_norm/scale", "model.norm.weight", "output_norm.weight", False)
    yield Slot("lm_head/kernel", "lm_head.weight", "output.weight", True)

    def block(path: str, hf: str, gguf: str, transpose: bool) -> Slot:
        return Slot(f"layers/{path}", f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}", transpose)

    yield block("attn_norm/scale", "input_layernorm.weight", "attn_norm.weight", False)
    yield block("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", False)
    for ours, theirs, ggml in (
        ("attn/q", "self_attn.q_proj", "attn_q"),
        ("attn/k", "self_attn.k_proj", "attn_k"),
        ("attn/v", "self_attn.v_proj", "attn_v"),
        ("attn/o", "self_attn.o_proj", "attn_output"),
        ("mlp/gate", "mlp.gate_proj", "ffn_gate"),
        ("mlp/up", "mlp.up_proj", "ffn_up"),
        ("mlp/down", "mlp.down_proj", "ffn_down"),
    ):
        yield block(f"{ours}/kernel", f"{theirs}.weight", f"{ggml}.weight", True)
        yield block(f"{ours}/bias", f"{theirs}.bias", f"{ggml}.bias", False)
    yield block("attn/q_norm/scale", "self_attn.q_norm.weight", "attn_q_norm.weight", False)
    yield block("attn/k_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight", False)


SLOTS: tuple[Slot, ...] = tuple(_slots())


def _number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value: Any = raw.get(key)
    odd = isinstance(value, bool) or not isinstance(value, (int, float))
    if odd or not 0 < value < math.inf or value != kind(value):
        raise UserError(
            f"{where}: {key} is {one_line(repr(value), 40)}, not a positive {kind.__name__}; use "
            "the config.json the model was published with"
        )
    bounds.check_size(key, kind(value), where)
    return kind(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(
            f"{where}: {key} is {one_line(repr(value), 40)}, neither true nor false; use the "
            "config.json the model was published with"
        )
    return bool(value)


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = {} if raw.get(key) is None else raw[key]
        if not isinstance(part, Mapping) or any(isinstance(v, Mapping) for v in part.values()):
            shown = one_line(repr(part), 80)
            raise UserError(f"{where}: {key} {shown} is not one set of values for all blocks")
        rope |= part
    rope.setdefault("rope_theta", 10000.0 if raw.get("rope_theta") is None else raw["rope_theta"])
    theta = _number(rope, "rope_theta", float, where)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {partial} is not supported, only 1.0")
    named = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    kind = named[0] if named else "default"
    if kind not in ROPE_KINDS:
        raise UserError(
            f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return theta, None
    factor = _number(rope, "factor", float, where)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    original = rope.get("original_max_position_embeddings")
    if original is None:
        original = raw.get("original_max_position_embeddings", 8192)
    rope["original_max_position_embeddings"] = original
    return theta, RopeScaling(
        "llama3",
        factor,
        _number({"low_freq_factor": 1.0, **rope}, "low_freq_factor", float, where),
        _number({"high_freq_factor": 4.0, **rope}, "high_freq_factor", float, where),
        _number(rope, "original_max_position_embeddings", int, where),
    )


def _window(family: Family, raw: Mapping[str, Any], layers: int, where: str) -> int | None:
    size = raw.get("sliding_window")
    if family.windows == "none" or size is None:
        return None
    kinds = raw.get("layer_types")
    if family.windows == "some":
        if not _flag(raw, "use_sliding_window", where):
            return None
        if kinds is None:
            full = raw.get("max_window_layers", 28)
            if isinstance(full, bool) or not isinstance(full, int) or full < 0:
                raise UserError(
                    f"{where}: max_window_layers is {one_line(repr(full), 40)}, not a number of "
                    "blocks; use the config.json the model was published with"
                )
            full = min(layers, full)
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise UserError(f"{where}: layer_types is no list of {layers} kinds, one for each block")
    if kinds and set(kinds) == {"full_attention"}:
        return None
    if kinds and set(kinds) != {"sliding_attention"}:
        raise UserError(
            f"{where}: a sliding window in some blocks only is not supported; "
            "supported: in all blocks or in none"
        )
    return _number(raw, "sliding_window", int, where)


# What `from_hf` reads: a key that is one letter off one of these would be replaced by a default.
KEYS = (
    *("model_type", "quantization_config", "hidden_act", "num_attention_heads", "hidden_size"),
    *("num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias"),
    *("vocab_size", "intermediate_size", "tie_word_embeddings", "mlp_bias", "sliding_window"),
    *("max_position_embeddings", "rope_scaling", "rope_parameters", "rope_theta", "layer_types"),
    *("partial_rotary_factor", "original_max_position_embeddings", "use_sliding_window"),
    *("max_window_layers", "factor", "low_freq_factor", "high_freq_factor", "rope_type"),
)


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder configuration of a Hugging Face `config.json`.

    Args:
        raw: the parsed file; RoPE as `rope_parameters` or as `rope_theta` and `rope_scaling`.
        where: how error messages name the file.

    Returns:
        A `DecoderConfig` with `dtype` float32.

    Raises:
        UserError: unknown `model_type`, a feature the decoder lacks, a missing or invalid value, or
            a key that is misspelt by one letter.

    Example:
        >>> raw = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "head_dim": 4,
        ...        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> from_hf(raw).num_kv_heads
        2
    """
    with reading(where, "use the config.json the model was published with", "does not read"):
        return _from_hf(raw, where)


def _from_hf(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {one_line(repr(name), 60)} is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    inner = [raw.get(key) for key in ("rope_scaling", "rope_parameters")]
    for part in (raw, *(part for part in inner if isinstance(part, Mapping))):
        advice = "correct it, or use the config.json the model was published with"
        check_spelling(part, KEYS, where, advice)
    if raw.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; use the unquantised weights or a GGUF "
            "file"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        shown = one_line(repr(activation), 60)
        raise UserError(f"{where}: hidden_act {shown} is not supported; supported: silu")
    raw = {**family.defaults, "rms_norm_eps": 1e-6, **raw}
    heads = _number(raw, "num_attention_heads", int, where)
    hidden = _number(raw, "hidden_size", int, where)
    layers = _number(raw, "num_hidden_layers", int, where)
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.get("head_dim") is None:
        raw["head_dim"] = hidden // heads
    kv_heads = _number(raw, "num_key_value_heads", int, where)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}; use the config.json the model was published with"
        )
    if _number(raw, "head_dim", int, where) % 2:
        raise UserError(
            f"{where}: head_dim {raw['head_dim']} is odd, which rotary positions cannot split; use "
            "the config.json the model was published with"
        )
    theta, scaling = _rope(raw, where)
    asked = _flag(raw, "attention_bias", where) and family.biases in ("config", "attention")
    return DecoderConfig(
        vocab_size=_number(raw, "vocab_size", int, where),
        hidden_size=hidden,
        intermediate_size=_number(raw, "intermediate_size", int, where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_number(raw, "head_dim", int, where),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(raw, "rms_norm_eps", float, where),
        tie_embeddings=_flag(raw, "tie_word_embeddings", where),
        qk_norm=family.qk_norm,
        qkv_bias=asked or family.biases == "qkv",
        o_bias=asked,
        mlp_bias=_flag(raw, "mlp_bias", where) and family.biases == "config",
        sliding_window=_window(family, raw, layers, where),
        max_position_embeddings=_number(raw, "max_position_embeddings", int, where),
        family=name,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face `config.json` of a decoder, without dtype and token ids.

    RoPE is written in both styles, so that transformers 4 and 5 read it.

    Raises:
        UserError: the family cannot express the configuration (`from_hf` would differ).
    """
    if config.family not in FAMILIES:
        raise UserError(
            f"model family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.family]
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind}
    if scaling is not None:
        rope["factor"] = scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_position
    raw["rope_scaling"] = None if scaling is None else rope
    raw["rope_parameters"] = {"rope_theta": config.rope_theta, **rope}
    if family.biases in ("config", "attention"):
        raw["attention_bias"] = config.qkv_bias
    if family.biases == "config":
        raw["mlp_bias"] = config.mlp_bias
    if family.windows != "none":
        raw["sliding_window"] = config.sliding_window
    if family.windows == "some":
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = 0 if config.sliding_window is not None else config.num_layers
    # Settings of how a model is run, which no file holds.
    back = dataclasses.replace(from_hf(raw), dtype=config.dtype, unattended=config.unattended)
    names = [field.name for field in dataclasses.fields(config)]
    lost = [name for name in names if getattr(config, name) != getattr(back, name)]
    if lost:
        pairs = ", ".join(f"{key}={getattr(config, key)!r}" for key in lost)
        raise UserError(
            f"family {config.family!r} has no way to write {pairs}; choose another family of "
            f"{', '.join(FAMILIES)} or another value"
        )
    return raw
