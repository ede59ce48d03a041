"""Unlearning methods as rows: losses bound to streams of batches.

``resolve("npo", beta=0.2)`` gives a row and its options, an instance of the row's own dataclass;
``row.loss(policy, batches, options)`` gives the terms; ``combine(terms, weights, options)`` the
scalar to differentiate.
"""

from jaxlib_unlearn.objectives.base import (
    Batch,
    Compat,
    Objective,
    Options,
    Policy,
    Terms,
    at_every_slot,
    check_accumulation,
    coefficient,
    combine,
    side_of,
)
from jaxlib_unlearn.objectives.policy import ApplyPolicy, batch_from_labels, policy_from_apply
from jaxlib_unlearn.objectives.smoothing import attention_temperatures, reference_forward
from jaxlib_unlearn.objectives.table import (
    OBJECTIVES,
    describe,
    list_objectives,
    not_used,
    options_of,
    resolve,
)

__all__ = [
    "OBJECTIVES",
    "ApplyPolicy",
    "Batch",
    "Compat",
    "Objective",
    "Options",
    "Policy",
    "Terms",
    "at_every_slot",
    "attention_temperatures",
    "batch_from_labels",
    "check_accumulation",
    "coefficient",
    "combine",
    "describe",
    "list_objectives",
    "not_used",
    "options_of",
    "policy_from_apply",
    "reference_forward",
    "resolve",
    "side_of",
]
