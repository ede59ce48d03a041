"""The layers of Stable Diffusion's networks (Flax NNX): convolutions, group norm, residual blocks.

Images and feature maps are `(B, H, W, C)`. As in `models.decoder.layers`, the modules never leave
this package: a model splits one abstract network into a graph definition and merges it with its
parameters. Names of leaves are those of PyTorch's modules, with `name.index` written `name_index`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models import layout
from models.activation_sharding import batch_sharded
from models.decoder.attention import KeyValues, attend
from models.decoder.layers import LINEAR, Linear
from models.decoder.model import REMAT

# Scores of one head that are held at once; more queries than that are computed in turn.
MOST_SCORES = 2**20
# A block's first layer is split along its output, the layer behind it along its input.
LAYERS: layout.Rules = (
    (r"(linear_1|time_emb_proj|to_q|to_k|to_v|net_0/proj)/kernel$", ("fsdp", "tp")),
    (r"(linear_2|to_out_0|net_2)/kernel$", ("tp", "fsdp")),
    (r"conv1/kernel$", ("fsdp", "tp")),
    (r"conv2/kernel$", ("tp", "fsdp")),
    (r"(conv|conv_in|conv_shortcut|proj_in|proj_out|conv_out)/kernel$", ("fsdp", None)),
    (r"(scale|bias)$", ()),
)


def abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    """The graph definition of a module, and its parameters as float32 shapes; nothing is computed.

    Example:
        >>> abstract(lambda: Linear(2, 3, False))[1]
        {'kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    shapes = nnx.to_pure_dict(state)
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)


def draw(key: jax.Array, shapes: Any, zero: tuple[str, ...]) -> dict[str, Any]:
    """Random parameters: kernels `N(0, 1 / in)` or 0, scales 1, biases 0.

    A residual block whose last kernel starts at 0 adds nothing at first, so that a deep network
    begins nearly linear.

    Args:
        key: the key of the draw; each leaf folds its own name into it.
        shapes: the tree of the parameters' shapes.
        zero: the names of the modules whose kernels are 0.

    Returns:
        The parameters.

    Example:
        >>> shapes = abstract(lambda: Linear(2, 3, True))[1]
        >>> draw(jax.random.key(0), {"out": shapes}, ("out",))["out"]["kernel"].tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    Paper: Ho et al., arXiv:2006.11239, as in its published code.
    """

    def one(path, leaf):
        owner, name = layout.path_str(path).rsplit("/", 2)[-2:]
        if name == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "bias" or owner in zero:
            return jnp.zeros(leaf.shape, leaf.dtype)
        mine = jax.random.fold_in(key, zlib.crc32(layout.path_str(path).encode()))
        std = math.prod(leaf.shape[:-1]) ** -0.5
        return std * jax.random.normal(mine, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def recomputed(module: Any, remat: str, *inputs: Any) -> Any:
    """`module(*inputs)`, recomputed in the backward pass as a row of `REMAT` says.

    Args:
        module: an NNX module.
        remat: `none`, `dots` or `full`.
        inputs: arrays.

    Returns:
        The output, sharded along the batch where the parameters are on a mesh.

    Example:
        >>> recomputed(Linear(2, 3, False), "full", jnp.ones((1, 2))).shape
        (1, 3)
    """
    graph, state = nnx.split(module)
    like = jax.tree.leaves(state)[0]

    def run(state, *inputs):
        return batch_sharded(nnx.merge(graph, state)(*inputs), like)

    if (policy := REMAT[remat]) is not None:
        run = jax.checkpoint(run, policy=policy)
    return run(state, *inputs)


class Conv(nnx.Module):
    """A convolution with bias, the kernel `(k, k, in, out)`; `padding` before and behind each side.

    With a stride of 1 and the default padding the size of the map stays.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
    ):
        self.kernel = nnx.Param(jnp.zeros((size, size, size_in, size_out)))
        self.bias = nnx.Param(jnp.zeros((size_out,)))
        self.stride = stride
        self.padding = (size // 2, size // 2) if padding is None else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if kernel.shape[:2] == (1, 1):
            # Flat rows, for the kernel's gradient (`models.decoder.layers.Linear`).
            y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
            y = y.reshape(*x.shape[:-1], y.shape[-1])
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                (self.padding, self.padding),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return checkpoint_name(y + self.bias[...].astype(x.dtype), LINEAR)


class GroupNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`, of groups of neighbouring channels.

    Mean and variance are over a group and the whole map, float32, or float64 of float64.
    """

    def __init__(self, size: int, groups: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide.reshape(len(x), -1, self.groups, x.shape[-1] // self.groups)
        wide = wide - jnp.mean(wide, (1, 3), keepdims=True)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), (1, 3), keepdims=True) + self.eps)
        normal = normal.reshape(x.shape).astype(x.dtype)
        return normal * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class ResnetBlock(nnx.Module):
    """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + dense(silu(t)))))`.

    The shortcut is a 1 x 1 convolution where the numbers of channels differ, and no layer at all
    where they do not. Without a width of the time embedding t there is no such term.
    """

    def __init__(
        self, size_in: int, size_out: int, groups: int, eps: float, time_width: int | None = None
    ):
        self.norm1 = GroupNorm(size_in, groups, eps)
        self.conv1 = Conv(size_in, size_out)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, size_out, True)
        self.norm2 = GroupNorm(size_out, groups, eps)
        self.conv2 = Conv(size_out, size_out)
        if size_in != size_out:
            self.conv_shortcut = Conv(size_in, size_out, 1)

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """`time`: the embedding `(B, time_width)`."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time)).astype(h.dtype)[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Downsample(nnx.Module):
    """A convolution with a stride of 2; `padding` before and behind each side."""

    def __init__(self, size: int, padding: tuple[int, int]):
        self.conv = Conv(size, size, stride=2, padding=padding)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, size: int):
        self.conv = Conv(size, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(doubled(x))


def doubled(x: jax.Array) -> jax.Array:
    """A map of twice the height and width, by nearest neighbours.

    Example:
        >>> doubled(jnp.array([1, 2]).reshape(1, 1, 2, 1))[0, :, :, 0].tolist()
        [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    batch, height, width, channels = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return wide.reshape(batch, 2 * height, 2 * width, channels)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` for each head of width d, without a mask.

    Where queries times keys are more than `MOST_SCORES`, blocks of queries are computed in turn,
    and again in the backward pass, so that no array of all scores exists.

    Args:
        q: queries `(B, T, heads * d)`, the heads one after another.
        k: keys `(B, S, heads * d)`.
        v: values, as `k`.
        heads: the number of heads.

    Returns:
        `(B, T, heads * d)` in the dtype of `q`; scores and softmax are float32, or float64 of
        float64.

    Example:
        >>> one = jnp.ones((1, 1, 4))
        >>> attention(jnp.arange(8.0).reshape(1, 2, 4), one, 3 * one, 2)[0].tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    batch, length, width = q.shape
    q, k, v = (x.reshape(batch, -1, heads, width // heads) for x in (q, k, v))
    part = KeyValues(k, v, jnp.ones((1, 1, 1, 1), bool))

    def block(q):
        return attend(q, [part], (width // heads) ** -0.5)

    size = length
    while size * k.shape[1] > MOST_SCORES and size % 2 == 0:
        size //= 2
    if size == length:
        return block(q).reshape(batch, length, width)
    blocks = q.reshape(batch, length // size, size, heads, -1).swapaxes(0, 1)
    found = jax.lax.map(jax.checkpoint(block, prevent_cse=False), blocks)
    return found.swapaxes(0, 1).reshape(batch, length, width)


def sinusoid(t: jax.Array, width: int, dtype: Any = jnp.float32) -> jax.Array:
    r"""The embedding of a time before its layers.

    .. math::
        [\cos(t f), \sin(t f)], \qquad f_j = e^{-\ln(10000)\, j / h}, \quad h = \mathrm{width} / 2

    Args:
        t: times `(B,)`, whole or fractional.
        width: even.
        dtype: the dtype of the result and of the computation.

    Returns:
        `(B, width)`, cosines first.

    Example:
        >>> sinusoid(jnp.array([0, 1]), 2).tolist()
        [[1.0, 0.0], [0.540..., 0.841...]]

    Paper: Vaswani et al., arXiv:1706.03762, section 3.5.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=dtype) / half)
    angles = t.astype(dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
