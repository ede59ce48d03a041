"""Answers from a decoder: one prefill per prompt, then one `lax.while_loop` for a chunk of rows.

Every draw is keyed by (seed, purpose, row id, sample id, step), so a sample belongs to its row:
other rows of the batch, padding, batch size and order change its logits by float32 rounding only.
The key-value cache is allocated once per chunk, donated, and updated in place. Samples of one
prompt are adjacent rows and share its keys and values, read from where prefill stored them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.activation_sharding import batch_sharded
from models.arrays import host, put
from models.bounds import check_positions
from models.chunks import bucket, chunks, make_plan
from models.decoder.model import Decoder, Params
from models.decoder.sampling import SamplingConfig, row_keys, sample_tokens

__all__ = ["SamplingConfig", "generate", "row_keys", "sample_tokens"]

CACHE_BYTES = 2**30  # largest key-value cache of one chunk of rows
SEGMENT = 16  # steps between two checks by the host: progress, dropping finished rows
COMPACT_FLOPS = 1e11  # the least saving by dropping finished rows that is worth a compilation
Answer = tuple[Any, list[int]]


class Rows(NamedTuple):
    """A chunk of B rows while it is decoded; `tokens` `(B, M)` holds the answers so far."""

    cache: dict[str, jax.Array]
    tokens: jax.Array
    lengths: jax.Array
    last: jax.Array
    done: jax.Array
    step: jax.Array


class Draw(NamedTuple):
    """The inputs of every step: keys, prompt lengths, room `(B,)`; stop ids; temperature; top-p."""

    keys: jax.Array
    starts: jax.Array
    limits: jax.Array
    stops: jax.Array
    temperature: jax.Array
    top_p: jax.Array


@functools.partial(jax.jit, static_argnames=("decoder",))
def prefill(decoder: Decoder, params: Params, tokens: jax.Array, lengths: jax.Array):
    """Cache and last hidden state `(P, d)` of left-padded prompts `(P, T)`."""
    count, width = tokens.shape
    positions = jnp.arange(width) - (width - lengths[:, None])
    real = positions >= 0
    if (hidden_id := decoder.config.unattended) is not None:
        # transformers counts the positions of a prompt without the tokens that are masked.
        positions = jnp.cumsum(real & (tokens != hidden_id), -1) - 1
    hidden, found = decoder.forward(
        params,
        tokens,
        positions=jnp.maximum(positions, 0),
        segment_ids=real.astype(jnp.int32),
        cache=decoder.init_cache(count, width, jnp.dtype(decoder.config.dtype)),
    )
    return found["cache"], hidden[:, -1]


def _take(cache: dict[str, jax.Array], which: jax.Array, room: int = 0) -> dict[str, jax.Array]:
    """Rows `which` of a cache, with `room` more slots."""

    def take(name, x):
        if name == "index":
            return x
        axis = 1 if name in ("k", "v") else 0
        padding = [(0, room if i == axis + 1 else 0) for i in range(x.ndim)]
        return jnp.pad(jnp.take(x, which, axis), padding)

    return {name: take(name, x) for name, x in cache.items()}


_prompts = jax.jit(_take)


def _own(decoder: Decoder, params: Params, batch: int, slots: int) -> dict[str, jax.Array]:
    """A cache for answers alone, sharded as the rows are."""
    cache = decoder.init_cache(batch, slots, jnp.dtype(decoder.config.dtype))
    like = params["embed"]["embedding"]
    return cache | {name: batch_sharded(cache[name], like, 1) for name in ("k", "v")}


@functools.partial(jax.jit, static_argnames=("decoder", "max_new", "top_k", "greedy", "shared"))
def _begin(
    decoder: Decoder,
    params: Params,
    prompt: tuple[dict[str, jax.Array], jax.Array],
    which: jax.Array,
    idle: jax.Array,
    draw: Draw,
    *,
    max_new: int,
    top_k: int,
    greedy: bool,
    shared: bool = False,
) -> Rows:
    """A row for each prefilled prompt `which` `(B,)`, with room for the answer; its first token.

    Where rows share their prompts, these are not copied into the rows.
    """
    cache, hidden = prompt
    batch = which.shape[0]
    zeros = jnp.zeros((batch,), jnp.int32)
    room = max_new - 1  # the last token is never fed back
    rows = Rows(
        _own(decoder, params, batch, room) if shared else _take(cache, which, room),
        tokens=jnp.zeros((batch, max_new), jnp.int32),
        lengths=zeros,
        last=zeros,
        done=idle,
        step=jnp.zeros((), jnp.int32),
    )
    logits = decoder.unembed(params, jnp.take(hidden, which, 0))
    return _append(rows, logits, draw, top_k, greedy)


def _append(rows: Rows, logits: jax.Array, draw: Draw, top_k: int, greedy: bool) -> Rows:
    """The next token of every unfinished row; a stop token ends its row and is not stored."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, rows.step))(draw.keys)
    token = sample_tokens(logits, keys, draw.temperature, draw.top_p, top_k=top_k, greedy=greedy)
    done = rows.done | jnp.any(token[:, None] == draw.stops, -1)
    token = jnp.where(done, 0, token)
    lengths = rows.lengths + ~done
    tokens = jax.lax.dynamic_update_slice(rows.tokens, token[:, None], (0, rows.step))
    return Rows(rows.cache, tokens, lengths, token, done | (lengths >= draw.limits), rows.step + 1)


@functools.partial(
    jax.jit, static_argnames=("decoder", "top_k", "greedy"), donate_argnames=("rows",)
)
def advance(
    decoder: Decoder,
    params: Params,
    rows: Rows,
    draw: Draw,
    until: jax.Array,
    prompt: dict[str, jax.Array] | None = None,
    *,
    top_k: int,
    greedy: bool,
) -> Rows:
    """Decode until step `until`, or until every row is done.

    `prompt` is the cache of one prompt for all rows, or of several, each for as many consecutive
    rows.
    """

    def go_on(rows):
        return (rows.step < until) & ~jnp.all(rows.done)

    def step(rows):
        hidden, found = decoder.forward(
            params,
            rows.last[:, None],
            positions=(draw.starts + rows.step - 1)[:, None],
            segment_ids=(~rows.done[:, None]).astype(jnp.int32),
            cache=rows.cache if prompt is None else rows.cache | {"prompt": prompt},
        )
        rows = rows._replace(cache=found["cache"])
        return _append(rows, decoder.unembed(params, hidden[:, 0]), draw, top_k, greedy)

    return jax.lax.while_loop(go_on, step, rows)


@jax.jit
def _select(
    rows: Rows, draw: Draw, prompt: Any, which: jax.Array, count: jax.Array
) -> tuple[Rows, Draw, Any]:
    """Only the rows `which`; those from number `count` on are padding.

    The remaining rows of several prompts are no longer adjacent: each gets a copy of its prompt.
    """
    tokens, lengths, last, done = (jnp.take(x, which, 0) for x in rows[1:5])
    done |= jnp.arange(which.shape[0]) >= count
    some = {name: jnp.take(getattr(draw, name), which, 0) for name in ("keys", "starts", "limits")}
    cache = _take(rows.cache, which)
    if prompt is not None and (prompts := prompt["segment_ids"].shape[0]) > 1:
        first = _take(prompt, which // (rows.done.shape[0] // prompts))
        own = {name: cache[name] for name in first if name != "index"}
        index = cache["index"] + first["segment_ids"].shape[1]
        cache = {
            name: jnp.concatenate([first[name], x], 2 if name in ("k", "v") else 1)
            for name, x in own.items()
        } | {"index": index}
        prompt = None
    rows = Rows(cache, tokens, lengths, last, done, rows.step)
    return rows, draw._replace(**some), prompt


def _grows(cache: dict[str, jax.Array], prompt: dict[str, jax.Array] | None, fewer: int) -> bool:
    """Whether fewer rows need more slots, as those of several prompts get copies (`_select`)."""
    if prompt is None or (prompts := prompt["segment_ids"].shape[0]) == 1:
        return False
    (rows, own), width = cache["segment_ids"].shape, prompt["segment_ids"].shape[1]
    return fewer * (width + own) > rows * own + prompts * width


def _shards(params: Params, sharding: NamedSharding | None) -> int:
    """The number of shards of the batch, which divides the number of rows."""
    count = 1
    for where in (params["embed"]["embedding"].sharding, sharding):
        if isinstance(where, NamedSharding):
            axes: Any = where.mesh.shape
            count = math.lcm(count, math.prod(axes.get(name, 1) for name in ("data", "fsdp")))
    return count


def generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int | jax.Array = 0,
    row_ids: Sequence[int] | None = None,
    num_samples: int = 1,
    batch_size: int = 64,
    prompt_buckets: Sequence[int] | None = None,
    cache_bytes: int = CACHE_BYTES,
    sharding: NamedSharding | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[list[list[int]]]:
    """Answers to every prompt: new token ids, without the stop token.

    Args:
        decoder: the model.
        params: its parameters, used where they are.
        prompts: token ids; prefilled once each, sorted by length and left-padded to a bucket.
        sampling: the options of sampling; greedy answers are computed once and repeated.
        stop_ids: tokens that end an answer.
        pad_id: the token that fills prompts on the left; it is never attended to.
        seed: the seed of all draws, an int or a key.
        row_ids: the numbers that key each prompt's draws; by default its index.
        num_samples: answers per prompt.
        batch_size: rows decoded at once, at most.
        prompt_buckets: lengths to pad prompts to; default two for every power of two.
        cache_bytes: bound on the key-value cache of the rows decoded at once.
        sharding: the layout of the batch's leading axis, on a mesh with axes `data` and `fsdp`.
        progress: a function that is called with the number of newly finished answers.

    Returns:
        `answers[prompt][sample]`: at most `max_new_tokens` ids (fewer where the context ends).

    Raises:
        ValueError: an empty prompt, one that fills the context, or inconsistent counts.
        UserError: a prompt longer than the positions that the model has learned.

    Example:
        >>> from models.decoder.model import DecoderConfig
        >>> decoder = Decoder(DecoderConfig(16, 8, 16, 1, 2, 1, 4))
        >>> params = decoder.init(jax.random.key(0))
        >>> options = {"sampling": SamplingConfig(max_new_tokens=3), "stop_ids": (), "pad_id": 0}
        >>> [len(found[0]) for found in generate(decoder, params, [[1, 2], [3]], **options)]
        [3, 3]

    Paper: n samples a prompt for leak@k, arXiv 2511.04934; temperature, top-k, top-p in its order.
    """
    c = decoder.config
    context = c.max_position_embeddings
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples {num_samples} and batch_size {batch_size} must be >= 1")
    if len(row_ids) != len(prompts):
        raise ValueError(f"{len(row_ids)} row_ids for {len(prompts)} prompts")
    for i, prompt in enumerate(prompts):
        check_positions(
            c.learned_positions, len(prompt) + 1, f"prompt {i} and the first token of its answer"
        )
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, outside 1..{context - 1}")
    if not prompts:
        return []
    greedy = sampling.temperature == 0
    samples = 1 if greedy else num_samples
    copies = num_samples // samples
    max_new = sampling.max_new_tokens
    static = {"top_k": 0 if greedy else sampling.top_k, "greedy": greedy}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    slot_bytes = 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    shards = _shards(params, sharding)
    longest = bucket(len(prompts[order[-1]]), prompt_buckets)
    slots = cache_bytes // slot_bytes
    plan = make_plan(len(prompts), samples, batch_size, slots, longest, max_new, shards)

    def place(x):
        if sharding is None or x.shape[0] % shards:
            return jnp.asarray(x)
        return put(x, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])))

    answers: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    for first in range(0, len(order), plan.prefilled):
        group = order[first : first + plan.prefilled]
        width = bucket(len(prompts[group[-1]]), prompt_buckets)
        tokens = np.full((plan.prefilled, width), pad_id, np.int32)
        lengths = np.ones((plan.prefilled,), np.int32)
        for slot, i in enumerate(group):
            tokens[slot, width - len(prompts[i]) :] = prompts[i]
            lengths[slot] = len(prompts[i])
        hidden = 0 if c.unattended is None else (tokens == c.unattended).sum(-1)
        # Where the padding is that token too, it is counted among them.
        starts = lengths - hidden + (width - lengths) * (pad_id == c.unattended)
        prompt = prefill(decoder, params, place(tokens), place(lengths))
        for chunk in chunks(len(group), samples, plan):
            some = next(job for job in chunk if job is not None)
            which, sample_ids = np.array([job or some for job in chunk], np.int32).T
            draw = Draw(
                row_keys(seed, place(_row_ids(row_ids, group, which)), place(sample_ids)),
                place(starts[which].astype(np.int32)),
                place(np.minimum(max_new, context - lengths[which]).astype(np.int32)),
                jnp.array(stop_ids, jnp.int32),
                jnp.float32(sampling.temperature),
                jnp.float32(sampling.top_p),
            )
            idle = place(np.array([job is None for job in chunk]))
            shared = plan.beside > 1
            before = _prompts(prompt[0], which[:: plan.beside]) if shared else None
            rows = _begin(
                decoder,
                params,
                prompt,
                place(which),
                idle,
                draw,
                max_new=max_new,
                shared=shared,
                **static,
            )
            pending = [
                (row, (group[job[0]], job[1])) for row, job in enumerate(chunk) if job is not None
            ]
            found = _finish(decoder, params, rows, draw, before, pending, shards, static)
            for (i, sample), answer in found:
                answers[i][sample] = answer
                if progress is not None:
                    progress(copies)
    return [[list(answer) for answer in found for _ in range(copies)] for found in answers]


def _row_ids(row_ids: Sequence[int], group: list[int], which: np.ndarray) -> np.ndarray:
    return np.array([row_ids[group[slot]] for slot in which], np.uint32)


def _finish(
    decoder: Decoder,
    params: Params,
    rows: Rows,
    draw: Draw,
    prompt: dict[str, jax.Array] | None,
    pending: list[tuple[int, Any]],
    shards: int,
    static: dict[str, Any],
) -> Iterator[Answer]:
    """Decode a chunk to its end; yield `(owner, answer)` of a row after the segment it ended in.

    `pending` are rows with their owners; others are padding.

    When half of the rows are done, and what that saves is worth another compilation, the others
    continue in a batch of half the size.
    """
    max_new = rows.tokens.shape[1]
    size = sum(x.size for x in jax.tree.leaves(params))
    step = 1
    while pending:
        over = host(rows.done) | (step >= max_new)
        if over.any():
            tokens, lengths = host(rows.tokens), host(rows.lengths)
            for slot, owner in pending:
                if over[slot]:
                    yield owner, tokens[slot, : lengths[slot]].tolist()
            pending = [(slot, owner) for slot, owner in pending if not over[slot]]
        if not pending:
            return
        smaller = over.size
        while smaller % (2 * shards) == 0 and len(pending) <= smaller // 2:
            smaller //= 2
        saved = 2.0 * size * (over.size - smaller) * (max_new - step)
        if saved > COMPACT_FLOPS and not _grows(rows.cache, prompt, smaller):
            which = np.resize([slot for slot, _ in pending], smaller)
            rows, draw, prompt = _select(rows, draw, prompt, which, np.int32(len(pending)))
            pending = [(slot, owner) for slot, (_, owner) in enumerate(pending)]
        step = min(max_new, step + SEGMENT)
        rows = advance(decoder, params, rows, draw, jnp.int32(step), prompt, **static)
