"""One decoder for every supported family: stacked blocks, a scan, arrays out.

All blocks share one stack: each leaf under `params["layers"]` has a leading layer axis and the
forward pass scans over it, so compile time is flat in depth. `Decoder` is a frozen, hashable
description; parameters are a plain dict.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored
from models.activation_sharding import batch_sharded, lookup, padded_over_tp
from models.bounds import check_positions
from models.decoder.attention import KeyValues, visible
from models.decoder.layers import (
    ACTIVATIONS,
    LINEAR,
    MLPS,
    NORMS,
    Block,
    RopeScaling,
    rope_frequencies,
    rotary,
)

Params = Mapping[str, Any]
LayerMap = Callable[[Any, jax.Array], Any]

# What the forward pass keeps of a block for the backward pass: a policy of `jax.checkpoint`, None
# for no checkpoint. `dots` keeps the named outputs of projections, not all products without batch
# axes: a product inside a projection (the factors of an adapter) is then not kept as well.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# The words that a configuration takes.
WORDS = {
    "norm": tuple(NORMS),
    "positions": ("rotary", "learned"),
    "mlp": tuple(MLPS),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and conventions of a decoder; families (`models.files.families`) differ only in these.

    `unattended` is a token id that no query sees (it sees others): published code that masks every
    padding id also masks the ends of turns where both are the same token. `WORDS` lists what
    `norm`, `positions`, `mlp` and `activation` may be. Learned positions are a table of
    `max_position_embeddings` rows after `position_offset` (2 in OPT) unused ones.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    unattended: int | None = None
    norm: str = "rms"
    positions: str = "rotary"
    position_offset: int = 0
    mlp: str = "gated"
    activation: str = "silu"

    @property
    def learned_positions(self) -> int | None:
        """The number of learned positions; None: they are rotary, which have no end."""
        return self.max_position_embeddings if self.positions == "learned" else None


@functools.lru_cache(maxsize=64)
def abstract_block(config: Any) -> tuple[Any, Any]:
    """The graph definition of a block, and its parameters as a dict of shapes.

    Args:
        config: a configuration with the fields that `models.decoder.layers.Block` reads.
    """
    return _abstract(lambda: Block(config))


@functools.lru_cache(maxsize=64)
def abstract_norm(config: Any) -> tuple[Any, Any]:
    """The same as `abstract_block` for the norm behind the last block."""
    return _abstract(lambda: NORMS[config.norm](config.hidden_size, config.norm_eps))


def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


@dataclass(frozen=True)
class Decoder:
    """A causal decoder as pure functions of `params`.

    Args:
        config: shape and conventions.
        remat: the part that the backward pass recomputes, a row of `REMAT`: `none`, nothing;
            `dots`, attention and elementwise operations (the results of projections are kept);
            `full`, whole blocks (only their inputs are kept).

    Raises:
        ValueError: `remat` is unknown, or a word of the configuration is not in `WORDS`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> decoder = Decoder(DecoderConfig(16, 8, 16, 2, 2, 1, 4))
        >>> params = decoder.init(jax.random.key(0))
        >>> hidden, _ = decoder.forward(params, jnp.zeros((1, 3), jnp.int32))
        >>> decoder.unembed(params, hidden).shape
        (1, 3, 16)
    """

    config: DecoderConfig
    remat: str = "none"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, got {self.remat!r}")
        for name, words in WORDS.items():
            if (found := getattr(self.config, name)) not in words:
                raise ValueError(f"{name} is one of {', '.join(words)}, got {found!r}")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        c = self.config
        (_, block), (_, norm) = abstract_block(c), abstract_norm(c)

        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        tree = {
            "embed": {"embedding": leaf(c.vocab_size, c.hidden_size)},
            "layers": jax.tree.map(lambda x: leaf(c.num_layers, *x.shape), block),
            "final_norm": {name: leaf(*x.shape) for name, x in norm.items()},
        }
        if c.positions == "learned":
            rows = c.max_position_embeddings + c.position_offset
            tree["positions"] = {"embedding": leaf(rows, c.hidden_size)}
        if not c.tie_embeddings:
            tree["lm_head"] = {"kernel": leaf(c.hidden_size, c.vocab_size)}
        return tree

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters: `N(0, 0.02^2)`, q and k `N(0, 1/d)`, residual outputs over `sqrt(2L)`.

        q and k at `1/sqrt(d)` matter: at 0.02 a small model starts with near-uniform attention and
        memorises as a bag of words. The rest at 0.02 matters too: with larger values the first
        block does all the work, and nothing is left for attention smoothing to tell apart.
        """
        depth = self.config.num_layers

        def draw(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.endswith("scale"):
                return jnp.ones(leaf.shape, leaf.dtype)
            if name.endswith("bias"):
                return jnp.zeros(leaf.shape, leaf.dtype)
            std = leaf.shape[-2] ** -0.5 if name.endswith(("q/kernel", "k/kernel")) else 0.02
            if name.endswith(("/o/kernel", "/down/kernel")):
                std /= (2 * depth) ** 0.5
            noise = jax.random.normal(
                jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape
            )
            return noise.astype(leaf.dtype) * std

        return jax.tree_util.tree_map_with_path(draw, self.shapes())

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """An empty key-value cache for `batch` rows and `length` slots."""
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "segment_ids": jnp.zeros((batch, length), jnp.int32),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "index": jnp.zeros((), jnp.int32),
        }

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits, float32 `(..., V)`, of final hidden states `(..., d)`.

        `params` may hold a copy of the matrix for each group of rows
        (`models.decoder.labels.head_copies`), or a `Factored` one.
        """
        tied = self.config.tie_embeddings
        kernel = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
        if isinstance(kernel, Factored):
            head = {"embed": {"embedding": kernel.kernel}, "lm_head": {"kernel": kernel.kernel}}
            inner, outer = kernel[:0:-1] if tied else kernel[1:]
            thin = hidden @ inner.astype(hidden.dtype)
            low = jnp.einsum(
                "...r,vr->...v",
                thin,
                outer.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            return self.unembed(head, hidden) + low
        kernel = padded_over_tp(kernel.astype(hidden.dtype), kernel.ndim - (2 if tied else 1))
        if kernel.ndim == 2:
            rows, product = hidden, "...d,vd->...v" if tied else "...d,dv->...v"
        else:
            rows = hidden.reshape(len(kernel), -1, hidden.shape[-1])  # a group for each copy
            product = "nmd,nvd->nmv" if tied else "nmd,ndv->nmv"
        logits = jnp.einsum(product, rows, kernel, preferred_element_type=jnp.float32)
        logits = logits[..., : self.config.vocab_size]
        return logits.reshape(*hidden.shape[:-1], self.config.vocab_size)

    def forward(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attention_temperature: jax.Array | float = 1.0,
        layer_map: LayerMap | None = None,
        cache: Mapping[str, jax.Array] | None = None,
        hidden_at: tuple[int, ...] = (),
        depth: int | None = None,
        train_from: int = 0,
        enter: tuple[int, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Final hidden states of a batch of token rows.

        Args:
            params: the parameter tree; `params["layers"]` is one stack or a tuple of consecutive
                stacks.
            tokens: int32 `(B, T)`.
            positions: int32 `(B, T)`, default `0..T-1` (with a cache: from its index on).
            segment_ids: int32 `(B, T)`, default 1. 0 is padding; `group + 65536 * leaf` otherwise:
                a token sees earlier tokens of its group in leaf 0 (a shared prefix) and in its own
                leaf. A token with a negative id sees what the positive one does, and no token sees
                it.
            attention_temperature: divides the attention scores; a traced scalar or `(L,)`, so a
                sweep compiles once.
            layer_map: `(layer_params, index) -> layer_params`, applied inside the scan body to one
                layer at a time.
            cache: a cache made by `init_cache`; new tokens go to slots `[index, index + T)`, the
                update is `collected["cache"]`. Under `"prompt"` it may hold a second one, which is
                only read, of R prompts, each shared by B / R consecutive rows.
            hidden_at: static block indices whose output (residual stream) is collected under
                `collected["hidden"]`.
            depth: static; stop after this many blocks.
            train_from: static; no gradient below this block.
            enter: `(block, hidden (B, T, d))`: start at this (static) block, given the output of
                the one below; the embedding and the blocks below are not computed.

        Returns:
            `(hidden (B, T, d) after the final norm, collected)`.

        Raises:
            ValueError: `hidden_at`, `depth`, `train_from` or `enter` outside the model.
            UserError: rows longer than the positions that the model has learned.
        """
        c = self.config
        depth = c.num_layers if depth is None else depth
        if not 0 <= depth <= c.num_layers or not 0 <= train_from <= c.num_layers:
            raise ValueError(
                f"depth {depth} or train_from {train_from} is outside 0..{c.num_layers}"
            )
        if any(not 0 <= i < depth for i in hidden_at):
            raise ValueError(f"hidden_at {hidden_at} is outside 0..{depth - 1}")
        entry = 0 if enter is None else enter[0]
        if not 0 <= entry <= depth or any(i < entry for i in hidden_at):
            raise ValueError(
                f"enter at block {entry} is outside 0..{depth}, or above a block of {hidden_at}"
            )
        batch, length = tokens.shape
        if positions is None and cache is None:
            check_positions(c.learned_positions, length, "a row of tokens")
        start = jnp.zeros((), jnp.int32) if cache is None else cache["index"]
        slots = start + jnp.arange(length, dtype=jnp.int32)
        positions = jnp.broadcast_to(slots, tokens.shape) if positions is None else positions
        segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        query = (slots, segment_ids, positions)
        keys = segment_ids
        if c.unattended is not None:
            keys = jnp.where(tokens == c.unattended, 0, segment_ids)
        before = None if cache is None else cache.get("prompt")
        if cache is None:
            key, kv = (slots, keys, positions), None
        else:
            at = (0, start)
            segments = jax.lax.dynamic_update_slice(cache["segment_ids"], keys, at)
            places = jax.lax.dynamic_update_slice(cache["positions"], positions, at)
            key = (jnp.arange(segments.shape[1], dtype=jnp.int32), segments, places)
            kv = (cache["k"], cache["v"])
        mask = visible(query, key, c.sliding_window)
        if before is not None:
            segments, places = (
                jnp.repeat(before[name], batch // before[name].shape[0], 0)
                for name in ("segment_ids", "positions")
            )
            earlier = jnp.full((segments.shape[1],), -1, jnp.int32)
            prompt_mask = visible(query, (earlier, segments, places), c.sliding_window)
        table = None
        if c.positions == "rotary":
            table = rotary(positions, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        temperature = jnp.broadcast_to(
            jnp.asarray(attention_temperature, jnp.float32), (c.num_layers,)
        )

        dtype = jnp.dtype(c.dtype)
        embedding = params["embed"]["embedding"]
        x = lookup(embedding, tokens, dtype) if enter is None else enter[1].astype(dtype)
        if enter is None and c.positions == "learned":
            x = x + lookup(params["positions"]["embedding"], positions + c.position_offset, dtype)
        if isinstance(embedding, Factored):
            embedding = embedding.kernel
        graph, _ = abstract_block(c)

        def body(carry, inputs):
            x, kv = carry
            layer, index, heat, prompt = inputs
            if layer_map is not None:
                layer = layer_map(layer, index)

            def keep(k, v):
                if kv is None:
                    return [KeyValues(k, v, mask, causal=True)], None
                place = (index, 0, start, 0, 0)
                new = tuple(
                    jax.lax.dynamic_update_slice(old, one[None].astype(old.dtype), place)
                    for old, one in zip(kv, (k, v), strict=True)
                )
                mine = [
                    jax.lax.dynamic_index_in_dim(n, index, 0, keepdims=False).astype(k.dtype)
                    for n in new
                ]
                parts = [KeyValues(mine[0], mine[1], mask)]
                if prompt is not None:
                    first, second = (x.astype(k.dtype) for x in prompt)
                    parts.append(KeyValues(first, second, prompt_mask))
                return parts, new

            y, kv = nnx.merge(graph, layer)(x, table, heat, keep)
            return (batch_sharded(y, embedding), kv), None

        if (policy := REMAT[self.remat]) is not None:
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)

        collected: dict[str, Any] = {"hidden": {}}
        cuts = {train_from, entry, depth, *(i + 1 for i in hidden_at)}
        for first, last, layers in segments_of(params["layers"], cuts, depth):
            if first < entry:
                continue
            if first == train_from and train_from > 0:
                x = jax.lax.stop_gradient(x)
            prompt = None if before is None else (before["k"][first:last], before["v"][first:last])
            inputs = (layers, jnp.arange(first, last), temperature[first:last], prompt)
            (x, kv), _ = jax.lax.scan(body, (x, kv), inputs)
            if last - 1 in hidden_at:
                collected["hidden"][last - 1] = x
        if depth == train_from:
            x = jax.lax.stop_gradient(x)
        if cache is not None and kv is not None:
            collected["cache"] = {
                "k": kv[0],
                "v": kv[1],
                "segment_ids": key[1],
                "positions": key[2],
                "index": start + length,
            }
        return nnx.merge(abstract_norm(c)[0], params["final_norm"])(x), collected


def segments_of(layers: Any, cuts: set[int], depth: int):
    """Yield `(first, last, stack)` between all cuts and stack borders below `depth`.

    A stack without a cut inside is yielded as it is, not sliced.
    """
    stacks = layers if isinstance(layers, tuple) else (layers,)
    begin = 0
    for stack in stacks:
        end = begin + jax.tree.leaves(stack)[0].shape[0]
        borders = sorted({begin, end, *(cut for cut in cuts if begin < cut < end)})
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            if last > depth:
                break
            if (first, last) == (begin, end):
                yield first, last, stack
            else:
                yield (
                    first,
                    last,
                    jax.tree.map(lambda x, a=first - begin, b=last - begin: x[a:b], stack),
                )
        begin = end
