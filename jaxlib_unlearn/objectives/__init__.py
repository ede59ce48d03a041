"""Unlearning methods as rows: losses bound to streams of batches.

``resolve(ObjectiveConfig("asu"))`` gives a row and its options; ``row.loss(policy, batches,
options)`` gives the terms; ``combine(terms, weights, options)`` the scalar to differentiate.
"""

from jaxlib_unlearn.objectives.base import (
    Batch,
    Compat,
    Objective,
    ObjectiveConfig,
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
from jaxlib_unlearn.objectives.table import OBJECTIVES, describe, list_objectives, resolve

__all__ = [
    "OBJECTIVES",
    "ApplyPolicy",
    "Batch",
    "Compat",
    "Objective",
    "ObjectiveConfig",
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
    "policy_from_apply",
    "reference_forward",
    "resolve",
    "side_of",
]
