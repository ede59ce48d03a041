"""Models in JAX: language decoders, vision networks and Stable Diffusion, with their files."""

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
