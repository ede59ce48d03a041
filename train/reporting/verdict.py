"""The verdict on a run: one line above all, and the answers that it sums up.

The questions are those of the run's evaluators. The texts state the limits, so that a reader can
disagree with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from train.evaluators import chosen
from train.evaluators.base import Finding as Finding
from train.evaluators.base import Results, arranged
from train.options.roles import QUESTION_ANSWERING, ROLES, Roles
from train.reporting.tables import SMOKE, Run

# Attacks that bring facts back, by the beginning of the name of the model that they make.
ATTACKS = {"relearned": "relearning", "quantized": "quantisation"}


class Verdict(NamedTuple):
    """The verdict on a run: `line` sums up the findings, which stand in reading order."""

    line: str
    findings: list[Finding]


def verdicts(
    summary: dict[str, dict[str, Any]],
    smoke: bool = False,
    roles: Roles = ROLES,
    evaluators: Iterable[str] = QUESTION_ANSWERING,
    logs: Mapping[str, dict[str, Any]] | None = None,
) -> list[Finding]:
    """The findings of a run, in reading order.

    Args:
        summary: the flat metrics by model, the judged one among them.
        smoke: whether this is a smoke run, from which nothing can be concluded.
        roles: the roles of the models.
        evaluators: the names of the run's evaluators.
        logs: per-item logs by model.
    """
    if smoke:
        return []
    results = Results(summary, logs or {}, roles=roles)
    rows = arranged(verdict for row in chosen(evaluators) for verdict in row.verdicts)
    found = [row.find(results) for row in rows]
    return [finding for finding in found if finding is not None]


def untested(run: Run) -> list[str]:
    """The attacks that this run of unlearning lacks; none where nothing is unlearned."""
    if any(row.lead for row in chosen(run.evaluators)):
        return []
    return [
        word for name, word in ATTACKS.items() if not any(m.startswith(name) for m in run.summary)
    ]


def line(findings: Sequence[Finding], missing: Sequence[str] = ()) -> str:
    """Findings in one line; what misses its limit comes first.

    Args:
        findings: the answers to all questions.
        missing: attacks that were not made.

    Example:
        >>> one, other = Finding("?", "good", "kept", ""), Finding("?", "bad", "not forgotten", "")
        >>> line([one, other], ["relearning"])
        'Not forgotten; kept: 1 of 2 limits met. Not tested: relearning.'
    """
    met = [finding.answer for finding in findings if finding.state == "good"]
    missed = [finding.answer for finding in findings if finding.state in ("mixed", "bad")]
    open_ = len(findings) - len(met) - len(missed)
    parts = []
    if met or missed:
        answers = "; ".join(", ".join(some) for some in (missed, met) if some)
        count = f"{len(met)} of {len(met) + len(missed)} limits met"
        parts.append(f"{answers[0].upper()}{answers[1:]}: {count}.")
    if open_:
        parts.append(f"Not measured: {open_} of {len(findings)} limits.")
    if missing and findings:
        parts.append(f"Not tested: {', '.join(missing)}.")
    return " ".join(parts)


def of_run(run: Run, logs: Mapping[str, dict[str, Any]]) -> Verdict:
    """The verdict on a run.

    Args:
        run: the run, as `tables.load_run` reads it.
        logs: its per-item logs by model.
    """
    if run.config.get("smoke"):
        return Verdict(SMOKE, [])
    found = verdicts(run.summary, False, run.roles, run.evaluators, logs)
    return Verdict(line(found, untested(run)), found)
