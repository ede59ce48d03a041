"""Streams of training batches: which rows a step sees, tokenised, padded, with cached references.

A batch is a pure function of (seed, stream, step), so resuming needs nothing but the step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.objectives import Objective, ObjectiveConfig, reference_forward
from models import arrays
from models.decoder import Decoder
from models.policy import label_states, over_labels, target_log_prob
from train import distributed, residency
from train.data.batches import batch_shape, collate, make_buckets, paired_indices, training_indices
from train.data.examples import Example
from train.sharding import batch_ways, put_batch
from train.stages import digest
from train.tracking import progress

REFERENCE_COLUMNS = {"logps": "ref_log_probs", "hidden": "ref_hidden"}


@dataclass(frozen=True)
class Stream:
    """The examples of one stream and, per example, the cached reference columns.

    Args:
        examples: tokenised rows.
        pad_id: token in padded slots.
        length_buckets: padded lengths.
        label_buckets: padded numbers of labels.
        references: column name -> one array per example, first axis its labels.
    """

    examples: Sequence[Example]
    pad_id: int
    length_buckets: tuple[int, ...]
    label_buckets: tuple[int, ...]
    references: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    def shape(self, rows: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """The padded length and label length of a batch of these rows."""
        chosen = [self.examples[i] for i in rows]
        return batch_shape(chosen, self.length_buckets, self.label_buckets)

    def batch(
        self, rows: Sequence[int] | np.ndarray, shape: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """The padded batch of these rows."""
        chosen = [self.examples[i] for i in rows]
        length, width = self.shape(rows) if shape is None else shape
        batch = collate(chosen, [int(i) for i in rows], length, width, pad_id=self.pad_id)
        for column, values in self.references.items():
            tail = values[0].shape[1:]
            padded = np.zeros((len(chosen), width, *tail), np.float32)
            for b, row in enumerate(rows):
                padded[b, : len(values[row])] = values[row]
            batch[column] = padded
        return batch


def make_stream(
    examples: Sequence[Example], pad_id: int, buckets: int = 2, batch_size: int = 1
) -> Stream:
    """A stream with at most `buckets` padded lengths (each pair of lengths is a compilation).

    The lengths are quantiles of the longest of `batch_size` examples: `q^(1/batch_size)` of one.
    """

    def marks(sizes: list[int]) -> tuple[int, ...]:
        ordered = sorted(sizes)
        shares = [((i + 1) / buckets) ** (1 / batch_size) for i in range(buckets)]
        return make_buckets([ordered[math.ceil(q * len(ordered)) - 1] for q in shares], buckets)

    lengths = [len(e.tokens) for e in examples]
    labels = [len(e.tokens) - e.num_prompt for e in examples]
    return Stream(examples, pad_id, marks(lengths), marks(labels))


def batches_of(
    streams: Mapping[str, Stream],
    main: str,
    seed: int,
    batch_size: int,
    here: np.ndarray | None = None,
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """`step -> {stream: batch}`: `main` is walked epoch by epoch, others are drawn.

    `idk` follows `forget` row by row. Indices and shape are those of the global batch, of which
    only the rows `here` (`sharding.rows_here`; None: all) are made.
    """

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        rows = {}
        for name, stream in streams.items():
            count = len(stream.examples)
            if name == main or name == "idk":
                rows[name] = training_indices(seed, main, step, batch_size, count)
            else:
                rows[name] = paired_indices(seed, name, step, batch_size, count)
        # One shape for all streams: few combinations to compile.
        shapes = [streams[name].shape(index) for name, index in rows.items()]
        shape = max(length for length, _ in shapes), max(width for _, width in shapes)
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
    """The frozen model at a batch's labels: `logps` (B, W) or `hidden` (B, W, d), float32."""
    states = label_states(decoder, params, batch, **options)
    if kind == "hidden":
        return states.astype(jnp.float32)

    def log_probs(states, targets):
        return target_log_prob(decoder.unembed(params, states), targets)

    return over_labels(log_probs, decoder.config.vocab_size, states, batch["targets"])


_reference_values = jax.jit(reference_values, static_argnums=(0, 1))


def _references(
    decoder: Decoder,
    params: Any,
    stream: Stream,
    kind: str,
    options: Mapping[str, Any],
    mesh: Any,
    label: str,
) -> list[np.ndarray]:
    """Per example, the frozen model's log-probabilities or hidden states at its labels."""
    found: list[np.ndarray] = []
    ways = batch_ways(mesh)
    size = -(-8 // ways) * ways
    total = len(stream.examples)
    length, width = batch_shape(stream.examples, stream.length_buckets, stream.label_buckets)
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
            found += [result[b, : len(e.tokens) - e.num_prompt] for b, e in enumerate(chosen)]
            advance(len(chosen))
            distributed.stop_point()
    return found


def with_references(
    streams: Mapping[str, Stream],
    objective: Objective,
    options: ObjectiveConfig,
    decoder: Decoder,
    params: Any,
    params_sha: str,
    mesh: Any,
    folder: Path,
) -> dict[str, Stream]:
    """Streams with the reference columns the objective's row asks for, computed once and cached.

    The cache is keyed by the frozen parameters, the examples and the forward options.
    """
    keywords = reference_forward(objective, options, decoder.config.num_layers)
    result = dict(streams)
    for name, kind in objective.reference.items():
        stream = streams[name]
        forward = {k: np.asarray(v, np.float32) for k, v in keywords[name].items()}
        key = digest(
            {
                "params": params_sha,
                "kind": kind,
                "forward": {k: v.tolist() for k, v in forward.items()},
                "examples": [(e.tokens, e.num_prompt) for e in stream.examples],
            }
        )
        path = folder / "caches" / f"{name}-{kind}-{key[:16]}.npz"
        values = _shared(path, len(stream.examples))
        if values is None:
            at_hand = residency.at_hand(params)
            values = _references(decoder, at_hand, stream, kind, forward, mesh, f"reference {name}")
            distributed.of_first(lambda path=path, values=values: _write(path, values))
        result[name] = Stream(
            stream.examples,
            stream.pad_id,
            stream.length_buckets,
            stream.label_buckets,
            {REFERENCE_COLUMNS[kind]: values},
        )
    return result


def _shared(path: Path, count: int) -> list[np.ndarray] | None:
    """A cache of the first process, on all of them; None when it has none that is sound."""
    found = _read(path, count) if distributed.is_first() else None
    ends = distributed.of_first(
        lambda: None if found is None else np.cumsum([len(v) for v in found])[:-1].tolist()
    )
    if ends is None:
        return None
    flat = np.concatenate(found) if found is not None else None
    return np.split(distributed.array_of_first(flat), ends)


def _read(path: Path, count: int) -> list[np.ndarray] | None:
    """A cache, or None when it is absent, short or damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            flat, ends, expected = data["flat"], data["ends"], str(data["sha256"])
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # a damaged zip member raises zipfile.BadZipFile or zlib.error
        if type(error).__module__ not in ("zipfile", "zlib"):
            raise
        return None
    if (
        len(ends) != count
        or hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest() != expected
    ):
        return None
    return np.split(flat, ends[:-1])


def _write(path: Path, values: Sequence[np.ndarray]) -> None:
    flat = np.concatenate(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    sha = hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest()
    np.savez(part, flat=flat, ends=np.cumsum([len(v) for v in values]), sha256=np.array(sha))
    part.replace(path)
