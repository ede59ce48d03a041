"""Differences between model families, as data: Hugging Face configs and names of tensors.

A family lists the keys of `config.json` that matter with their names and defaults, the fields of
the decoder's configuration that it fixes, and its table of tensors. `from_hf` and `to_hf` are
inverses of each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, one_line, reading
from models import bounds
from models.decoder.layers import RopeScaling
from models.decoder.model import DecoderConfig
from models.files import tensors

ROPE_KINDS = ("default", "linear", "llama3")
FLAGS = ("attention_bias", "mlp_bias", "enable_bias")

# The keys that `from_hf` reads, by their most frequent names: a key that is one letter off one of
# these would be replaced by a default.
SHAPE_KEYS = (
    *("model_type", "quantization_config", "hidden_act", "num_attention_heads", "hidden_size"),
    *("num_hidden_layers", "vocab_size", "intermediate_size", "tie_word_embeddings"),
    "max_position_embeddings",
)
# Keys of models with rotary positions, RMS norms and grouped queries only.
ROTARY_KEYS = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias", "mlp_bias"),
    *("sliding_window", "rope_scaling", "rope_parameters", "rope_theta", "layer_types"),
    *("partial_rotary_factor", "original_max_position_embeddings", "use_sliding_window"),
    *("max_window_layers", "factor", "low_freq_factor", "high_freq_factor", "rope_type"),
)
NO_ROTARY_KEYS = dict.fromkeys(ROTARY_KEYS, "")


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Args:
        architecture: the class name transformers expects under `architectures`.
        defaults: the values that transformers assumes for keys that `config.json` leaves out.
        table: the table of its tensors.
        biases: fields of `DecoderConfig` to the key that says whether they are there, or to True.
        windows: the blocks with a sliding window: `none`, `all`, or `some` (`use_sliding_window`).
        qk_norm: whether queries and keys are normalised per head.
        keys: names in `config.json` where they are not those of `SHAPE_KEYS` and `ROTARY_KEYS`; "":
            it has no such key.
        fields: fields of `DecoderConfig` that no key decides.
        activations: words for the activation in `config.json`, mapped to ours; export writes
            the first one.
        must: keys with the one value that is supported, and a name for the other values.
        equal: keys that must be absent or equal another key.
        mlp_ratio: the width of the MLP over `hidden_size` where `config.json` has none.
        dropout: keys of dropout rates, which are written as 0.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(hash=False)
    table: tensors.Table = field(default=tensors.LLAMA, hash=False)
    biases: Mapping[str, str | bool] = field(default_factory=dict, hash=False)
    windows: str = "none"
    qk_norm: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    activations: Mapping[str, str] = field(
        default_factory=lambda: {"silu": "silu", "swish": "silu"}, hash=False
    )
    must: Mapping[str, tuple[Any, str]] = field(default_factory=dict, hash=False)
    equal: Mapping[str, str] = field(default_factory=dict, hash=False)
    mlp_ratio: int | None = None
    dropout: tuple[str, ...] = ("attention_dropout",)

    def key(self, name: str) -> str:
        """The name of a key in `config.json`; "": there is none."""
        return self.keys.get(name, name)

    @property
    def known(self) -> list[str]:
        """All keys that are read."""
        named = [self.key(name) for name in (*SHAPE_KEYS, *ROTARY_KEYS)]
        return [name for name in (*named, *self.must, *self.equal) if name]


_ATTENTION = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
# Norms with biases, a table of positions, MLPs of two layers.
_BEFORE_LLAMA = {"norm": "layer", "positions": "learned", "mlp": "plain"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        biases={**_ATTENTION, "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        biases={"qkv_bias": True},
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
        biases=_ATTENTION,
        windows="some",
        qk_norm=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        tensors.GPT2,
        biases={"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        keys={
            **NO_ROTARY_KEYS,
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        fields=_BEFORE_LLAMA,
        activations={"gelu_new": "gelu_new", "relu": "relu", "silu": "silu"},
        must={
            "scale_attn_weights": (True, "attention scores without a scale"),
            "scale_attn_by_inverse_layer_idx": (False, "a scale of the scores by block"),
            "add_cross_attention": (False, "attention to an encoder"),
        },
        mlp_ratio=4,
        dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    "opt": Family(
        "OPTForCausalLM",
        {
            "max_position_embeddings": 2048,
            "ffn_dim": 3072,
            "activation_function": "relu",
            "tie_word_embeddings": True,
            "enable_bias": True,
        },
        tensors.OPT,
        biases=dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "enable_bias"),
        keys={
            **NO_ROTARY_KEYS,
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
        },
        fields={**_BEFORE_LLAMA, "position_offset": 2, "norm_eps": 1e-5},
        activations={"relu": "relu", "gelu_new": "gelu_new", "silu": "silu"},
        must={
            "do_layer_norm_before": (True, "norms after each sum, as in OPT-350m"),
            "_remove_final_layer_norm": (False, "no norm after the last block"),
            "layer_norm_elementwise_affine": (True, "norms without scale and bias"),
        },
        equal={"word_embed_proj_dim": "hidden_size"},
        dropout=("dropout", "attention_dropout"),
    ),
}


def family_of(config: DecoderConfig) -> Family:
    """The family of a configuration.

    Raises:
        UserError: there is none of that name.
    """
    if config.family not in FAMILIES:
        raise UserError(
            f"model family {config.family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.family]


def new_config(
    family: str,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    context: int,
    intermediate_size: int | None = None,
    num_kv_heads: int | None = None,
    **changes: Any,
) -> DecoderConfig:
    """The configuration of a new model, for random weights.

    Args:
        family: one of `FAMILIES`; it decides norms, positions, MLPs, biases and names in files.
        vocab_size: the number of embeddings.
        hidden_size: the width of the residual stream, a multiple of `num_heads`.
        num_layers: the number of blocks.
        num_heads: the number of attention heads.
        context: longest row in tokens.
        intermediate_size: width of the MLP; None: four times `hidden_size`.
        num_kv_heads: the number of key-value heads; None: `num_heads`.
        **changes: other fields of `DecoderConfig`.

    Returns:
        The configuration; embeddings are tied, `dtype` is float32.

    Raises:
        UserError: an unknown family, sizes that do not divide, or a value that the family's
            `config.json` cannot express.

    Example:
        >>> config = new_config("gpt2", vocab_size=512, hidden_size=64, num_layers=2, num_heads=4,
        ...                     context=128)
        >>> config.positions, config.norm, config.mlp, config.activation, config.intermediate_size
        ('learned', 'layer', 'plain', 'gelu_new', 256)
    """
    if family not in FAMILIES:
        raise UserError(
            f"model family {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    row = FAMILIES[family]
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if hidden_size % num_heads or num_heads % kv_heads:
        raise UserError(
            f"hidden size {hidden_size}, {num_heads} heads and {kv_heads} key-value heads must "
            "divide one another in this order"
        )
    decided: dict[str, Any] = {
        "qk_norm": row.qk_norm,
        "activation": next(iter(row.activations.values())),
        **{
            name: row.defaults.get(key, False) if isinstance(key, str) else key
            for name, key in row.biases.items()
        },
        **row.fields,
        **changes,
    }
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size if intermediate_size is None else intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=decided.pop("head_dim", hidden_size // num_heads),
        max_position_embeddings=context,
        family=family,
        **decided,
    )
    to_hf(config)
    return config


def positive(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A positive number of a `config.json`; anything else is a `UserError`."""
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
    theta = positive(rope, "rope_theta", float, where)
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
    factor = positive(rope, "factor", float, where)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    original = rope.get("original_max_position_embeddings")
    if original is None:
        original = raw.get("original_max_position_embeddings", 8192)
    rope["original_max_position_embeddings"] = original
    return theta, RopeScaling(
        "llama3",
        factor,
        positive({"low_freq_factor": 1.0, **rope}, "low_freq_factor", float, where),
        positive({"high_freq_factor": 4.0, **rope}, "high_freq_factor", float, where),
        positive(rope, "original_max_position_embeddings", int, where),
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
    return positive(raw, "sliding_window", int, where)


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder configuration of a Hugging Face `config.json`.

    Args:
        raw: the parsed file; RoPE as `rope_parameters` or as `rope_theta` and `rope_scaling`.
        where: the name of the file in error messages.

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
        check_spelling(part, family.known, where, advice)
    if raw.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; use the unquantised weights or a GGUF "
            "file"
        )
    raw = {**family.defaults, **raw}

    def number(key: str, kind: type) -> Any:
        return positive(raw, family.key(key), kind, where)

    act = family.key("hidden_act")
    activation = raw.get(act, "silu")
    if not isinstance(activation, str) or activation not in family.activations:
        shown = one_line(repr(activation), 60)
        able = ", ".join(dict.fromkeys(family.activations.values()))
        raise UserError(f"{where}: {act} {shown} is not supported; supported: {able}")
    heads = number("num_attention_heads", int)
    hidden = number("hidden_size", int)
    layers = number("num_hidden_layers", int)
    _check_variant(family, raw, where)
    if family.mlp_ratio is not None and raw.get(family.key("intermediate_size")) is None:
        raw[family.key("intermediate_size")] = family.mlp_ratio * hidden
    learned = family.fields.get("positions") == "learned"
    heads_of = _plain_heads if learned else _rotary_heads
    flags = {key: _flag(raw, key, where) for key in FLAGS}
    biases = {name: flags[k] if isinstance(k, str) else k for name, k in family.biases.items()}
    fields = {
        "num_heads": heads,
        "num_layers": layers,
        "hidden_size": hidden,
        "vocab_size": number("vocab_size", int),
        "intermediate_size": number("intermediate_size", int),
        "max_position_embeddings": number("max_position_embeddings", int),
        "tie_embeddings": _flag(raw, "tie_word_embeddings", where),
        "qk_norm": family.qk_norm,
        "activation": family.activations[activation],
        "family": name,
    }
    if "norm_eps" not in family.fields:
        raw.setdefault(family.key("rms_norm_eps"), 1e-6)
        fields["norm_eps"] = number("rms_norm_eps", float)
    fields |= biases | heads_of(family, raw, fields, where) | dict(family.fields)
    return DecoderConfig(**fields)


def _check_variant(family: Family, raw: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for a variant of a family that the decoder lacks."""
    for key, (value, other) in family.must.items():
        if raw.get(key) is not None and raw[key] is not value:
            raise UserError(
                f"{where}: {key} {one_line(repr(raw[key]), 40)} ({other}) is not supported; "
                f"supported: {value}"
            )
    for key, same in family.equal.items():
        if raw.get(key) not in (None, raw[same]):
            raise UserError(
                f"{where}: {key} {one_line(repr(raw[key]), 40)} is not {same} {raw[same]} (a "
                "projection between the two), which alone is supported"
            )


def _rotary_heads(
    family: Family, raw: dict[str, Any], fields: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Fields of `DecoderConfig` for grouped queries, rotary positions and windows."""
    heads = fields["num_heads"]
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.get("head_dim") is None:
        raw["head_dim"] = fields["hidden_size"] // heads
    kv_heads = positive(raw, "num_key_value_heads", int, where)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}; use the config.json the model was published with"
        )
    if positive(raw, "head_dim", int, where) % 2:
        raise UserError(
            f"{where}: head_dim {raw['head_dim']} is odd, which rotary positions cannot split; use "
            "the config.json the model was published with"
        )
    theta, scaling = _rope(raw, where)
    return {
        "num_kv_heads": kv_heads,
        "head_dim": positive(raw, "head_dim", int, where),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _window(family, raw, fields["num_layers"], where),
    }


def _plain_heads(
    family: Family, raw: dict[str, Any], fields: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Fields of `DecoderConfig` where each head has keys and values, and heads divide the width."""
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    if hidden % heads:
        raise UserError(
            f"{where}: {family.key('hidden_size')} {hidden} is not a multiple of "
            f"{family.key('num_attention_heads')} {heads}; use the config.json the model was "
            "published with"
        )
    return {"num_kv_heads": heads, "head_dim": hidden // heads}


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face `config.json` of a decoder, without dtype and token ids.

    RoPE is written in both styles, so that transformers 4 and 5 read it.

    Raises:
        UserError: the family cannot express the configuration (`from_hf` would differ).
    """
    family = family_of(config)
    words = {ours: theirs for theirs, ours in reversed(list(family.activations.items()))}
    named = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": words.get(config.activation, next(iter(family.activations))),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **_written_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
    }
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{family.key(name): value for name, value in named.items() if family.key(name)},
        **dict.fromkeys(family.dropout, 0.0),
    }
    for name, key in family.biases.items():
        if isinstance(key, str):
            raw.setdefault(key, getattr(config, name))
    if family.windows != "none":
        raw["sliding_window"] = config.sliding_window
    if family.windows == "some":
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = 0 if config.sliding_window is not None else config.num_layers
    raw |= {key: value for key, (value, _) in family.must.items()}
    raw |= {key: raw[same] for key, same in family.equal.items()}
    # Settings of running a model, which no file holds.
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


def _written_rope(config: DecoderConfig) -> dict[str, Any]:
    """The keys of rotary positions beside `rope_theta`."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind}
    if scaling is not None:
        rope["factor"] = scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_position
    return {
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
    }
