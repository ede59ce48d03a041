"""The row of a kind of model and of rows that `train.classify` trains.

The program knows a kind by its row, by the learner of its model, and by nothing else. Another kind
of model is a file with one more row: a reader of its weights, a stream of its rows, and the
objective and the evaluators, by name, that go with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.stream import Stream

Rows = Sequence[dict[str, Any]]


class Kind(NamedTuple):
    """A kind of model with a kind of rows.

    Args:
        objective: the name of the objective that learns the rows, in `objectives.LEARNING`.
        evaluators: the names of the evaluators.
        check: `check(config)` raises where no model is at `--model.path`; nothing is read.
        load: `load(config, rows, mesh)`: the model; notes about it go to those of the rows.
        encode: `encode(model, rows, data, where)`: the rows as the model reads them.
        stream: `stream(model, encoded, batch_size)`: the stream of training rows.
        export: `export(model, folder, dtype, what)`; `what` is a sentence on its origin.
        scores: `scores(model, encoded, mesh, evaluate, label)`: the option scores of every row.
        answers: the same for generated texts; either is None where no evaluator asks for it.
        export_adapter: `export_adapter(trained, adapters, model, config, root, task)`: adapters
            that were trained in the place of the model; None: the exported model includes them.
        begin: `begin(config, run, rows, encoded, model)`: the model to start from, where the run
            trains it as well; None: it is only loaded.
        like: `like(length, options)`: a stream of one row of so many tokens and options, as a plan
            takes it in the place of data; None: the kind cannot be planned.
        cache_version: the version of scores and answers; raise it when one may change.
    """

    objective: str
    evaluators: tuple[str, ...]
    check: Callable[[Any], None]
    load: Callable[[Any, Any, Any], Any]
    encode: Callable[[Any, Rows, Any, str], list[Any]]
    stream: Callable[[Any, list[Any], int], Stream]
    export: Callable[[Any, Path, str, str], None]
    scores: Callable[..., list[np.ndarray]] | None = None
    answers: Callable[..., list[str]] | None = None
    export_adapter: Callable[[Any, Any, Any, Any, Path, str], None] | None = None
    begin: Callable[..., Any] | None = None
    like: Callable[[int, int], Stream] | None = None
    cache_version: int = 1
