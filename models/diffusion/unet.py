"""The denoiser of Stable Diffusion v1: a U-Net of residual blocks that attends to a text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layout
from models.decoder.layers import LayerNorm, Linear
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
    sinusoid,
)

Params = Mapping[str, Any]

SPATIAL_EPS = 1e-6  # of the group norm before a transformer; residual blocks have their own
LAYER_EPS = 1e-5
# Kernels that start at 0: the last ones of residual branches, and the output.
ZERO = ("conv2", "proj_out", "conv_out")

RULES: layout.Rules = LAYERS


@dataclass(frozen=True)
class UNetConfig:
    """Shape and conventions of a denoiser; the defaults are those of Stable Diffusion v1.

    A level has `layers_per_block` residual blocks on the way down and one more on the way up, and
    half the height and width of the level before it. `attends` says of each level whether its
    blocks have transformers; the middle has one in any case. `sample_size` is the side of the
    latents that it was made for, any multiple of `2^(levels - 1)` works.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    num_heads: int = 8
    cross_attention_dim: int = 768
    norm_groups: int = 32
    norm_eps: float = 1e-5
    dtype: str = "float32"

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents that it was made for."""
        return self.sample_size, self.sample_size, self.in_channels


@dataclass(frozen=True)
class UNet:
    r"""The denoiser as pure functions of `params`.

    .. math::
        \hat\epsilon = \epsilon_\theta(z_t, t, c)

    with noisy latents z, their time t and a text's states c. Levels go down and up again; the
    output of a block on the way down is joined to the input of one on the way up.

    Args:
        config: shape and conventions.
        remat: the part of each residual block and each transformer that the backward pass
            recomputes, a row of `models.decoder.model.REMAT`.

    Raises:
        ValueError: unknown `remat`, or sizes that do not divide one another.

    Example:
        >>> config = UNetConfig(8, channels=(4, 8), attends=(True, False), layers_per_block=1,
        ...                     num_heads=2, cross_attention_dim=6, norm_groups=2)
        >>> unet = UNet(config)
        >>> latents, context = jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 3, 6))
        >>> jax.eval_shape(unet.apply, unet.shapes(), latents, jnp.array([1, 981]), context)
        ShapeDtypeStruct(shape=(2, 8, 8, 4), dtype=float32)

    Paper: Rombach et al., arXiv:2112.10752, section 3.3; `UNet2DConditionModel` of diffusers.
    """

    config: UNetConfig
    remat: str = "none"

    def __post_init__(self):
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, got {self.remat!r}")
        if not c.channels or len(c.channels) != len(c.attends):
            raise ValueError(f"{len(c.channels)} levels, attends has {len(c.attends)} values")
        for whole, parts in [(c.channels[0], 2)] + [
            (width, part) for width in c.channels for part in (c.num_heads, c.norm_groups)
        ]:
            if whole % parts:
                raise ValueError(f"{parts} does not divide {whole} channels")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return _abstract(self.config, self.remat)[1]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters (`models.diffusion.layers.draw`); the output is 0 at first."""
        return draw(key, self.shapes(), ZERO)

    def apply(
        self, params: Params, latents: jax.Array, t: jax.Array | float, context: jax.Array
    ) -> jax.Array:
        """The noise that the latents hold.

        Args:
            params: the parameter tree.
            latents: z, `(B, H, W, in_channels)`; `2^(levels - 1)` divides H and W.
            t: steps of the noise schedule, a scalar or `(B,)`, whole or fractional.
            context: c, `(B, S, cross_attention_dim)`.

        Returns:
            `(B, H, W, out_channels)` in `config.dtype`.

        Raises:
            ValueError: latents or a context of another shape.
        """
        c = self.config
        side = 2 ** (len(c.channels) - 1)
        if latents.ndim != 4 or latents.shape[3] != c.in_channels:
            raise ValueError(
                f"latents are {latents.shape}, the model reads (B, H, W, {c.in_channels})"
            )
        if latents.shape[1] % side or latents.shape[2] % side:
            raise ValueError(f"{side} does not divide both sides of latents {latents.shape}")
        if context.ndim != 3 or context.shape[2] != c.cross_attention_dim:
            raise ValueError(
                f"the context is {context.shape}, the model reads (B, S, {c.cross_attention_dim})"
            )
        graph, _ = _abstract(c, self.remat)
        t = jnp.broadcast_to(t, (len(latents),))
        dtype = jnp.dtype(c.dtype)
        return nnx.merge(graph, params)(latents.astype(dtype), t, context.astype(dtype))


@functools.lru_cache(maxsize=64)
def _abstract(config: UNetConfig, remat: str) -> tuple[Any, Any]:
    return abstract(lambda: _Network(config, remat))


class _Attention(nnx.Module):
    """Attention of the states of a map to themselves or to a text; q, k and v without bias."""

    def __init__(self, width: int, source: int, heads: int):
        self.to_q = Linear(width, width, False)
        self.to_k = Linear(source, width, False)
        self.to_v = Linear(source, width, False)
        self.to_out_0 = Linear(width, width, True)
        self.heads = heads

    def __call__(self, x: jax.Array, source: jax.Array) -> jax.Array:
        return self.to_out_0(
            attention(self.to_q(x), self.to_k(source), self.to_v(source), self.heads)
        )


class _Gated(nnx.Module):
    """`u * gelu(g)` with `[u, g] = x W + b` and the GELU itself, not its approximation by tanh."""

    def __init__(self, width: int, inner: int):
        self.proj = Linear(width, 2 * inner, True)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * jax.nn.gelu(gate, approximate=False)


class _FeedForward(nnx.Module):
    """Two layers, the first one gated."""

    def __init__(self, width: int):
        self.net_0 = _Gated(width, 4 * width)
        self.net_2 = Linear(4 * width, width, True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net_2(self.net_0(x))


class _Block(nnx.Module):
    """Pre-norm residual: to itself, to the text, feed-forward."""

    def __init__(self, width: int, c: UNetConfig):
        self.norm1 = LayerNorm(width, LAYER_EPS)
        self.attn1 = _Attention(width, width, c.num_heads)
        self.norm2 = LayerNorm(width, LAYER_EPS)
        self.attn2 = _Attention(width, c.cross_attention_dim, c.num_heads)
        self.norm3 = LayerNorm(width, LAYER_EPS)
        self.ff = _FeedForward(width)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Transformer(nnx.Module):
    """A transformer block over the pixels of a map, row by row, between two 1 x 1 convolutions."""

    def __init__(self, width: int, c: UNetConfig):
        self.norm = GroupNorm(width, c.norm_groups, SPATIAL_EPS)
        self.proj_in = Conv(width, width, 1)
        self.transformer_blocks_0 = _Block(width, c)
        self.proj_out = Conv(width, width, 1)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        y = self.proj_in(self.norm(x))
        y = self.transformer_blocks_0(y.reshape(len(x), -1, x.shape[-1]), context)
        return x + self.proj_out(y.reshape(x.shape))


class _TimeEmbedding(nnx.Module):
    """`linear_2(silu(linear_1(sinusoid(t))))`, in float32 at least."""

    def __init__(self, c: UNetConfig):
        self.linear_1 = Linear(c.channels[0], c.time_width, True)
        self.linear_2 = Linear(c.time_width, c.time_width, True)
        self.width = c.channels[0]
        self.dtype = jnp.promote_types(c.dtype, jnp.float32)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoid(t, self.width, self.dtype))))


class _Level(nnx.Module):
    """Residual blocks of one resolution, each followed by a transformer or not.

    Args:
        sizes: the numbers of channels in and out of each block.
        attends: whether there are transformers.
        c: the configuration.
        remat: the part of each block that the backward pass recomputes.
        transformers: the number of transformers; by default one behind each block.
    """

    downsamplers_0: Downsample
    upsamplers_0: Upsample

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        attends: bool,
        c: UNetConfig,
        remat: str,
        transformers: int | None = None,
    ):
        for i, (before, behind) in enumerate(sizes):
            block = ResnetBlock(before, behind, c.norm_groups, c.norm_eps, c.time_width)
            setattr(self, f"resnets_{i}", block)
        self.transformers = (len(sizes) if transformers is None else transformers) * attends
        for i in range(self.transformers):
            setattr(self, f"attentions_{i}", _Transformer(sizes[i][1], c))
        self.remat = remat

    def step(self, i: int, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        """Block i, and the transformer behind it."""
        x = recomputed(getattr(self, f"resnets_{i}"), self.remat, x, time)
        if i < self.transformers:
            x = recomputed(getattr(self, f"attentions_{i}"), self.remat, x, context)
        return x


class _Network(nnx.Module):
    """All levels down, the middle, all levels up."""

    def __init__(self, c: UNetConfig, remat: str):
        sizes, layers = c.channels, c.layers_per_block
        self.levels, self.layers = len(sizes), layers
        self.conv_in = Conv(c.in_channels, sizes[0])
        self.time_embedding = _TimeEmbedding(c)
        skips, width = [sizes[0]], sizes[0]
        for i, (size, attends) in enumerate(zip(sizes, c.attends, strict=True)):
            level = _Level(
                [(width if j == 0 else size, size) for j in range(layers)], attends, c, remat
            )
            skips += [size] * layers
            if i < len(sizes) - 1:
                level.downsamplers_0 = Downsample(size, (1, 1))
                skips.append(size)
            setattr(self, f"down_blocks_{i}", level)
            width = size
        self.mid_block = _Level([(width, width)] * 2, True, c, remat, transformers=1)
        for i, size in enumerate(reversed(sizes)):
            joined = []
            for _ in range(layers + 1):
                joined.append((width + skips.pop(), size))
                width = size
            level = _Level(joined, c.attends[-1 - i], c, remat)
            if i < len(sizes) - 1:
                level.upsamplers_0 = Upsample(size)
            setattr(self, f"up_blocks_{i}", level)
        self.conv_norm_out = GroupNorm(sizes[0], c.norm_groups, c.norm_eps)
        self.conv_out = Conv(sizes[0], c.out_channels)
        self.remat = remat

    def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        time = self.time_embedding(t).astype(x.dtype)
        x = recomputed(self.conv_in, "none", x)
        skips = [x]
        for i in range(self.levels):
            level = getattr(self, f"down_blocks_{i}")
            for j in range(self.layers):
                x = level.step(j, x, time, context)
                skips.append(x)
            if hasattr(level, "downsamplers_0"):
                x = recomputed(level.downsamplers_0, "none", x)
                skips.append(x)
        for j in range(2):
            x = self.mid_block.step(j, x, time, context)
        for i in range(self.levels):
            level = getattr(self, f"up_blocks_{i}")
            for j in range(self.layers + 1):
                x = level.step(j, jnp.concatenate([x, skips.pop()], -1), time, context)
            if hasattr(level, "upsamplers_0"):
                x = recomputed(level.upsamplers_0, "none", x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
