"""Shapes of published models by Hub id, for programs that plan a run without its weights.

Each entry repeats the model's `config.json`; a test compares SmolLM2's with the packaged file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, shortened_path
from models.decoder.model import DecoderConfig
from models.files.families import from_hf
from models.text.tokenizer import read_json


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, factor: float = 0.0, **more: Any
) -> Mapping[str, Any]:
    """A Llama 3; `factor` stretches its rotary positions (3.1 and 3.2)."""
    stretched = {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        **(stretched if factor else {}),
        **more,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


def _opt(hidden: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


_SMALL = (4096, 14336, 32, 32)
_LARGE = (8192, 28672, 80, 64)

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama(*_SMALL),
    "meta-llama/Meta-Llama-3-70B-Instruct": _llama(*_LARGE),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(*_SMALL, factor=8.0),
    "meta-llama/Llama-3.1-70B-Instruct": _llama(*_LARGE, factor=8.0),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(
        2048, 8192, 16, 32, factor=32.0, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B-Instruct": _llama(
        3072, 8192, 28, 24, factor=32.0, head_dim=128, tie_word_embeddings=True
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(*_SMALL, factor=8.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    "Qwen/Qwen2.5-Math-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
}
ALIASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def config_of(source: str) -> DecoderConfig:
    """The decoder configuration of a model, without its weights.

    Args:
        source: a Hub id of `ARCHITECTURES`, `smollm2`, or a folder with a `config.json`.

    Returns:
        A `DecoderConfig` with `dtype` float32.

    Raises:
        UserError: neither a known id nor a folder with a readable `config.json`.

    Example:
        >>> config_of("meta-llama/Meta-Llama-3-8B-Instruct").num_kv_heads
        8
    """
    name = ALIASES.get(source, source).removeprefix("hub:")
    if name in ARCHITECTURES:
        return from_hf(ARCHITECTURES[name], name)
    path = Path(source) / "config.json"
    if not exists(path):
        raise UserError(
            f"no shapes known for --model.path {shortened_path(source)}: it is no folder with a "
            f"config.json; give one, or an id of {', '.join([*ALIASES, *ARCHITECTURES])}"
        )
    raw = read_json(path, "a Hugging Face model folder has one")
    return from_hf(raw, str(path))
