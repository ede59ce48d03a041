"""The parts of a Stable Diffusion folder: how each is described, and where its tensors lie.

A part is a row of `PARTS`: its folder, the class that diffusers or transformers reads it with, how
its `config.json` becomes a configuration and back, and its table of tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from models.diffusion.clip_text import ClipText
from models.diffusion.unet import UNet
from models.diffusion.vae import VAE
from models.files import clip_tensors
from models.files.diffusers_configs import (
    UNET_CLASS,
    VAE_CLASS,
    unet_config,
    unet_json,
    vae_config,
    vae_json,
)
from models.files.stored import Stored
from models.files.tensors import Slot, Table
from models.files.weights import flatten

# Modules of a list, as `name.index` in files and `name_index` in a tree.
_LISTED = re.compile(
    r"\b(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
    r"|to_out|net)_(\d+)"
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Names of an autoencoder's attention in files from the time of v1.4.
_OLDER = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)


class Part(NamedTuple):
    """A part of a folder.

    Args:
        library: the library that reads it, as `model_index.json` names it.
        kind: its class there.
        stem: the beginning of the names of its weight files.
        read: `(content of config.json, its path) -> configuration`.
        write: the inverse of `read`.
        model: the pure functions of a configuration; they have `shapes`.
        table: the table of tensors, given a configuration.
        older: patterns of names in older files, and their replacements.
    """

    library: str
    kind: str
    stem: str
    read: Callable[[Mapping[str, Any], str], Any]
    write: Callable[[Any], dict[str, Any]]
    model: Callable[[Any], Any]
    table: Callable[[Any], Table]
    older: tuple[tuple[str, str], ...] = ()

    def shapes(self, config: Any) -> dict[str, Any]:
        """The leaves by path, as shapes."""
        return flatten(self.model(config).shapes())


def file_name(path: str) -> str:
    """The name in files of a leaf of a denoiser or an autoencoder.

    Example:
        >>> file_name("down_blocks_0/attentions_1/transformer_blocks_0/attn2/to_out_0/kernel")
        'down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight'
        >>> file_name("time_embedding/linear_1/bias")
        'time_embedding.linear_1.bias'
    """
    owner, leaf = path.rsplit("/", 1)
    module = _LISTED.sub(r"\1.\2", owner).replace("/", ".")
    return f"{module}.{_LEAVES[leaf]}"


def _named(model: Callable[[Any], Any]) -> Callable[[Any], Table]:
    """The table of a model whose leaves are named after its modules (`file_name`)."""

    def table(config: Any) -> Table:
        paths = flatten(model(config).shapes())
        return Table(tuple(Slot(p, file_name(p), "", p.endswith("kernel")) for p in paths))

    return table


def viewed(part: Part, config: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors of a part's files under the names and in the shapes that its table knows.

    Convolutions `(out, in, height, width)` get their last two axes exchanged, so that reversing all
    of them gives our kernels. Dense kernels with two more axes of size 1 lose these.

    Args:
        part: a row of `PARTS`.
        config: its configuration.
        stored: tensors by name in the files; an older name is replaced unless the newer one is
            there as well.

    Returns:
        The tensors; rows are read as before.

    Example:
        >>> from models.diffusion.vae import VAEConfig
        >>> name = "decoder.mid_block.attentions.0.query.weight"
        >>> stored = {name: Stored((8, 8, 1, 1), "F32", lambda first, last: ...)}
        >>> found = viewed(PARTS["vae"], VAEConfig(), stored)
        >>> {name: tensor.shape for name, tensor in found.items()}
        {'decoder.mid_block.attentions.0.to_q.weight': (8, 8)}
    """
    shapes = part.shapes(config)
    ranks = {slot.hf: len(shapes[slot.path].shape) for slot in part.table(config).slots}
    found = {}
    for name, tensor in stored.items():
        newer = name
        for pattern, replacement in part.older:
            newer = re.sub(pattern, replacement, newer)
        name = name if newer in stored else newer
        if len(tensor.shape) == 4 and ranks.get(name) == 4:
            out, size_in, height, width = tensor.shape
            tensor = _seen(tensor, (out, size_in, width, height), swapped)
        elif tensor.shape[2:] == (1, 1) and ranks.get(name) == 2:
            tensor = _seen(tensor, tensor.shape[:2], lambda x: x[:, :, 0, 0])
        found[name] = tensor
    return found


def swapped(x: Any) -> Any:
    """An array with its last two axes exchanged."""
    return x.swapaxes(-1, -2)


def _seen(tensor: Stored, shape: tuple[int, ...], view: Callable[[Any], Any]) -> Stored:
    read = tensor.read
    return tensor._replace(shape=shape, read=lambda first, last: view(read(first, last)))


PARTS: dict[str, Part] = {
    "text_encoder": Part(
        "transformers",
        "CLIPTextModel",
        "model",
        clip_tensors.hf_config,
        clip_tensors.to_hf,
        ClipText,
        lambda _: clip_tensors.HF,
    ),
    "unet": Part(
        "diffusers",
        UNET_CLASS,
        "diffusion_pytorch_model",
        unet_config,
        unet_json,
        UNet,
        _named(UNet),
    ),
    "vae": Part(
        "diffusers",
        VAE_CLASS,
        "diffusion_pytorch_model",
        vae_config,
        vae_json,
        VAE,
        _named(VAE),
        _OLDER,
    ),
}


def with_dtype(config: Any, dtype: str) -> Any:
    """A configuration with another dtype of computation.

    Example:
        >>> from models.diffusion.vae import VAEConfig
        >>> with_dtype(VAEConfig(), "bfloat16").dtype
        'bfloat16'
    """
    return dataclasses.replace(config, dtype=dtype)
