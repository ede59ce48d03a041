"""Decoder language models in JAX: load, run and export Llama, Mistral, Qwen, GPT-2 and OPT."""

from models.decoder import lora
from models.decoder.model import Decoder, DecoderConfig
from models.files.export import export, export_adapter
from models.files.weights import Loaded, find_smollm2, load
from models.text.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Loaded",
    "Tokenizer",
    "export",
    "export_adapter",
    "find_smollm2",
    "load",
    "lora",
]
