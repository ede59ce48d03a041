"""Decoder language models in JAX: load, run and export Llama, Mistral, Qwen, GPT-2 and OPT."""

from models import lora
from models.decoder import Decoder, DecoderConfig
from models.export import export, export_adapter
from models.tokenizer import Tokenizer
from models.weights import Loaded, find_smollm2, load

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
