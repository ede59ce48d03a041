"""Values of a decoder at the labels only.

Hidden states are gathered at the label slots first, `(B, W, d)`; the vocabulary projection then
runs over chunks of `W` inside a scan whose body is rematerialised. So no `(batch, seq, vocab)`
array exists: the largest logits array is `(B, chunk, V)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.activation_sharding import batch_sharded, batch_ways
from models.decoder.model import Decoder
from models.learner import Batch

LOGITS_BYTES = 256 * 2**20  # largest logits array of one chunk, float32, on one device


def label_chunk(rows: int, width: int, vocab: int) -> int:
    """The largest divisor of `width` whose float32 logits stay within `LOGITS_BYTES` (at least 1).

    The logits are `(rows, chunk, vocab)`.
    """
    limit = max(1, LOGITS_BYTES // (4 * rows * vocab))
    return max(d for d in range(1, width + 1) if width % d == 0 and d <= limit)


def over_labels(fn: Callable[..., Any], vocab: int, *arrays: jax.Array) -> Any:
    """Apply `fn` to `(B, chunk, ...)` slices of `(B, W, ...)` arrays and join its results."""
    rows, width = arrays[0].shape[:2]
    chunk = label_chunk(-(-rows // batch_ways(arrays[0])), width, vocab)
    if chunk == width:
        return fn(*arrays)
    count = width // chunk

    def cut(x):
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    def join(y):
        return jnp.moveaxis(y, 0, 1).reshape(rows, width, *y.shape[3:])

    body = jax.checkpoint(lambda parts: fn(*parts))
    return jax.tree.map(join, jax.lax.map(body, tuple(cut(x) for x in arrays)))


def target_log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`log softmax(logits)[target]`, float32, `(..., V), (...) -> (...)`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def label_states(
    decoder: Decoder, params: Any, batches: Sequence[Batch], **options: Any
) -> list[jax.Array]:
    """Final hidden states where labels are predicted, as `at_labels` returns them.

    One forward pass, which takes `options`, serves all batches (`forward_joined`).
    """
    hidden, _ = forward_joined(decoder, params, batches, **options)
    return [at_labels(hidden[:, i], batch) for i, batch in enumerate(batches)]


def forward_joined(
    decoder: Decoder, params: Any, batches: Sequence[Batch], **options: Any
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """`forward` on the rows of several batches at once.

    The rows have one length. On a mesh the weights are communicated once; rows alternate between
    the batches, so that each stays on its device.

    Returns:
        The final hidden states, `(R, n, T, d)` for n batches, and those of every block in
        `hidden_at`.
    """

    def joined(name: str) -> jax.Array:
        columns = jnp.stack([batch[name] for batch in batches], 1)
        return columns.reshape(-1, columns.shape[-1])

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(-1, len(batches), *x.shape[1:])

    tokens, positions, segment_ids = map(joined, ("tokens", "positions", "segment_ids"))
    hidden, collected = decoder.forward(
        params, tokens, positions=positions, segment_ids=segment_ids, **options
    )
    return apart(hidden), {block: apart(x) for block, x in collected["hidden"].items()}


def at_labels(hidden: jax.Array, batch: Batch) -> jax.Array:
    """Hidden states `(R, T, d)` at the labels of a batch: `(B, W, d)`, or gathered (`gather`).

    A batch without `label_index` has a label in every slot.
    """
    if "label_index" not in batch:
        return hidden
    index = gather(batch, batch["label_index"])
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def gather(batch: Batch, x: jax.Array) -> jax.Array:
    """A label column `(B, W, ...)`; where examples share rows, its labels alone, `(R, N, ...)`.

    The N labels of a row are adjacent, without the padding of every example.
    """
    if (source := batch.get("label_source")) is None:
        return x
    flat = x.reshape(source.shape[0], -1, *x.shape[2:])
    return jnp.take_along_axis(flat, source.reshape(*source.shape, *[1] * (x.ndim - 2)), axis=1)


def spread(batch: Batch, x: jax.Array) -> jax.Array:
    """The inverse of `gather`: `(R, N, ...)` to `(B, W, ...)`, with any value where no label is."""
    if (place := batch.get("label_place")) is None:
        return x
    index = place.reshape(x.shape[0], -1, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1).reshape(*place.shape, *x.shape[2:])


def head_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `unembed` reads (a frozen copy of them serves cached hidden states)."""
    return {name: params[name] for name in ("lm_head" if "lm_head" in params else "embed",)}


def head_copies(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters that `unembed` reads, on a mesh one copy for every group of rows of a device.

    Values are rounded to `dtype`, in which they are sent once to make the copies. The gradient of a
    copy stays on its device: contributions of label chunks and batches add up there, and the sum
    over devices is taken once. (The gradient of a single array would be summed over devices at each
    of its uses.)
    """

    def copies(kernel):
        ways = batch_ways(kernel)
        if ways == 1:
            return kernel
        found = jnp.broadcast_to(kernel.astype(dtype), (ways, *kernel.shape))
        return batch_sharded(found, kernel, whole=False).astype(kernel.dtype)

    return jax.tree.map(copies, head_of(params))


def reduce_states(
    decoder: Decoder, head: Any, states: jax.Array, batch: Batch, fn: Callable[..., Any]
) -> Any:
    """`fn(logits, targets)` over label chunks, of hidden states as `at_labels` returns them.

    Returns `(B, W)`, or a tree of such.
    """

    def chunk(states, targets):
        return fn(decoder.unembed(head, states), targets)

    targets = gather(batch, batch["targets"])
    found = over_labels(chunk, decoder.config.vocab_size, states, targets)
    return jax.tree.map(lambda x: spread(batch, x), found)


def score(decoder: Decoder, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """The fused scoring pass: everything the likelihood metrics need of a batch's labels.

    `logp = log p(y)`, `match = [argmax p = y]`, `mu = sum_v p log p`,
    `var = sum_v p (log p)^2 - mu^2`, each `(B, W)`.
    """

    def reduce(logits, targets):
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
        p = jnp.exp(log_p)
        mu = jnp.sum(p * log_p, -1)
        return {
            "logp": jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0],
            "match": jnp.argmax(logits, -1) == targets,
            "mu": mu,
            "var": jnp.sum(p * jnp.square(log_p - mu[..., None]), -1),
        }

    states = label_states(decoder, params, [batch])[0]
    return reduce_states(decoder, params, states, batch, reduce)
