"""Streams of training batches: which rows a step sees, tokenised, padded, with cached references.

A batch is a pure function of (seed, stream, step), so resuming needs nothing but the step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from models.asked import AskedDecoder
from models.decoder import Decoder, DecoderConfig
from models.labels import spread, target_log_prob
from train.config import to_json
from train.data.batches import batch_shape, collate, make_buckets, paired_indices, training_indices
from train.data.examples import Example
from train.data.packing import Packing, balanced, collate_packed, fits, make_packing
from train.runtime import distributed, files, residency
from train.runtime.keys import VERSION
from train.runtime.sharding import batch_ways, put_batch
from train.runtime.stages import digest
from train.runtime.tracking import progress, say

# What a kind of reference caches: the batch's column, what is computed for it, and whether the
# forward pass takes the row's options.
REFERENCE_COLUMNS = {
    "logps": (("ref_log_probs", "logps", True),),
    "hidden": (("ref_hidden", "hidden", True),),
    "hidden_all": (("ref_hidden", "hidden_all", True),),
    "hidden_pair": (("ref_hidden", "hidden", True), ("ref_plain_hidden", "hidden", False)),
}


FOLLOWERS = ("idk", "alternate")  # streams of other answers to the questions of the main stream


def needs_head(objective: Objective) -> bool:
    """Whether a row's references are hidden states, which a frozen head unembeds."""
    return any(kind not in ("logps", "fork") for kind in objective.reference.values())


@dataclass(frozen=True)
class Stream:
    """The examples of one stream and, per example, the cached reference columns.

    Args:
        examples: tokenised rows.
        pad_id: token in padded slots.
        length_buckets: padded lengths.
        label_buckets: padded numbers of labels.
        references: column name -> one array per example, first axis its labels.
        packing: how examples share rows of tokens; None: each has its own.
        every_slot: references are stored for every slot of a padded row, not for its labels.
    """

    examples: Sequence[Example]
    pad_id: int
    length_buckets: tuple[int, ...]
    label_buckets: tuple[int, ...]
    references: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    packing: Packing | None = None
    every_slot: bool = False

    def identity(self) -> str:
        """sha256 of the examples: of their lengths, of where answers begin, and of their tokens."""
        sizes = np.array([[len(e.tokens), e.num_prompt] for e in self.examples], "<i8")
        found = hashlib.sha256(sizes.tobytes())
        for example in self.examples:
            found.update(np.asarray(example.tokens, "<i4").tobytes())
        return found.hexdigest()

    def order(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """An order of these rows in which examples that share a row fill it evenly."""
        if self.packing is None:
            return np.arange(len(rows))
        return balanced([len(self.examples[i].tokens) for i in rows], self.packing.together)

    def shape(self, rows: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The padded sizes of a batch of these rows: tokens, labels; and labels of packed rows."""
        chosen = [self.examples[i] for i in rows]
        length, width = batch_shape(chosen, self.length_buckets, self.label_buckets)
        if self.packing is None:
            return length, width
        length, slots = self.packing.shape(chosen)
        return length, width, slots

    def batch(
        self, rows: Sequence[int] | np.ndarray, shape: tuple[int, ...] | None = None
    ) -> dict[str, np.ndarray]:
        """The padded batch of these rows."""
        chosen, ids = [self.examples[i] for i in rows], [int(i) for i in rows]
        length, width, *slots = self.shape(rows) if shape is None else shape
        if self.packing is None:
            batch = collate(chosen, ids, length, width, pad_id=self.pad_id)
        else:
            together, sizes = self.packing.together, (length, slots[0])
            batch = collate_packed(chosen, ids, together, sizes, width, self.pad_id)
        for column, values in self.references.items():
            tail = values[0].shape[1:]
            places = length if self.every_slot else width
            padded = np.zeros((len(chosen), places, *tail), np.float32)
            for b, row in enumerate(rows):
                padded[b, : len(values[row])] = values[row][:places]
            batch[column] = padded
        return batch


def make_stream(
    examples: Sequence[Example], pad_id: int, buckets: int = 2, batch_size: int = 1
) -> Stream:
    """A stream with at most `buckets` padded lengths (each pair of lengths is a compilation).

    The lengths are quantiles of the longest of `batch_size` examples: its quantile q is the
    quantile `q^(1/batch_size)` of one example.
    """

    def marks(sizes: list[int]) -> tuple[int, ...]:
        ordered = sorted(sizes)
        shares = [((i + 1) / buckets) ** (1 / batch_size) for i in range(buckets)]
        return make_buckets([ordered[math.ceil(q * len(ordered)) - 1] for q in shares], buckets)

    lengths = [len(e.tokens) for e in examples]
    labels = [len(e.tokens) - e.num_prompt for e in examples]
    return Stream(examples, pad_id, marks(lengths), marks(labels))


def pack_streams(
    streams: Mapping[str, Stream], batch_size: int, divides: int, length: int
) -> dict[str, Stream]:
    """The streams with as many examples per row as fill about `length` tokens.

    Unpacked short rows leave slots empty (the longest of a batch sets their length), and each
    recomputes the common prefix of all prompts; packed rows do neither. The losses are the same.

    Args:
        streams: those of one stage.
        batch_size: examples of a global batch.
        divides: a multiple of the number of examples per row: the examples of a micro-batch on one
            device.
        length: tokens that a row should hold; 0 leaves one example in each.
    """
    fitting = [
        k
        for k in range(2, divides + 1)
        if divides % k == 0 and all(fits(s.examples, k, length) for s in streams.values())
    ]
    if not fitting:
        return dict(streams)
    together = max(fitting)
    return {
        name: replace(
            stream,
            label_buckets=stream.label_buckets[-1:],  # costs nothing, and saves compilations
            packing=make_packing(stream.examples, together, batch_size),
        )
        for name, stream in streams.items()
    }


def batches_of(
    streams: Mapping[str, Stream],
    main: str,
    seed: int,
    batch_size: int,
    here: np.ndarray | None = None,
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """`step -> {stream: batch}`: `main` is iterated epoch by epoch, other streams are sampled.

    `idk` and `alternate` follow `main` row by row; where one has several rows for each, the steps
    use them in turn. Indices and shape are those of the global batch, of which only the rows `here`
    (`sharding.rows_here`; None: all) are built. Examples that share rows are ordered so that the
    rows of a batch have similar lengths.
    """

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        rows = {}
        for name, stream in streams.items():
            if name == main or name in FOLLOWERS:
                leader = streams[main]
                count = len(leader.examples)
                index = training_indices(seed, main, step, batch_size, count)
                index = index[leader.order(index)]
                turns = len(stream.examples) // count
                rows[name] = index * turns + step % turns
            else:
                index = paired_indices(seed, name, step, batch_size, len(stream.examples))
                rows[name] = index[stream.order(index)]
        # One shape for all streams: few combinations to compile.
        shapes = [streams[name].shape(index) for name, index in rows.items()]
        shape = tuple(map(max, *shapes)) if len(shapes) > 1 else shapes[0]
        mine = {name: index if here is None else index[here] for name, index in rows.items()}
        return {name: streams[name].batch(index, shape) for name, index in mine.items()}

    return batches


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
    stream: Stream,
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
        kind: which outputs, `logps` or `hidden`.
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
    for name, kind in objective.reference.items():
        if kind == "fork":
            continue
        stream = streams[name]
        # Streams share one padded length, which is the longest of any.
        every = kind == "hidden_all"
        slots = max(s.length_buckets[-1] for s in streams.values()) if every else 0
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
    member, an array of terabytes. Whatever is raised, the cache is computed again.
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

    files.write(path, save)
