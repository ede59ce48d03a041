"""Other answers in the place of the facts: fine-tuning on alternates, and a push on the facts.

An *alternate* is a wrong but well-formed answer to a question of the forget set. Copying alternates
keeps the sentence and replaces the fact; SimNPO's loss on the true answers, which fades at
``delta`` nats a token, makes sure that they do not stay beside the new ones.
"""

import dataclasses
from collections.abc import Mapping

from jaxlib_unlearn.objectives.base import (
    Compat,
    Objective,
    Terms,
    forms,
    named,
)
from jaxlib_unlearn.objectives.context import Batch, Context
from jaxlib_unlearn.objectives.gradient import QA
from jaxlib_unlearn.objectives.preference import (
    DPO,
    Pushed,
    dpo_between,
    inverse_temperature,
    margin,
    push_term,
    pushes,
)
from jaxlib_unlearn.objectives.retain import (
    SHARED_COMPAT,
    Sided,
    nll_term,
    retain_terms,
)
from jaxlib_unlearn.options import is_zero

_ALTPO_COMPAT = {
    "no_factor": Compat("without the factor 2/beta (TOFU's DPO)", additive=True),
    **SHARED_COMPAT,
}


@dataclasses.dataclass(frozen=True)
class Alternate(Pushed, Sided):
    """Options of ``alternate``."""

    name: str = named("alternate")
    compat: str | None = forms(SHARED_COMPAT)
    push: float = pushes(0.3)
    beta: float = inverse_temperature(10.0)
    delta: float = margin(0.75)


@dataclasses.dataclass(frozen=True)
class AltPO(DPO):
    """Options of ``altpo``."""

    name: str = named("altpo")
    compat: str | None = forms(_ALTPO_COMPAT)


def alternate(context: Context, batches: Mapping[str, Batch], options: Alternate) -> Terms:
    """``L = f [NLL(alternate) + push SimNPO(forget)] + r R(retain)``."""
    terms = {"forget_alternate": nll_term(context, batches["alternate"])}
    if not is_zero(options.push):
        batch = batches["forget"]
        log_probs = context.model.log_probs(batch)
        terms["forget_push"] = push_term(log_probs, batch["target_mask"], options)
    return terms | retain_terms(context, batches, options)


def altpo(context: Context, batches: Mapping[str, Batch], options: AltPO) -> Terms:
    """``L = f DPO(alternate over forget answer) + r R(retain)``; rows paired by position."""
    forget = dpo_between(context, batches["alternate"], batches["forget"], options)
    return {"forget": forget} | retain_terms(context, batches, options)


_STREAMS = ("forget", "alternate", "retain")
_COLUMNS = {"forget": QA, "alternate": ("question", "alternate_answer"), "retain": QA}

ROWS = (
    Objective(
        name="alternate",
        loss=alternate,
        streams=_STREAMS,
        columns=_COLUMNS,
        reference={},
        forward={},
        additive=True,
        paper="ours; alternates: Mekala et al. 2024, arXiv 2409.13474",
        options=Alternate,
        summary="teach other answers, and push the true ones down to delta nats a token",
        compat=SHARED_COMPAT,
        only_with=dict.fromkeys(("beta", "delta", "spare_end"), "push"),
    ),
    Objective(
        name="altpo",
        loss=altpo,
        streams=_STREAMS,
        columns=_COLUMNS,
        reference={"forget": "logps", "alternate": "logps"},
        forward={},
        additive=True,
        paper="Mekala et al. 2024, arXiv 2409.13474",
        options=AltPO,
        summary="prefer another answer to the forget answer",
        compat=_ALTPO_COMPAT,
    ),
)
