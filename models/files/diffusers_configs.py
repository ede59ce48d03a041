"""The `config.json` of Stable Diffusion's denoiser and autoencoder, read and written.

Only the options of diffusers' classes that Stable Diffusion v1 has are read. A file that asks for
another one is refused; keys that do not affect the computation are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import check_spelling, one_line, reading
from models.diffusion.unet import UNet, UNetConfig
from models.diffusion.vae import VAE, VAEConfig
from models.files.families import positive

VERSION = "0.39.0"  # of diffusers, whose names and conventions are written
ADVICE = "use the config.json the model was published with"
UNET_CLASS, VAE_CLASS = "UNet2DConditionModel", "AutoencoderKL"
UNET_SIZES = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim")
VAE_SIZES = ("in_channels", "out_channels", "latent_channels", "layers_per_block")
# Diffusers' defaults of the keys that old files leave out.
UNET_DEFAULTS: dict[str, Any] = {"sample_size": 64, "norm_num_groups": 32, "norm_eps": 1e-5}
VAE_DEFAULTS: dict[str, Any] = {
    "sample_size": 512,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
# Keys that change what is computed, with the one value that is read; it is also their default.
UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
BLOCKS = ("down_block_types", "up_block_types", "block_out_channels")
UNET_KEYS = {*UNET_SIZES, *UNET_DEFAULTS, *UNET_FIXED, *BLOCKS, "attention_head_dim"}
VAE_KEYS = {*VAE_SIZES, *VAE_DEFAULTS, *VAE_FIXED, *BLOCKS}
UNET_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
UNET_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def _checked(
    raw: Mapping[str, Any],
    kind: str,
    keys: set[str],
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """A `config.json` with defaults, or `UserError` for one of another model."""
    if raw.get("_class_name") != kind:
        raise UserError(
            f"{where}: _class_name {one_line(repr(raw.get('_class_name')), 60)} is no {kind}, "
            f"which alone is read here; {ADVICE}"
        )
    check_spelling(raw, keys, where, f"correct it, or {ADVICE}")
    for name, value in fixed.items():
        if raw.get(name, value) != value:
            raise UserError(
                f"{where}: {name} is {one_line(repr(raw[name]), 60)}, and only {value!r} is "
                "supported (Stable Diffusion v1); use such a model"
            )
    return {**defaults, **{key: value for key, value in raw.items() if value is not None}}


def _side(raw: Mapping[str, Any], where: str) -> int:
    sides = raw["sample_size"] if isinstance(raw["sample_size"], list) else [raw["sample_size"]]
    if len(set(map(str, sides))) != 1:
        raise UserError(f"{where}: sample_size {sides} is no square, which alone is supported")
    return positive({"sample_size": sides[0]}, "sample_size", int, where)


def _channels(raw: Mapping[str, Any], where: str) -> tuple[int, ...]:
    widths = raw.get("block_out_channels")
    if not isinstance(widths, list) or not widths:
        raise UserError(
            f"{where}: block_out_channels is {one_line(repr(widths), 60)}, no list of sizes; "
            f"{ADVICE}"
        )
    name = "block_out_channels"
    return tuple(positive({name: width}, name, int, where) for width in widths)


def _types(raw: Mapping[str, Any], name: str, words: tuple[str, ...], where: str) -> list[str]:
    """The kinds of the levels' blocks; `UserError` for one that is not supported."""
    found = raw.get(name)
    if not isinstance(found, list) or any(word not in words for word in found):
        raise UserError(
            f"{where}: {name} is {one_line(repr(found), 120)}; a list of {' and '.join(words)} "
            f"is read; {ADVICE}"
        )
    return found


def _levels(raw: Mapping[str, Any], down: int, up: int, levels: int, where: str) -> None:
    if not down == up == levels:
        raise UserError(
            f"{where}: {down} down_block_types, {up} up_block_types and {levels} "
            f"block_out_channels, which should be as many; {ADVICE}"
        )


def _written(fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fixed.items() if value is not None}


def unet_config(raw: Mapping[str, Any], where: str) -> UNetConfig:
    """The configuration that the `config.json` of a `UNet2DConditionModel` describes.

    Args:
        raw: its content; `attention_head_dim` is the number of heads, whatever its name says.
        where: the file, as messages name it.

    Returns:
        The configuration; keys that do not affect the computation are not read.

    Raises:
        UserError: another model, a misspelt key, or a value that is not supported.

    Example:
        >>> unet_config(unet_json(UNetConfig()), "config.json") == UNetConfig()
        True
    """
    raw = _checked(raw, UNET_CLASS, UNET_KEYS, UNET_FIXED, UNET_DEFAULTS, where)
    with reading(where, ADVICE, "does not read"):
        channels = _channels(raw, where)
        down = _types(raw, "down_block_types", UNET_DOWN, where)
        up = _types(raw, "up_block_types", UNET_UP, where)
        _levels(raw, len(down), len(up), len(channels), where)
        attends = tuple(word == UNET_DOWN[1] for word in down)
        if attends != tuple(word == UNET_UP[1] for word in reversed(up)):
            raise UserError(
                f"{where}: levels attend on the way down or up alone, which is not supported; "
                f"{ADVICE}"
            )
        found = UNetConfig(
            **{name: positive(raw, name, int, where) for name in UNET_SIZES},
            sample_size=_side(raw, where),
            channels=channels,
            attends=attends,
            num_heads=positive(raw, "attention_head_dim", int, where),
            norm_groups=positive(raw, "norm_num_groups", int, where),
            norm_eps=positive(raw, "norm_eps", float, where),
        )
        UNet(found)
    return found


def unet_json(c: UNetConfig) -> dict[str, Any]:
    """The `config.json` of a denoiser; `unet_config` reads it as the same configuration.

    Example:
        >>> unet_json(UNetConfig())["attention_head_dim"]
        8
    """
    return {
        "_class_name": UNET_CLASS,
        "_diffusers_version": VERSION,
        **_written(UNET_FIXED),
        **{name: getattr(c, name) for name in UNET_SIZES},
        "sample_size": c.sample_size,
        "block_out_channels": list(c.channels),
        "down_block_types": [UNET_DOWN[attends] for attends in c.attends],
        "up_block_types": [UNET_UP[attends] for attends in reversed(c.attends)],
        "attention_head_dim": c.num_heads,
        "norm_num_groups": c.norm_groups,
        "norm_eps": c.norm_eps,
    }


def vae_config(raw: Mapping[str, Any], where: str) -> VAEConfig:
    """The configuration that the `config.json` of an `AutoencoderKL` describes.

    Args:
        raw: its content.
        where: the file, as messages name it.

    Returns:
        The configuration; keys that do not affect the computation are not read.

    Raises:
        UserError: another model, a misspelt key, or a value that is not supported.

    Example:
        >>> vae_config(vae_json(VAEConfig()), "config.json") == VAEConfig()
        True
    """
    raw = _checked(raw, VAE_CLASS, VAE_KEYS, VAE_FIXED, VAE_DEFAULTS, where)
    with reading(where, ADVICE, "does not read"):
        channels = _channels(raw, where)
        down = _types(raw, "down_block_types", ("DownEncoderBlock2D",), where)
        up = _types(raw, "up_block_types", ("UpDecoderBlock2D",), where)
        _levels(raw, len(down), len(up), len(channels), where)
        found = VAEConfig(
            **{name: positive(raw, name, int, where) for name in VAE_SIZES},
            sample_size=_side(raw, where),
            channels=channels,
            norm_groups=positive(raw, "norm_num_groups", int, where),
            scaling_factor=positive(raw, "scaling_factor", float, where),
        )
        VAE(found)
    return found


def vae_json(c: VAEConfig) -> dict[str, Any]:
    """The `config.json` of an autoencoder; `vae_config` reads it as the same configuration.

    Example:
        >>> vae_json(VAEConfig())["down_block_types"][0]
        'DownEncoderBlock2D'
    """
    return {
        "_class_name": VAE_CLASS,
        "_diffusers_version": VERSION,
        **_written(VAE_FIXED),
        **{name: getattr(c, name) for name in VAE_SIZES},
        "sample_size": c.sample_size,
        "block_out_channels": list(c.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(c.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(c.channels),
        "norm_num_groups": c.norm_groups,
        "scaling_factor": c.scaling_factor,
    }
