"""The text encoder of CLIP, which Stable Diffusion conditions on: token ids or embeddings in.

The blocks are those of the decoder (`models.decoder.layers.Block`) with layer norm, biases and
learned positions, stacked under `params["layers"]` under the same names.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models import layout
from models.activation_sharding import batch_sharded, lookup
from models.bounds import check_positions
from models.decoder.attention import KeyValues
from models.decoder.layers import ACTIVATIONS
from models.decoder.model import REMAT, abstract_block, abstract_norm

Params = Mapping[str, Any]

# Tables, blocks and norms have the names of a decoder's, and lie as they do.
RULES: layout.Rules = layout.DECODER


@dataclass(frozen=True)
class ClipTextConfig:
    """Shape and conventions of a text encoder; the defaults are those of Stable Diffusion v1.

    All text encoders have in common: layer norm before each part of a block and behind
    the last one, an MLP of two layers, biases everywhere, a table of positions, a causal mask.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_positions: int = 77
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    dtype: str = "float32"

    # What `models.decoder.layers.Block` reads beside these.
    norm: ClassVar[str] = "layer"
    mlp: ClassVar[str] = "plain"
    mlp_bias: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = True
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


@dataclass(frozen=True)
class ClipText:
    r"""A CLIP text encoder as pure functions of `params`.

    .. math::
        e = V_{\mathrm{ids}}, \qquad
        c = \mathrm{norm}(\mathrm{blocks}(e + T_{1 \dots n}))

    with the token table V and the positions T. A token sees itself and those before it. There is
    no mask of padding: the tokens behind the end of a text are part of what a denoiser reads.

    Args:
        config: shape and conventions.
        remat: the part that the backward pass recomputes, as in `Decoder`.

    Raises:
        ValueError: unknown `remat` or activation, or heads that do not divide the width.

    Example:
        >>> encoder = ClipText(ClipTextConfig())
        >>> params = jax.eval_shape(encoder.init, jax.random.key(0))
        >>> jax.eval_shape(encoder.apply, params, jnp.zeros((2, 77), jnp.int32)).shape
        (2, 77, 768)

    Paper: Radford et al., arXiv:2103.00020, section 2.4; Rombach et al., arXiv:2112.10752,
    section 3.3, for its use as a condition.
    """

    config: ClipTextConfig
    remat: str = "none"

    def __post_init__(self):
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, got {self.remat!r}")
        if c.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {c.activation!r}")
        if c.hidden_size % c.num_heads:
            raise ValueError(f"{c.num_heads} does not divide {c.hidden_size}")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        c = self.config
        (_, block), (_, norm) = abstract_block(c), abstract_norm(c)

        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        return {
            "embed": {"embedding": leaf(c.vocab_size, c.hidden_size)},
            "positions": {"embedding": leaf(c.num_positions, c.hidden_size)},
            "layers": jax.tree.map(lambda x: leaf(c.num_layers, *x.shape), block),
            "final_norm": {name: leaf(*x.shape) for name, x in norm.items()},
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters: kernels `N(0, 1 / in)`, residual outputs over `sqrt(2 L)`.

        Token embeddings are `N(0, 0.02^2)` and positions `N(0, 0.01^2)`, as CLIP was begun with;
        norms are 1 and biases 0.
        """
        depth = self.config.num_layers
        tables = {"embed/embedding": 0.02, "positions/embedding": 0.01}

        def draw(path, leaf):
            name = layout.path_str(path)
            if name.endswith("scale"):
                return jnp.ones(leaf.shape, leaf.dtype)
            if name.endswith("bias"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            std = tables[name] if name in tables else leaf.shape[-2] ** -0.5
            if name.endswith(("/o/kernel", "/down/kernel")):
                std /= (2 * depth) ** 0.5
            mine = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return std * jax.random.normal(mine, leaf.shape, leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, self.shapes())

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """Token embeddings `V[ids]`, without positions: what `apply_embeds` takes.

        Args:
            params: the parameter tree.
            ids: int32 `(B, T)`.

        Returns:
            `(B, T, d)` in the dtype of the model.
        """
        return lookup(params["embed"]["embedding"], ids, jnp.dtype(self.config.dtype))

    def apply(self, params: Params, ids: jax.Array) -> jax.Array:
        """Hidden states of token ids: `apply_embeds` of `embed`, bit by bit.

        Args:
            params: the parameter tree.
            ids: int32 `(B, T)`, T at most `num_positions`.

        Returns:
            `(B, T, d)` behind the last norm, in the dtype of the model.

        Raises:
            UserError: rows longer than the positions that the model has learned.
        """
        return self.apply_embeds(params, self.embed(params, ids))

    def apply_embeds(self, params: Params, embeds: jax.Array) -> jax.Array:
        """Hidden states of token embeddings, which need not be in the vocabulary.

        Args:
            params: the parameter tree; `embed` is not read.
            embeds: `(B, T, d)`, T at most `num_positions`; positions are added here.

        Returns:
            `(B, T, d)` behind the last norm, in the dtype of the model.

        Raises:
            ValueError: embeddings of another shape.
            UserError: rows longer than the positions that the model has learned.

        Example:
            >>> encoder = ClipText(ClipTextConfig())
            >>> def written(token):  # at position 5, as a pseudo-token
            ...     params = jax.tree.map(lambda x: jnp.zeros(x.shape), encoder.shapes())
            ...     embeds = encoder.embed(params, jnp.full((1, 77), 320)).at[:, 5].set(token)
            ...     return encoder.apply_embeds(params, embeds).sum()
            >>> jax.eval_shape(jax.grad(written), jnp.zeros(768)).shape
            (768,)
        """
        c = self.config
        if embeds.ndim != 3 or embeds.shape[-1] != c.hidden_size:
            raise ValueError(f"embeds are {embeds.shape}, the model reads (B, T, {c.hidden_size})")
        length = embeds.shape[1]
        check_positions(c.num_positions, length, "a prompt")
        dtype, table = jnp.dtype(c.dtype), params["positions"]["embedding"]
        x = embeds.astype(dtype) + table[:length].astype(dtype)
        x = batch_sharded(x, table)
        graph, _ = abstract_block(c)
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]

        def body(x, layer):
            y, _ = nnx.merge(graph, layer)(
                x, None, jnp.float32(1), lambda k, v: ([KeyValues(k, v, mask, causal=True)], None)
            )
            return batch_sharded(y, table), None

        if (policy := REMAT[self.remat]) is not None:
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x, _ = jax.lax.scan(body, x, params["layers"])
        return nnx.merge(abstract_norm(c)[0], params["final_norm"])(x)
