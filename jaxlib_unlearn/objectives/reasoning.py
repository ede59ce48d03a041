r"""R2MU: RMU for reasoning models; it also forgets traces and keeps the ability to reason.

RMU (:mod:`~jaxlib_unlearn.objectives.misdirection`) with two more streams: ``traces``, what the
original model thought of the texts to forget, and ``cot``, reasoning that has nothing to do with
them. With the same block l and vector u as RMU's:

.. math::
    L = L_{RMU} + \alpha \, E \, \lVert h_l(trace) - c u \rVert^2 / d
      + \beta \, E \, \lVert h_l(cot) - h^0_l(cot) \rVert^2 / d

Without the last term (R2MU-v0) the model forgets as much and no longer reasons.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxlib_unlearn.objectives.base import (
    Objective,
    Terms,
    forms,
    named,
    weight,
)
from jaxlib_unlearn.objectives.context import HIDDEN, Batch, Context
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.objectives.misdirection import (
    PADDED,
    Steered,
    adapt,
    block_read,
    direction,
    fit,
    kept,
    moved,
    rmu,
)
from jaxlib_unlearn.objectives.retain import (
    SHARED_COMPAT,
)
from jaxlib_unlearn.options import is_zero, option

_COMPAT = {**PADDED, **SHARED_COMPAT}
# A stream, and the option without which it is left out.
_OPTIONAL = {"traces": "trace_weight", "cot": "cot_weight"}


@dataclasses.dataclass(frozen=True)
class R2MU(Steered):
    """Options of ``r2mu``: block, steering, trace and cot weight as in R2MU's code for 8B models.

    The retain weight is not that of the code, which has 1.4 for them and tries others up to 3.
    """

    name: str = named("r2mu")
    compat: str | None = forms(_COMPAT)
    block: int = block_read(7, "The states behind this block are moved.")
    positions: Literal["answer", "all"] = option(
        "all",
        "The tokens whose states are moved: those of the answer, or all.",
        choices=("answer", "all"),
    )
    retain_weight: float = weight("retain", 1.2)
    trace_weight: float = option(
        1.0,
        "The traces' term has this coefficient; 0: no traces are read.",
        low=0,
        wanted="0 or more",
    )
    cot_weight: float = option(
        1.0,
        "The distance that the states of reasoning to keep have moved has this coefficient; 0: no "
        "such reasoning is read (R2MU-v0).",
        low=0,
        wanted="0 or more",
    )


def r2mu(context: Context, batches: Mapping[str, Batch], options: R2MU) -> Terms:
    """``L = RMU + a |h_l(traces) - c u|^2 + b |h_l(cot) - h0_l(cot)|^2``, means over channels."""
    terms = rmu(context, batches, options)
    if not is_zero(options.trace_weight):
        terms["forget_trace"] = moved(context, batches["traces"], options)
    if not is_zero(options.cot_weight):
        terms["retain_cot"] = kept(context, batches["cot"], options)
    return terms


def _adapt(row: Objective, options: Any) -> Objective:
    left_out = {s for s, name in _OPTIONAL.items() if is_zero(getattr(options, name))}
    streams = tuple(s for s in row.streams if s not in left_out)
    return adapt(dataclasses.replace(row, streams=streams), options)


ROWS = (
    Objective(
        name="r2mu",
        loss=r2mu,
        streams=("forget", "traces", "retain", "cot"),
        columns={"forget": QA, "traces": ("text",), "retain": QA, "cot": ("text",)},
        reference={"retain": "fork", "cot": "fork"},
        forward={},
        additive=True,
        paper="Wang et al. 2025, arXiv 2506.12963",
        options=R2MU,
        summary="rmu, of the model's own thoughts as well, with other reasoning kept",
        compat=_COMPAT,
        asks=dict.fromkeys(("forget", "traces", "retain", "cot"), (HIDDEN,)),
        blocks=lambda options: (options.block,),
        adapt=_adapt,
        fit=fit,
        init_state=direction,
    ),
)
