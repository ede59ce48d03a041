"""Outputs of the frozen model on a stream's examples: computed once, cached in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.objectives import (
    Objective,
    at_every_slot,
    reference_forward,
)
from models import arrays
from models.decoder.asked import AskedDecoder
from models.decoder.labels import spread, target_log_prob
from models.decoder.model import Decoder, DecoderConfig
from train.data.batches import batch_shape, collate
from train.data.stream import Stream
from train.data.streams import Examples
from train.options.config import to_json
from train.runtime import distributed, files, remote, residency
from train.runtime.sharding import batch_ways, put_batch
from train.runtime.stages import VERSION, digest
from train.runtime.tracking import progress, say

CACHE_BYTES = 4 * 2**30  # of hidden states, which wait in host memory and on disk

# By kind of reference: the cached column of the batch, the output that is computed for it, and
# whether the forward pass takes the row's options.
REFERENCE_COLUMNS = {
    "logps": (("ref_log_probs", "logps", True),),
    "hidden": (("ref_hidden", "hidden", True),),
    "hidden_all": (("ref_hidden", "hidden_all", True),),
    "hidden_pair": (("ref_hidden", "hidden", True), ("ref_plain_hidden", "hidden", False)),
}


def settled(
    objective: Objective,
    options: Any,
    first: int,
    width: int,
    streams: Mapping[str, Stream] | None = None,
) -> Objective:
    """The row with its references cached or forked, as `--objective.reference` says.

    `auto` keeps log-probabilities in the cache, where a stream has examples: a number a label is
    cheaper than any forward pass. Hidden states are forked where the first trained block is above
    block 0, so that the two models share a prefix, or where they fill more than `CACHE_BYTES`.

    Args:
        objective: the row, as `objectives.resolve` gives it.
        options: its options.
        first: the first trained block.
        width: the width of the hidden states.
        streams: the examples; None: they are few.
    """
    cached = cached_streams(objective)
    if getattr(options, "reference", "auto") != "auto" or objective.slots or not cached:
        return objective
    streams = streams or {}
    if all(isinstance(streams.get(name), Examples | None) for name in cached):
        if not needs_head(objective):
            return objective
        size = sum(
            4 * width * (len(e.tokens) - e.num_prompt) * len(REFERENCE_COLUMNS[kind])
            for name, kind in cached.items()
            if kind != "logps" and isinstance(stream := streams.get(name), Examples)
            for e in stream.examples
        )
        if first == 0 and size <= CACHE_BYTES:
            return objective
    return objective.forking()


def cached_streams(objective: Objective) -> dict[str, str]:
    """The streams with cached outputs of the frozen model, and the kind of output of each."""
    return {name: kind for name, kind in objective.reference.items() if kind != "fork"}


def needs_head(objective: Objective) -> bool:
    """Whether a row's references are hidden states, which a frozen head unembeds."""
    return any(kind != "logps" for kind in cached_streams(objective).values())


def reference_values(
    decoder: Decoder,
    kind: str,
    params: Any,
    options: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
) -> jax.Array:
    """The frozen model's outputs at a batch's labels: `logps` (B, W), `hidden` (B, W, d), float32.

    `hidden_all` (B, T, d) are the hidden states at every slot.
    """
    asked = AskedDecoder(decoder, params, options)
    if kind == "hidden_all":
        return asked.states(at_every_slot(batch)).astype(jnp.float32)
    if kind == "hidden":
        return spread(batch, asked.states(batch)).astype(jnp.float32)
    return asked.reduce_logits(batch, target_log_prob)


_reference_values = jax.jit(reference_values, static_argnums=(0, 1))


def _references(
    decoder: Decoder,
    params: Any,
    stream: Examples,
    kind: str,
    options: Mapping[str, Any],
    mesh: Any,
    label: str,
    slots: int = 0,
) -> list[np.ndarray]:
    """Per example, the frozen model's log-probabilities or hidden states at its labels.

    `slots` is the number of slots of a row, where they are taken at every slot.
    """
    found: list[np.ndarray] = []
    ways = batch_ways(mesh)
    size = -(-8 // ways) * ways
    total = len(stream.examples)
    length, width = batch_shape(stream.examples, stream.length_buckets, stream.label_buckets)
    length = max(length, slots)
    with progress(label, total) as advance:
        for start in range(0, total, size):
            chosen = list(stream.examples[start : start + size])
            batch = collate(
                chosen,
                range(start, start + len(chosen)),
                length,
                width,
                batch_size=size,
                pad_id=stream.pad_id,
            )
            result = arrays.host(
                _reference_values(decoder, kind, params, options, put_batch(batch, mesh))
            )
            found += [
                result[b, : slots or len(e.tokens) - e.num_prompt] for b, e in enumerate(chosen)
            ]
            advance(len(chosen))
            distributed.stop_point()
    return found


def reference_inputs(
    start: str, model: DecoderConfig, kind: str, forward: Mapping[str, Any], stream: Stream
) -> dict[str, Any]:
    """Everything the frozen model's outputs on a stream depend on, as JSON values.

    Args:
        start: sha256 of its parameters.
        model: the decoder's configuration.
        kind: the kind of output, `logps` or `hidden`.
        forward: the options of its forward pass.
        stream: the examples.
    """
    return {
        "version": VERSION,
        "params": start,
        "model": to_json(model),
        "kind": kind,
        "forward": {name: value.tolist() for name, value in forward.items()},
        "examples": stream.identity(),
    }


def with_references(
    streams: Mapping[str, Stream],
    objective: Objective,
    config: Any,
    decoder: Decoder,
    params: Any,
    params_sha: str,
    mesh: Any,
    folder: Path,
) -> dict[str, Stream]:
    """Streams with the reference columns the objective's row asks for, computed once and cached.

    The cache is keyed by the frozen parameters, the examples and the forward options.
    """
    keywords = reference_forward(objective, config, decoder.config.num_layers)
    result = dict(streams)
    for name, kind in cached_streams(objective).items():
        stream = streams[name]
        if not isinstance(stream, Examples):
            raise TypeError(
                f"stream {name}: the frozen model's values are cached for examples alone"
            )
        # Streams share one padded length, which is the longest of any.
        every = kind == "hidden_all"
        known = [s for s in streams.values() if isinstance(s, Examples)]
        slots = max(s.length_buckets[-1] for s in known) if every else 0
        columns = {}
        for column, quantity, with_options in REFERENCE_COLUMNS[kind]:
            options = keywords[name] if with_options else {}
            forward = {k: np.asarray(v, np.float32) for k, v in options.items()}
            inputs = reference_inputs(params_sha, decoder.config, quantity, forward, stream)
            if slots:
                inputs |= {"slots": slots, "pad": stream.pad_id}
            path = folder / "caches" / f"{name}-{quantity}-{digest(inputs)[:16]}.npz"
            values = _shared(path, len(stream.examples))
            if values is None:
                on_device = residency.to_device(params)
                label = f"reference {name}"
                values = _references(
                    decoder, on_device, stream, quantity, forward, mesh, label, slots
                )
                distributed.of_first(lambda path=path, values=values: _write(path, values))
            columns[column] = values
        result[name] = replace(stream, references=columns, every_slot=every)
    return result


def _shared(path: Path, count: int) -> list[np.ndarray] | None:
    """The cache of the first process, broadcast to all; None if it is missing or damaged."""
    found = _read(path, count) if distributed.is_first() else None
    ends = distributed.of_first(
        lambda: None if found is None else np.cumsum([len(v) for v in found])[:-1].tolist()
    )
    if ends is None:
        return None
    flat = np.concatenate(found) if found is not None else None
    return np.split(distributed.array_of_first(flat), ends)


def _read(path: Path, count: int) -> list[np.ndarray] | None:
    """A cache; None if it is missing or damaged, which is reported in one line.

    A flipped bit in a zip file can look like anything: another compression method, an encrypted
    member, an array of terabytes. After any exception the cache is computed again.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            flat, ends, expected = data["flat"], data["ends"], str(data["sha256"])
        sound = (
            (flat.dtype, ends.shape) == (np.float32, (count,))
            and ends.dtype.kind == "i"
            and hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest() == expected
        )
        if sound:
            return np.split(flat, ends[:-1])
    except Exception:
        pass
    say(f"cache {path} is damaged; computing it again")
    return None


def _write(path: Path, values: Sequence[np.ndarray]) -> None:
    flat = np.concatenate(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    sha = hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest()
    ends = np.cumsum([len(v) for v in values])

    def save(part: Path) -> None:
        with part.open("wb") as file:  # given a name, numpy would append .npz
            np.savez(file, flat=flat, ends=ends, sha256=np.array(sha))

    if remote.is_remote(path):
        save(path)  # objects in buckets are written atomically
    else:
        files.write(path, save)
