"""A vision transformer for classification: patches, stacked blocks, a scan, logits out.

The blocks are those of the decoder (`models.decoder.layers.Block`) without a causal mask, stacked
under `params["layers"]` under the same names, so they are trained, perturbed and adapted as a
decoder's blocks are.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_unlearn.objectives import Context, Questions
from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored, matmul
from models import layout
from models.activation_sharding import batch_sharded
from models.decoder.attention import KeyValues
from models.decoder.model import REMAT, LayerMap, Params, abstract_block, abstract_norm, segments_of
from models.learner import CLASSES, AskedClassifier, Batch, Frozen

# The blocks lie as a decoder's do.
RULES: layout.Rules = (
    (r"patch_embed/kernel$", (None, "fsdp")),
    (r"cls/embedding$", ()),
    (r"head/kernel$", ("fsdp", None)),  # as many columns as classes, which tp need not divide
    *layout.DECODER,
)


@dataclass(frozen=True)
class ViTConfig:
    """Shape and conventions of a vision transformer.

    `mean` and `std` normalise pixels from 0 to 1, a number for each channel. All have the following
    in common: layer norm before each part of a block, an MLP of two layers, a table
    of positions, and a class token whose state predicts.
    """

    image_size: int
    patch_size: int
    channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_classes: int
    norm_eps: float = 1e-12
    activation: str = "gelu"
    qkv_bias: bool = True
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    dtype: str = "float32"

    # What `models.decoder.layers.Block` reads beside these.
    norm: ClassVar[str] = "layer"
    mlp: ClassVar[str] = "plain"
    mlp_bias: ClassVar[bool] = True
    o_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    @property
    def num_kv_heads(self) -> int:
        """Every head has its own keys."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, self.channels


def patches(images: jax.Array, size: int) -> jax.Array:
    """The square patches of images, row by row: `(B, H, W, C)` to `(B, N, size * size * C)`.

    Example:
        >>> patches(jnp.arange(16).reshape(1, 4, 4, 1), 2)[0].tolist()[:2]
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cut = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, rows * columns, size * size * channels)


@dataclass(frozen=True)
class ViT:
    r"""A vision transformer as pure functions of `params`.

    .. math::
        x = [c;\, P_1 E + e;\, \dots;\, P_N E + e] + T, \qquad
        z = \mathrm{norm}(\mathrm{blocks}(x))_0 H + h

    with patches P of the normalised pixels, class token c, positions T and head H.

    Args:
        config: shape and conventions.
        remat: the part that the backward pass recomputes, as in `Decoder`.

    Raises:
        ValueError: unknown `remat`, or sizes that do not divide one another.

    Example:
        >>> vit = ViT(ViTConfig(8, 4, 1, 12, 24, 2, 3, 10))
        >>> params = vit.init(jax.random.key(0))
        >>> vit.logits(params, jnp.zeros((2, 8, 8, 1), jnp.uint8)).shape
        (2, 10)

    Paper: Dosovitskiy et al., arXiv:2010.11929, section 3.1.
    """

    config: ViTConfig
    remat: str = "none"

    def __post_init__(self):
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, got {self.remat!r}")
        for whole, part in ((c.image_size, c.patch_size), (c.hidden_size, c.num_heads)):
            if whole % part:
                raise ValueError(f"{part} does not divide {whole}")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        c = self.config
        (_, block), (_, norm) = abstract_block(c), abstract_norm(c)

        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        width = c.hidden_size
        return {
            "patch_embed": {
                "kernel": leaf(c.patch_size**2 * c.channels, width),
                "bias": leaf(width),
            },
            "cls": {"embedding": leaf(width)},
            "positions": {"embedding": leaf(c.num_tokens, width)},
            "layers": jax.tree.map(lambda x: leaf(c.num_layers, *x.shape), block),
            "final_norm": {name: leaf(*x.shape) for name, x in norm.items()},
            "head": {"kernel": leaf(width, c.num_classes), "bias": leaf(c.num_classes)},
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters: kernels `N(0, 1 / in)`, residual outputs over `sqrt(2 L)`, head 0.

        Class token and positions are `N(0, 0.5^2)`, norms 1 and biases 0. Positions must not be
        small beside embedded patches, whose entries are of order 1: at 0.02 a small model learns
        what is in an image long before it learns where.
        """
        depth = self.config.num_layers

        def draw(path, leaf):
            name = layout.path_str(path)
            if name.endswith("scale"):
                return jnp.ones(leaf.shape, leaf.dtype)
            if name.endswith("bias") or name.startswith("head"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            std = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.5
            if name.endswith(("/o/kernel", "/down/kernel")):
                std /= (2 * depth) ** 0.5
            mine = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return std * jax.random.normal(mine, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, self.shapes())

    def logits(
        self,
        params: Params,
        images: jax.Array,
        *,
        layer_map: LayerMap | None = None,
        train_from: int = 0,
    ) -> jax.Array:
        """Logits of the classes.

        Args:
            params: the parameter tree; `params["layers"]` is one stack or a tuple of consecutive
                stacks, and the leaves of `ViTLearner.factored` may be `Factored`.
            images: `(B, H, W, C)`, uint8 pixels; or floats, which are normalised already.
            layer_map: `(layer_params, index) -> layer_params`, applied inside the scan body to one
                layer at a time.
            train_from: static; no gradient below this block.

        Returns:
            Float32 `(B, num_classes)`.

        Raises:
            ValueError: images of another shape.
        """
        c = self.config
        if images.shape[1:] != c.image_shape:
            raise ValueError(f"images are {images.shape[1:]}, the model reads {c.image_shape}")
        dtype = jnp.dtype(c.dtype)
        embed, head = params["patch_embed"], params["head"]
        if images.dtype == jnp.uint8:
            images = (images / jnp.float32(255) - jnp.array(c.mean)) / jnp.array(c.std)
        x = matmul(patches(images.astype(dtype), c.patch_size), embed["kernel"])
        x = x + embed["bias"].astype(dtype)
        first = params["cls"]["embedding"].astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden_size)), x], 1)
        x = x + _table(params["positions"]["embedding"], dtype)
        x = batch_sharded(x, embed["bias"])
        graph, _ = abstract_block(c)
        mask = jnp.ones((1, 1, c.num_tokens, c.num_tokens), bool)

        def body(x, inputs):
            layer, index = inputs
            if layer_map is not None:
                layer = layer_map(layer, index)
            y, _ = nnx.merge(graph, layer)(
                x, None, jnp.float32(1), lambda k, v: ([KeyValues(k, v, mask)], None)
            )
            return batch_sharded(y, embed["bias"]), None

        if (policy := REMAT[self.remat]) is not None:
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        for start, end, layers in segments_of(params["layers"], {train_from}, c.num_layers):
            if start == train_from > 0:
                x = jax.lax.stop_gradient(x)
            x, _ = jax.lax.scan(body, x, (layers, jnp.arange(start, end)))
        if train_from == c.num_layers:
            x = jax.lax.stop_gradient(x)
        final = nnx.merge(abstract_norm(c)[0], params["final_norm"])(x[:, 0])
        return matmul(final.astype(jnp.float32), head["kernel"]) + head["bias"].astype(jnp.float32)


def _table(table: jax.Array | Factored, dtype: Any) -> jax.Array:
    """A table of positions, all of which are read."""
    if not isinstance(table, Factored):
        return table.astype(dtype)
    return table.kernel.astype(dtype) + table.left.astype(dtype) @ table.right.astype(dtype).T


@dataclass(frozen=True)
class ViTLearner:
    """A vision transformer as the trainer sees it, see `models.learner.Learner`.

    Args:
        vit: the model.
    """

    vit: ViT
    answers = frozenset((CLASSES,))
    rules = RULES
    layered = True
    factored = ("patch_embed/kernel", "positions/embedding", "head/kernel")

    @property
    def sizes(self) -> dict[str, int]:
        """Width of the residual stream, number of blocks, number of classes."""
        c = self.vit.config
        return {"hidden": c.hidden_size, "blocks": c.num_layers, "classes": c.num_classes}

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        return self.vit.config.dtype

    def identity(self) -> Any:
        """The configuration."""
        return self.vit.config

    def shapes(self) -> Any:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return self.vit.shapes()

    def context(
        self,
        params: Any,
        frozen: Frozen,
        batches: Mapping[str, Batch],
        questions: Questions,
        *,
        layer_map: Any = None,
        fuse: bool = True,
        train_from: int = 0,
    ) -> Context:
        """The context in which a loss asks these parameters, see `Learner.context`."""
        del frozen, batches, questions, fuse
        outer = {name: x for name, x in params.items() if name != "layers"}
        params = layout.constrain(outer, rules=RULES) | {"layers": params["layers"]}
        # With a layer map of values or of adapters no gradient flows back to the layer itself.
        layer_map = layer_map or (lambda layer, index: layout.constrain(layer, self.dtype))
        logits = functools.partial(
            self.vit.logits, params, layer_map=layer_map, train_from=train_from
        )
        asked: Any = AskedClassifier(logits)
        return Context(asked)
