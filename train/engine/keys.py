"""The inputs of a training stage: the key under which its result is stored and found.

Everything that changes a result is in its key. `WHY_NOT` lists what is left out, and why; a test
changes every field of the configurations of model and run and expects one or the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.options.config import LoraConfig, SelectConfig, to_json
from train.options.optimizers import Options
from train.runtime.stages import VERSION

_SAME = "the numbers do not depend on it (losses to 1e-6)"
_WHERE = "says where a result goes or comes from; what is found there is checked by its digest"
# Fields of the run's configuration that no key contains; a prefix covers all fields below it.
WHY_NOT = {
    "preset": "a name: the options it stands for are in the keys",
    "smoke": "a name: the options it stands for are in the keys",
    "output": _WHERE,
    "stage.cache": _WHERE,
    "tensorboard": "a second copy of the log",
    "report_to": "further copies of the log",
    "profile": "a trace of steps that are taken anyway",
    "mesh": _SAME,
    "distributed": _SAME,
    "model.remat": _SAME + "; what is computed twice is the same twice",
    "data.row_tokens": _SAME + "; rows that share a sequence do not see each other",
    "finetune.accumulate": _SAME + "; forms that are not additive refuse it",
    "unlearn.accumulate": _SAME + "; forms that are not additive refuse it or have it in the key",
    "finetune.curve_points": "no curve is drawn of fine-tuning",
    "unlearn.curve_points": "evaluations during training change nothing",
    "finetune.checkpoint_seconds": "a run that continues takes the same steps",
    "unlearn.checkpoint_seconds": "a run that continues takes the same steps",
    "export_dtype": "of the export, whose seal names it",
    "oracle": "whether that stage is there at all",
    "retain_log": "compared with in the summary, which every start computes anew",
}


def stage_inputs(
    start: str,
    model: Any,
    streams: Mapping[str, Any],
    *,
    objective: Any,
    optimizer: Options,
    combine: str,
    steps: int,
    batch_size: int,
    seed: int,
    adapters: LoraConfig | None,
    select: SelectConfig | None = None,
    accumulate: int | None = None,
) -> dict[str, Any]:
    """Everything the parameters after a training stage depend on, as JSON values.

    Args:
        start: sha256 of the parameters before the stage.
        model: the inputs beside the parameters that its outputs depend on (`Learner.identity`).
        streams: its streams; `identity()` covers the tokens of the examples, and with them prompts,
            truncation and templates.
        objective: the objective's resolved options.
        optimizer: the optimizer's options.
        combine: the rule that makes one gradient of those of the two sides.
        steps: the number of optimizer steps, on which the schedule depends.
        batch_size: the rows of a stream in a global batch.
        seed: the stage's own seed.
        adapters: the adapters that are trained in place of the parameters, if any.
        select: the choice of the leaves that are trained, if not all are.
        accumulate: the number of micro-batches, for an objective whose value depends on it.
    """
    inputs = {
        "version": VERSION,
        "start": start,
        "model": to_json(model) if dataclasses.is_dataclass(model) else model,
        "streams": {name: stream.identity() for name, stream in streams.items()},
        "objective": to_json(objective),
        "optimizer": to_json(optimizer),
        "combine": combine,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    if adapters is not None and adapters.rank is not None:
        inputs["lora"] = to_json(adapters)
    if select is not None and select.given:
        inputs["select"] = to_json(select)
    if accumulate is not None:
        inputs["accumulate"] = accumulate
    return inputs
