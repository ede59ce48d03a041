"""The layers of a transformer block (Flax NNX): norms, rotary positions, attention, MLPs.

The modules never leave this package: `models.decoder.model` splits one abstract block into a graph
definition and merges it with one layer's slice of the stacked parameters inside the scan body.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlib_unlearn.optim.zeroth_order.perturbations import matmul
from models.decoder.attention import attend

LINEAR = "linear"  # the name of a `Linear`'s output in policies of `jax.checkpoint`


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary positions: `linear` (all by 1/factor) or `llama3` (low ones)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequency of each rotated pair, `theta^(-2i/head_dim)`, then scaled.

    Float32 `(head_dim // 2,)`.
    """
    freq = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind != "llama3":
        raise ValueError(f"rope scaling kind {scaling.kind!r} is not 'linear' or 'llama3'")
    wavelength = 2 * math.pi / freq
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * freq / scaling.factor + blend * freq
    return jnp.where(
        wavelength > low, freq / scaling.factor, jnp.where(wavelength < high, freq, between)
    )


def rotary(positions: jax.Array, freq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables `(B, T, 1, head_dim // 2)` of integer positions `(B, T)`."""
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `(B, T, H, D)`; the pairs are `(i, i + D/2)`, "rotate half" as in HF checkpoints."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x.dtype
    )


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, statistics in float32 over the last axis."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis in `x.dtype`; float32 inside."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return normal.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis.

    Statistics are float32, or float64 of float64.
    """

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.scale[...].astype(x.dtype) + self.bias[...].astype(
            x.dtype
        )


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`, the kernel `(in, out)` or a `Factored` one."""

    def __init__(self, size_in: int, size_out: int, use_bias: bool):
        self.kernel = nnx.Param(jnp.zeros((size_in, size_out)))
        self.bias = nnx.Param(jnp.zeros((size_out,))) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # Flat rows: contracting two axes in the kernel's gradient costs XLA:CPU a transpose each.
        # `get_value`: a layer map may have put a `Factored` in the kernel's place.
        y = matmul(x.reshape(-1, x.shape[-1]), self.kernel.get_value())
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        y = checkpoint_name(y, LINEAR)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Attention(nnx.Module):
    """Grouped-query attention; `temperature` divides the scores (after rotation and QK-norm)."""

    def __init__(self, c):
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q = Linear(c.hidden_size, c.num_heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.num_heads * c.head_dim, c.hidden_size, c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def __call__(self, x, table, temperature, keep: Callable):
        """`table`: of `rotary`; None: queries and keys are not rotated."""
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        q = q * (1.0 / temperature).astype(q.dtype)
        parts, cache = keep(k, v)
        y = attend(q, parts, self.head_dim**-0.5)
        return self.o(y.reshape(batch, length, self.heads * self.head_dim)), cache


# `gelu_new` is the approximation by tanh, as GPT-2 has it; `quick_gelu` that by a sigmoid, as CLIP
# has it; `gelu` the function itself.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, c):
        self.gate = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class PlainMLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, c):
        self.up = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


MLPS: dict[str, type[MLP | PlainMLP]] = {"gated": MLP, "plain": PlainMLP}


class Block(nnx.Module):
    """Pre-norm residual block; `keep(k, v) -> (parts to attend to, cache)` may cache them."""

    def __init__(self, c):
        self.attn_norm = NORMS[c.norm](c.hidden_size, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = NORMS[c.norm](c.hidden_size, c.norm_eps)
        self.mlp = MLPS[c.mlp](c)

    def __call__(self, x, table, temperature, keep: Callable):
        y, cache = self.attn(self.attn_norm(x), table, temperature, keep)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache
