"""The verdicts on a run in words: forgotten, kept, readable, like the oracle, leaking.

The questions are those of the run's evaluators. The texts state the limits, so that a reader can
disagree with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from train.evaluators import chosen
from train.evaluators.base import Finding as Finding
from train.evaluators.base import Results, arranged
from train.options.roles import QUESTION_ANSWERING, ROLES, Roles

SMOKE = (
    "SMOKE run: steps and samples are cut to see the program work. Its numbers say nothing about "
    "the method, so there is no verdict."
)


def verdicts(
    summary: dict[str, dict[str, Any]],
    n: int = 0,
    smoke: bool = False,
    roles: Roles = ROLES,
    evaluators: Iterable[str] = QUESTION_ANSWERING,
    logs: Mapping[str, dict[str, Any]] | None = None,
) -> list[Finding]:
    """The findings of a run, in reading order.

    Args:
        summary: the flat metrics by model, the judged one among them.
        n: the number of questions behind forget quality (0: unknown).
        smoke: whether this is a smoke run, from which nothing can be concluded.
        roles: the roles of the models.
        evaluators: the names of the run's evaluators.
        logs: per-item logs by model.
    """
    if smoke:
        return []
    results = Results(summary, logs or {}, roles=roles, questions=n)
    rows = arranged(verdict for row in chosen(evaluators) for verdict in row.verdicts)
    found = [row.find(results) for row in rows]
    return [finding for finding in found if finding is not None]
