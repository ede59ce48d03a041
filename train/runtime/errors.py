"""The error of a run that cannot continue."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line and names the last good checkpoint."""
