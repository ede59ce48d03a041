"""A function of many rows, computed in batches of one shape, so that it compiles once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from models import arrays
from train.runtime import distributed
from train.runtime.sharding import batch_ways, put_batch
from train.runtime.tracking import progress


def batched(
    count: int,
    rows: int,
    mesh: Any,
    label: str,
    read: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    compute: Callable[[Any], Any],
) -> Any:
    """The results of all rows, on the host.

    Args:
        count: N, the number of rows.
        rows: the rows of a batch, rounded up so that the mesh divides them; the last batch
            repeats its rows.
        mesh: the devices.
        label: the label of the progress.
        read: `numbers of rows -> their columns`.
        compute: `a batch on the devices -> a tree of arrays` with a result for each row.

    Returns:
        The tree, with NumPy arrays of N results.
    """
    size = -(-rows // batch_ways(mesh)) * batch_ways(mesh)
    found = []
    with progress(label, count) as advance:
        for first in range(0, count, size):
            real = min(size, count - first)
            mine = np.resize(np.arange(first, first + real), size)
            made = compute(put_batch(dict(read(mine)), mesh))
            found.append([arrays.host(x)[:real] for x in jax.tree.leaves(made)])
            form = jax.tree.structure(made)
            advance(real)
            distributed.stop_point()
    return jax.tree.unflatten(form, [np.concatenate(x) for x in zip(*found, strict=True)])
