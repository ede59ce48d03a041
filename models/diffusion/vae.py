"""The autoencoder of Stable Diffusion: images to latents of an eighth of their size, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layout
from models.decoder.layers import Linear
from models.decoder.model import REMAT
from models.diffusion.layers import (
    LAYERS,
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    abstract,
    attention,
    draw,
    recomputed,
)
from models.learner import Batch, PlainLearner

Params = Mapping[str, Any]

EPS = 1e-6  # of every group norm
LOG_VARIANCE = (-30.0, 20.0)  # least and largest
ZERO = ("conv2", "to_out_0")  # kernels that start at 0: the last ones of residual branches

RULES: layout.Rules = LAYERS
LATENTS = "latents"  # the question that an autoencoder answers


@dataclass(frozen=True)
class VAEConfig:
    """Shape and conventions of an autoencoder; the defaults are those of Stable Diffusion v1.

    The encoder has `layers_per_block` residual blocks a level, the decoder one more, and both have
    one head of attention in the middle. Every level but the last halves height and width.
    `scaling_factor` brings latents to unit variance; `sample_size` is the side of the images that
    it was made for.
    """

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    dtype: str = "float32"

    @property
    def factor(self) -> int:
        """The ratio of the sides of an image and of its latents."""
        return 2 ** (len(self.channels) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that it was made for."""
        return self.sample_size, self.sample_size, self.in_channels


@dataclass(frozen=True)
class VAE:
    r"""An autoencoder as pure functions of `params`.

    .. math::
        z = s\,(\mu(x) + \sigma(x)\, \epsilon), \qquad \hat x = D(z / s)

    with the scaling factor s and images x from -1 to 1.

    Args:
        config: shape and conventions.
        remat: the part of each residual block that the backward pass recomputes, as in
            `models.diffusion.unet.UNet`.

    Raises:
        ValueError: unknown `remat`, or groups that do not divide the channels.

    Example:
        >>> vae = VAE(VAEConfig(8, channels=(4, 8), layers_per_block=1, norm_groups=2))
        >>> images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        >>> mean, logvar = jax.eval_shape(vae.encode, vae.shapes(), images)
        >>> mean.shape, jax.eval_shape(vae.decode, vae.shapes(), mean).shape
        ((2, 4, 4, 4), (2, 8, 8, 3))

    Paper: Kingma & Welling, arXiv:1312.6114, section 2; Rombach et al., arXiv:2112.10752, section
    3.1; `AutoencoderKL` of diffusers.
    """

    config: VAEConfig
    remat: str = "none"

    def __post_init__(self):
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, got {self.remat!r}")
        if not c.channels:
            raise ValueError("no levels: channels is empty")
        for width in c.channels:
            if width % c.norm_groups:
                raise ValueError(f"{c.norm_groups} does not divide {width} channels")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return {name: shapes for name, (_, shapes) in _abstract(self.config, self.remat).items()}

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters, see `models.diffusion.layers.draw`."""
        return draw(key, self.shapes(), ZERO)

    def encode(self, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and logarithm of the variance of the latents, before they are scaled.

        Args:
            params: the parameter tree; the decoder's parameters may be left out.
            images: `(B, H, W, in_channels)` from -1 to 1; `factor` divides H and W.

        Returns:
            Both `(B, H / factor, W / factor, latent_channels)` in `config.dtype`, the second one
            from -30 to 20.

        Raises:
            ValueError: images of another shape.
        """
        c = self.config
        if images.ndim != 4 or images.shape[3] != c.in_channels:
            raise ValueError(
                f"images are {images.shape}, the model reads (B, H, W, {c.in_channels})"
            )
        if images.shape[1] % c.factor or images.shape[2] % c.factor:
            raise ValueError(f"{c.factor} does not divide both sides of images {images.shape}")
        x = self._run(params, "encoder", images.astype(c.dtype))
        mean, logvar = jnp.split(self._run(params, "quant_conv", x), 2, -1)
        return mean, jnp.clip(logvar, *LOG_VARIANCE)

    def sample(self, mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
        """Scaled latents `s (mean + exp(logvar / 2) noise)`; without noise their mean.

        Args:
            mean: the mean that `encode` returns.
            logvar: the logarithm of the variance that `encode` returns.
            noise: standard normal, of their shape; zeros for the mean.

        Returns:
            The latents that a denoiser is trained on, of their shape.

        Example:
            >>> vae, noise = VAE(VAEConfig(scaling_factor=0.5)), jnp.array([0.0, 1.0])
            >>> vae.sample(jnp.ones(2), jnp.zeros(2), noise).tolist()
            [0.5, 1.0]
        """
        return self.config.scaling_factor * (mean + jnp.exp(logvar / 2) * noise.astype(mean.dtype))

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Images from about -1 to 1 (`pixels`).

        Args:
            params: the parameter tree; the encoder's parameters may be left out.
            latents: scaled, `(B, h, w, latent_channels)`.

        Returns:
            `(B, factor h, factor w, out_channels)` in `config.dtype`.

        Raises:
            ValueError: latents of another shape.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[3] != c.latent_channels:
            raise ValueError(
                f"latents are {latents.shape}, the model reads (B, h, w, {c.latent_channels})"
            )
        latents = latents.astype(c.dtype) / c.scaling_factor
        return self._run(params, "decoder", self._run(params, "post_quant_conv", latents))

    def _run(self, params: Params, name: str, x: jax.Array) -> jax.Array:
        return nnx.merge(_abstract(self.config, self.remat)[name][0], params[name])(x)


def pixels(images: jax.Array) -> jax.Array:
    """Decoded images as pixels, `clip(x / 2 + 1 / 2, 0, 1)`.

    Example:
        >>> pixels(jnp.array([-3.0, -1.0, 0.0, 1.0])).tolist()
        [0.0, 0.0, 0.5, 1.0]
    """
    return jnp.clip(images / 2 + 0.5, 0, 1)


@dataclass(frozen=True)
class AskedVAE:
    """An autoencoder and its parameters, as objectives ask it."""

    vae: VAE
    params: Any

    def encode(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Mean and logarithm of the variance of the latents of `batch["image"]`, not scaled."""
        return self.vae.encode(self.params, jnp.asarray(batch["image"]))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images from latents that are not scaled."""
        return self.vae.decode(self.params, self.vae.config.scaling_factor * latents)


@dataclass(frozen=True)
class VAELearner(PlainLearner):
    """An autoencoder as the trainer sees it, see `models.learner.Learner`.

    Args:
        model: the autoencoder.
    """

    model: VAE
    answers = frozenset((LATENTS,))
    rules = RULES

    @property
    def sizes(self) -> Mapping[str, int]:
        """Channels of the latents."""
        return {"latent_channels": self.model.config.latent_channels}

    def ask(self, params: Any, together: Any = ()) -> Any:
        """The autoencoder as objectives ask it."""
        del together
        return AskedVAE(self.model, params)


@functools.lru_cache(maxsize=64)
def _abstract(c: VAEConfig, remat: str) -> dict[str, tuple[Any, Any]]:
    """The graph definition and the shapes of each part."""
    latents = c.latent_channels
    return {
        "encoder": abstract(lambda: _Encoder(c, remat)),
        "quant_conv": abstract(lambda: Conv(2 * latents, 2 * latents, 1)),
        "post_quant_conv": abstract(lambda: Conv(latents, latents, 1)),
        "decoder": abstract(lambda: _Decoder(c, remat)),
    }


class _Attention(nnx.Module):
    """Group norm, one head over all pixels, and the residual."""

    def __init__(self, width: int, c: VAEConfig):
        self.group_norm = GroupNorm(width, c.norm_groups, EPS)
        self.to_q = Linear(width, width, True)
        self.to_k = Linear(width, width, True)
        self.to_v = Linear(width, width, True)
        self.to_out_0 = Linear(width, width, True)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.group_norm(x).reshape(len(x), -1, x.shape[-1])
        y = self.to_out_0(attention(self.to_q(y), self.to_k(y), self.to_v(y), 1))
        return x + y.reshape(x.shape)


class _Level(nnx.Module):
    """Residual blocks of one resolution.

    Args:
        sizes: the numbers of channels in and out of each block.
        c: the configuration.
        remat: the part of each block that the backward pass recomputes.
        attends: whether there is attention behind the first block.
    """

    downsamplers_0: Downsample
    upsamplers_0: Upsample

    def __init__(
        self, sizes: list[tuple[int, int]], c: VAEConfig, remat: str, attends: bool = False
    ):
        for i, (before, behind) in enumerate(sizes):
            setattr(self, f"resnets_{i}", ResnetBlock(before, behind, c.norm_groups, EPS))
        if attends:
            self.attentions_0 = _Attention(sizes[0][1], c)
        self.count, self.remat = len(sizes), remat

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.count):
            x = recomputed(getattr(self, f"resnets_{i}"), self.remat, x)
            if i == 0 and hasattr(self, "attentions_0"):
                x = recomputed(self.attentions_0, self.remat, x)
        for name in ("downsamplers_0", "upsamplers_0"):
            if hasattr(self, name):
                x = recomputed(getattr(self, name), "none", x)
        return x


class _Encoder(nnx.Module):
    """Levels down, the middle, means and logarithms of variances."""

    def __init__(self, c: VAEConfig, remat: str):
        sizes, layers = c.channels, c.layers_per_block
        self.levels, width = len(sizes), sizes[0]
        self.conv_in = Conv(c.in_channels, width)
        for i, size in enumerate(sizes):
            level = _Level([(width, size)] + [(size, size)] * (layers - 1), c, remat)
            if i < len(sizes) - 1:
                # Padded below and to the right alone, unlike in the denoiser.
                level.downsamplers_0 = Downsample(size, (0, 1))
            setattr(self, f"down_blocks_{i}", level)
            width = size
        self.mid_block = _Level([(width, width)] * 2, c, remat, attends=True)
        self.conv_norm_out = GroupNorm(width, c.norm_groups, EPS)
        self.conv_out = Conv(width, 2 * c.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = recomputed(self.conv_in, "none", x)
        for i in range(self.levels):
            x = getattr(self, f"down_blocks_{i}")(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    """The middle, levels up, an image."""

    def __init__(self, c: VAEConfig, remat: str):
        sizes, layers = c.channels[::-1], c.layers_per_block + 1
        self.levels, width = len(sizes), sizes[0]
        self.conv_in = Conv(c.latent_channels, width)
        self.mid_block = _Level([(width, width)] * 2, c, remat, attends=True)
        for i, size in enumerate(sizes):
            level = _Level([(width, size)] + [(size, size)] * (layers - 1), c, remat)
            if i < len(sizes) - 1:
                level.upsamplers_0 = Upsample(size)
            setattr(self, f"up_blocks_{i}", level)
            width = size
        self.conv_norm_out = GroupNorm(width, c.norm_groups, EPS)
        self.conv_out = Conv(width, c.out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(recomputed(self.conv_in, "none", x))
        for i in range(self.levels):
            x = getattr(self, f"up_blocks_{i}")(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
