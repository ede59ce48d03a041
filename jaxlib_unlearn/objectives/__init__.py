"""Unlearning methods as rows: losses bound to streams of batches.

``resolve("npo", beta=0.2)`` gives a row and its options, an instance of the row's own dataclass;
``row.loss(context, batches, options)`` gives the terms (a :class:`Context` is what a loss may ask);
``combine(terms, weights, options)`` the scalar to differentiate.
"""

from jaxlib_unlearn.objectives.apply import ApplyModel, batch_from_labels, context_from_apply
from jaxlib_unlearn.objectives.base import (
    SIDES,
    Compat,
    Estimate,
    Facts,
    Objective,
    Options,
    Progress,
    Terms,
    check_accumulation,
    coefficient,
    combine,
    side_of,
)
from jaxlib_unlearn.objectives.context import Asked, Batch, Context, Questions, row_keys
from jaxlib_unlearn.objectives.retain import RETAIN, RetainKind, Sided, at_every_slot
from jaxlib_unlearn.objectives.smoothing import attention_temperatures, reference_forward
from jaxlib_unlearn.objectives.table import (
    DENOISING,
    LEARNING,
    OBJECTIVES,
    describe,
    list_objectives,
    not_used,
    options_of,
    resolve,
)

__all__ = [
    "DENOISING",
    "LEARNING",
    "OBJECTIVES",
    "RETAIN",
    "SIDES",
    "ApplyModel",
    "Asked",
    "Batch",
    "Compat",
    "Context",
    "Estimate",
    "Facts",
    "Objective",
    "Options",
    "Progress",
    "Questions",
    "RetainKind",
    "Sided",
    "Terms",
    "at_every_slot",
    "attention_temperatures",
    "batch_from_labels",
    "check_accumulation",
    "coefficient",
    "combine",
    "context_from_apply",
    "describe",
    "list_objectives",
    "not_used",
    "options_of",
    "reference_forward",
    "resolve",
    "row_keys",
    "side_of",
]
