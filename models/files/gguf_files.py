"""GGUF files: configuration from the metadata, tensors dequantised one at a time.

llama.cpp stores the q and k rows of architecture `llama` for rotary pairs `(2i, 2i+1)`; ours, like
Hugging Face's, are `(i, i + D/2)`, so those rows are reordered.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, number, one_line, reading
from models import bounds
from models.decoder.layers import RopeScaling, rope_frequencies
from models.decoder.model import DecoderConfig
from models.files import gguf_layout
from models.files.families import FAMILIES
from models.files.stored import Stored
from models.text.tokenizer import OTHERS, Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Further keys of the format, one letter off one that is read.
NEAR = {f"tokenizer.ggml.{name}_id" for name in OTHERS}
NEAR |= {"tokenizer.ggml.add_eos_token", "tokenizer.chat_templates"}


class _Asked(dict[str, Any]):
    """Metadata that remembers which keys `get` was asked for."""

    def __init__(self, metadata: Mapping[str, Any]):
        super().__init__(metadata)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[DecoderConfig, dict[str, Stored], Tokenizer]]:
    """Configuration, tensors (kernels `(out, in)`) and tokenizer of a GGUF file.

    Raises:
        UserError: the file is truncated or damaged, of an unsupported architecture, or a key that
            is read is misspelt in it.
    """
    with reading(path, "download it again", "not a whole GGUF file, truncated or damaged"):
        plain, found = gguf_layout.read(path)
        metadata = _Asked(plain)
        tensors = {tensor.name: tensor for tensor in found}
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture {arch!r} is not supported in GGUF files; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    with reading(path, "download it again", "its metadata cannot be used"):
        freqs = tensors.get("rope_freqs.weight")
        factors = None if freqs is None else values(path, freqs).reshape(-1)
        config = config_of(metadata, set(tensors), factors, str(path))
        tokenizer = Tokenizer.from_gguf(metadata, str(path))
        check_spelling(plain.keys() - NEAR, metadata.asked, path, "download it again")
        stored = {name: _stored(path, tensor, arch, config) for name, tensor in tensors.items()}
    yield config, stored, tokenizer


def values(path: Path, tensor: gguf_layout.Tensor) -> np.ndarray:
    """A tensor's values, float32 where it is quantised."""
    import gguf

    with np.errstate(all="ignore"):  # a scale that is NaN shows in the values
        data = gguf_layout.read_bytes(path, tensor)
        return gguf.quants.dequantize(data, tensor.kind).reshape(tensor.shape)


def _stored(path: Path, tensor: gguf_layout.Tensor, arch: str, config: DecoderConfig) -> Stored:
    part = tensor.name.rpartition(".")[0].rpartition(".")[2]
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part)

    def read(first: int, last: int) -> np.ndarray:
        value = values(path, tensor)
        return (unpermute(value, heads) if arch == "llama" and heads else value)[first:last]

    return Stored(tensor.shape, tensor.kind.name, read, (tensor.offset,))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(heads * D, ...)` from interleaved rotary pairs to halves: `(D/2, 2)` to `(2, D/2)`.

    Example:
        >>> unpermute(np.arange(8), 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def config_of(
    metadata: Mapping[str, Any], names: set[str], factors: np.ndarray | None, where: str
) -> DecoderConfig:
    """The decoder configuration of a GGUF file.

    Args:
        metadata: all key-value pairs.
        names: the names of the tensors, which show tied embeddings and biases.
        factors: the tensor `rope_freqs.weight`, `(head_dim / 2,)`: divisors of the frequencies.
        where: the name of the file in error messages.

    Raises:
        UserError: a value is missing or invalid, or a feature the decoder lacks.
    """
    arch = str(metadata["general.architecture"])

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        odd = isinstance(value, bool) or not isinstance(value, (int, float))
        if odd or not 0 < value < math.inf or (kind is int and not isinstance(value, int)):
            shown = one_line(repr(value), 40)
            raise UserError(f"{where}: {arch}.{key} is {shown}, not a positive {kind.__name__}")
        bounds.check_size(f"{arch}.{key}", kind(value), where)
        # Stored as float32: 1e-5 reads as 9.999999747e-06; the shortest decimal is what was meant.
        return float(str(np.float32(value))) if kind is float else int(value)

    if metadata.get(f"{arch}.expert_count"):
        raise UserError(f"{where}: mixtures of experts are not supported; use a dense model")
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden // heads)
    rotated = get("rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise UserError(f"{where}: rotary positions on {rotated} of {head_dim} are not supported")
    theta = get("rope.freq_base", float, 10000.0)
    kv_heads = get("attention.head_count_kv", int, heads)
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} heads do not divide over {kv_heads} key-value heads")
    words = metadata.get("tokenizer.ggml.tokens") or ()
    window = metadata.get(f"{arch}.attention.sliding_window")
    if window:
        raise UserError(
            f"{where}: a sliding window in GGUF files is not supported; use the safetensors version"
        )
    return DecoderConfig(
        vocab_size=get("vocab_size", int, len(words)),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length", int),
        num_layers=get("block_count", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_scaling(metadata, arch, head_dim, theta, factors, where),
        norm_eps=get("attention.layer_norm_rms_epsilon", float),
        tie_embeddings="output.weight" not in names,
        qk_norm=FAMILIES[arch].qk_norm,
        qkv_bias="blk.0.attn_q.bias" in names,
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        max_position_embeddings=get("context_length", int),
        family=arch,
    )


def _scaling(
    metadata: Mapping[str, Any],
    arch: str,
    head_dim: int,
    theta: float,
    factors: np.ndarray | None,
    where: str,
) -> RopeScaling | None:
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UserError(
            f"{where}: rope scaling {kind!r} is not supported; supported: none, linear, llama3"
        )
    factor = number(metadata.get(f"{arch}.rope.scaling.factor", 0.0))  # 0: none, as in llama.cpp
    if not 0 <= factor < math.inf:
        raise UserError(f"{where}: {arch}.rope.scaling.factor is {factor}; download it again")
    if kind == "linear" and factor > 0:
        return RopeScaling("linear", factor)
    if factors is None:
        return None
    # The file keeps Llama 3's scaling as divisors only; Meta trained with these three constants.
    scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, 8192)
    plain = np.asarray(rope_frequencies(head_dim, theta, None))
    ours = plain / np.asarray(rope_frequencies(head_dim, theta, scaling))
    if factors.shape != ours.shape or not np.allclose(factors, ours, rtol=1e-3):
        raise UserError(
            f"{where}: rope_freqs.weight is not Llama 3's scaling, which alone is supported; use "
            "the safetensors version of the model"
        )
    return scaling
