"""Draws the next token: temperature, then top-k, then top-p, with the row's own key.

Nothing sorts the vocabulary, and a traced temperature or top-p compiles once for a sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PURPOSE = 0x67656E  # folded into the seed: no other consumer of the run's seed shares these draws
BLOCK = 256  # vocabulary entries drawn from together, see `gumbel_max`


@dataclass(frozen=True)
class SamplingConfig:
    """Options of choosing the next token.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens until their mass reaches `top_p`; 1 keeps all.
        top_k: keep the `top_k` likeliest tokens; 0 keeps all.
        max_new_tokens: longest answer in tokens.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> SamplingConfig(temperature=0.8, top_p=0.95).max_new_tokens
        64
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def row_keys(seed: int | jax.Array, row_ids: Any, sample_ids: Any) -> jax.Array:
    """One key per row: `fold_in(fold_in(fold_in(key(seed), PURPOSE), row id), sample id)`.

    Args:
        seed: an int or a key.
        row_ids: `(B,)` integers.
        sample_ids: `(B,)` integers.

    Returns:
        Keys `(B,)`; the draw of step t uses `fold_in(key, t)`.

    Example:
        >>> row_keys(0, [5, 5], [0, 1]).shape
        (2,)
    """
    base = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
    return _fold(base, jnp.asarray(row_ids, jnp.uint32), jnp.asarray(sample_ids, jnp.uint32))


@jax.jit
def _fold(base: jax.Array, rows: jax.Array, samples: jax.Array) -> jax.Array:
    base = jax.random.fold_in(base, PURPOSE)

    def one(row, sample):
        return jax.random.fold_in(jax.random.fold_in(base, row), sample)

    return jax.vmap(one)(rows, samples)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Set to -inf everything outside the nucleus of each row of logits `(B, V)`, without sorting.

    Token v stays iff the mass of strictly likelier tokens, `sum_{u: p_u > p_v} p_u`, is below
    `top_p`. The smallest probability kept is found by bisection over float32 bit patterns (31
    halvings, exact). Equal probabilities stay or go together; the likeliest token always stays.

    Example:
        >>> nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.6) > -jnp.inf
        Array([[ True,  True, False]], dtype=bool)
    """
    p = jax.nn.softmax(logits, -1)
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)  # in the order of p, since p >= 0

    def halve(_, bounds):
        low, high = bounds  # the mass above low reaches top_p, the mass above high does not
        middle = low + (high - low) // 2
        inside = jnp.sum(jnp.where(bits > middle[:, None], p, 0.0), -1) < top_p
        return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

    highest = jnp.max(bits, -1)
    _, threshold = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(highest, -1), highest))
    return jnp.where(bits >= threshold[:, None], logits, -jnp.inf)


def gumbel_max(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """A draw from `softmax(logits)` for each row of `(B, V)`, by Gumbel-max in two levels.

    A block of the vocabulary is drawn by its logsumexp, then a token within the block: the same
    distribution from `V / 256 + 256` noise values in place of V (at V = 49152 noise was a third
    of a decoding step), and as insensitive to rounding, which an inverse CDF is not.
    """
    batch, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    padding = ((0, 0), (0, blocks * BLOCK - vocab))
    logits = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(batch, blocks, BLOCK)
    pair = jax.vmap(lambda key: jax.random.split(key, 2))(keys)

    def pick(values, keys):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, values.shape[-1:], jnp.float32))(keys)
        return jnp.argmax(values + noise, -1).astype(jnp.int32)

    block = pick(jax.nn.logsumexp(logits, -1), pair[:, 0])
    inside = jnp.take_along_axis(logits, block[:, None, None], 1)[:, 0]
    return block * BLOCK + pick(inside, pair[:, 1])


def sample_tokens(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float,
    top_p: jax.Array | float,
    *,
    top_k: int = 0,
    greedy: bool = False,
) -> jax.Array:
    """One token per row: temperature, then top-k, then top-p, then a draw with the row's own key.

    Args:
        logits: `(B, V)`; all is computed in float32.
        keys: `(B,)` keys.
        temperature: divides the logits; traced.
        top_p: keep a token while those likelier (among the top-k) have less mass; traced.
        top_k: static; 0 keeps all.
        greedy: static; argmax, and all else is ignored.

    Returns:
        int32 `(B,)`.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> sample_tokens(jnp.array([[0.0, 9.0, 1.0]]), keys, 1e-3, 1.0)
        Array([1], dtype=int32)
    """
    logits = logits.astype(jnp.float32)
    if greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    # The maximum comes off first: a tiny temperature gives -inf for the others, never inf - inf.
    scaled = (logits - jnp.max(logits, -1, keepdims=True)) / temperature
    names = None
    if 0 < top_k < logits.shape[-1]:
        scaled, names = jax.lax.top_k(scaled, top_k)
    top_p = jnp.asarray(top_p, jnp.float32)
    scaled = jax.lax.cond(top_p < 1.0, nucleus, lambda x, _: x, scaled, top_p)
    chosen = gumbel_max(scaled, keys)
    return chosen if names is None else jnp.take_along_axis(names, chosen[:, None], -1)[:, 0]
