"""Attention by blocks, with shared keys and over several parts, against slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder.attention import KeyValues, attend, causal_blocks, visible
from models.decoder.model import Decoder, DecoderConfig
from train.costs.flops import flops

BATCH, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8


def inputs(length, window=None):
    """Queries, keys, values and the mask of rows that hold a prefix, two leaves and padding."""
    keys = jax.random.split(jax.random.key(length), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (
        jax.random.normal(key, (BATCH, length, h, SIZE)) for key, h in zip(keys, heads, strict=True)
    )
    marks = np.sort(np.random.default_rng(length).integers(1, length, (BATCH, 3)), 1)
    segments = np.ones((BATCH, length), np.int32)
    for row, (first, second, end) in enumerate(marks):
        segments[row, first:second] = 65537
        segments[row, second:end] = 2 * 65536 + 1
        segments[row, end:] = 0
    slots = jnp.arange(length)
    spots = (slots, jnp.asarray(segments), jnp.broadcast_to(slots, (BATCH, length)))
    return q, k, v, visible(spots, spots, window), jnp.asarray(segments > 0)


def reference(q, k, v, mask):
    """Query by query in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, 0, t])
        if not len(seen):
            continue
        group = h // (HEADS // KV_HEADS)
        scores = k[b, seen, group] @ q[b, t, h] * 0.3
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("length", [3, 63, 129, 257, 300])
def test_blocks_equal_a_slow_loop(length, window):
    q, k, v, mask, real = inputs(length, window)
    found = attend(q, [KeyValues(k, v, mask, causal=True)], 0.3)
    wanted = reference(q, k, v, np.asarray(mask))
    real = np.asarray(real)[..., None, None]
    np.testing.assert_allclose(found * real, wanted * real, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", [130, 300])
def test_gradients_of_blocks_are_those_of_the_whole(length):
    q, k, v, mask, real = inputs(length)
    out = jax.random.normal(jax.random.key(1), q.shape) * real[..., None, None]

    def gradients(causal):
        def total(q, k, v):
            return jnp.sum(out * attend(q, [KeyValues(k, v, mask, causal)], 0.3))

        return jax.grad(total, (0, 1, 2))(q, k, v)

    assert len(causal_blocks(length)) > 1
    for mine, whole in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-5)


def test_no_block_reads_keys_behind_its_end():
    """Keys after a block cannot affect it: a NaN there would show."""
    length = 256
    q, k, v, mask, _ = inputs(length)
    (_, end), *_ = causal_blocks(length)
    k, v = k.at[:, end:].set(jnp.nan), v.at[:, end:].set(jnp.nan)
    found = attend(q, [KeyValues(k, v, mask, causal=True)], 0.3)
    assert np.isfinite(found[:, :end]).all() and np.isnan(found[:, end:]).all()


@pytest.mark.parametrize("rows", [(6,), (2,), (1,), (6, 2), (1, 6), (3, 2)])
def test_rows_that_share_keys_equal_rows_with_copies(rows):
    """Each part's keys are shared by B / R consecutive rows; parts have one softmax together."""
    batch, length, rng = 6, 3, np.random.default_rng(0)
    q = rng.standard_normal((batch, length, HEADS, SIZE), np.float32)
    parts = []
    for i, r in enumerate(rows):
        k, v = rng.standard_normal((2, r, 4 + i, KV_HEADS, SIZE), np.float32)
        parts.append(KeyValues(k, v, rng.random((batch, 1, length, 4 + i)) < 0.7))
    k, v = (
        np.concatenate([part[i].repeat(batch // len(part.k), 0) for part in parts], 1)
        for i in (0, 1)
    )
    mask = np.concatenate([part.mask for part in parts], -1)
    seen = mask.any(-1).transpose(0, 2, 1)[..., None]
    # `causal` would be a tracer as an argument.
    found = jax.jit(lambda q, *kvm: attend(q, [KeyValues(*x) for x in kvm], 0.3))(
        q, *(part[:3] for part in parts)
    )
    np.testing.assert_allclose(found * seen, reference(q, k, v, mask), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("length", range(1, 700, 37))
def test_blocks_cover_all_queries_evenly(length):
    blocks = causal_blocks(length)
    assert [t for a, b in blocks for t in range(a, b)] == list(range(length))
    assert len(blocks) == min(max(length // 64, 1), 4)
    sizes = [b - a for a, b in blocks]
    assert max(sizes) == sizes[0] and max(sizes) - min(sizes) <= 8 * len(blocks)


def test_three_eighths_of_the_products_are_left_out():
    """Forward passes of a decoder: four blocks of 64 of its 256 tokens."""
    config = DecoderConfig(32, 16, 32, 2, HEADS, KV_HEADS, SIZE)
    decoder = Decoder(config)
    shapes, tokens = decoder.shapes(), jax.ShapeDtypeStruct((3, 256), jnp.int32)
    counted = flops(lambda p, t: decoder.forward(p, t)[0], shapes, tokens)
    linear = 2 * 16 * SIZE * (2 * HEADS + 2 * KV_HEADS) + 2 * 3 * 16 * 32
    whole = 2 * 2 * HEADS * SIZE * 256
    assert counted == 2 * 3 * 256 * (linear + whole * 5 // 8)
    # Keys of a cache are not causal: all of it is read.
    cache = jax.eval_shape(lambda: decoder.init_cache(3, 256))
    cached = flops(lambda p, t, c: decoder.forward(p, t, cache=c)[0], shapes, tokens, cache)
    assert cached == 2 * 3 * 256 * (linear + whole)
