"""The cross-entropy of a decoder on rows of tokens, row by row."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import arrays
from models.decoder.labels import label_states, reduce_states, target_log_prob
from models.decoder.model import Decoder
from train.data.token_rows import TokenRows
from train.evaluators.evaluation import Model
from train.runtime import distributed
from train.runtime.sharding import batch_ways, put_batch
from train.runtime.tracking import progress


@functools.partial(jax.jit, static_argnums=0)
def row_sums(decoder: Decoder, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """`-log p` summed over the labels of each row, and their number, `(B,)` each."""
    states = label_states(decoder, params, [batch])[0]
    values = reduce_states(decoder, params, states, batch, target_log_prob)
    mask = batch["target_mask"]
    return -jnp.sum(jnp.where(mask > 0, values, 0.0), -1), jnp.sum(mask, -1)


def row_losses(
    model: Model, rows: TokenRows, which: np.ndarray, mesh: Any, tokens: int, label: str = ""
) -> np.ndarray:
    """The cross-entropy of some rows.

    Args:
        model: the model, on the devices.
        rows: the stream.
        which: the numbers of the rows, (n,).
        mesh: the devices.
        tokens: the approximate number of tokens that a device reads at once.
        label: the label of the progress; "": none is shown.

    Returns:
        (n, 2) float64: nats summed over the labels of a row, and their number.
    """
    ways = batch_ways(mesh)
    size = ways * max(1, min(tokens // rows.context, -(-len(which) // ways)))
    found = np.zeros((len(which), 2))
    shown = progress(label, len(which)) if label else contextlib.nullcontext(lambda n: None)
    with shown as advance:
        for start in range(0, len(which), size):
            mine = which[start : start + size]
            filled = np.resize(mine, size)  # a last batch repeats its rows, which are not counted
            batch = put_batch(rows.batch(filled, (), 0), mesh)
            sums = row_sums(model.decoder, model.params, batch)
            found[start : start + size] = np.stack([arrays.host(x)[: len(mine)] for x in sums], 1)
            advance(len(mine))
            distributed.stop_point()
    return found


def mean_loss(found: np.ndarray) -> float:
    """Nats a token, of what `row_losses` returns.

    Example:
        >>> mean_loss(np.array([[3.0, 2.0], [1.0, 2.0]]))
        1.0
    """
    total, labels = found.sum(0)
    return float(total / labels) if labels else math.nan
