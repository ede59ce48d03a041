"""The questions that evaluators of labelled rows ask of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from train.evaluators.base import OtherContext
from train.evaluators.evaluation import Answers
from train.tasks.kinds import Kind


@dataclass
class LabelledContext(OtherContext):
    """The context that the evaluators of one model share; it computes each result once."""

    kind: Kind
    model: Any
    encoded: Mapping[str, list[Any]]
    config: Any
    mesh: Any
    name: str
    judge: Any = None
    log: dict[str, Any] = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict)

    def _ask(self, ask: Callable[..., Any] | None, what: str, split: str) -> Any:
        if ask is None:
            raise ValueError(f"rows of this kind have no {what}")
        label = f"{self.name}: {what} {split}"
        return self.once(
            (what, split),
            lambda: ask(self.model, self.encoded[split], self.mesh, self.config, label),
        )

    def scores(self, split: str) -> dict[str, list[Any]]:
        """The scores of every row's options, under `options`."""
        return {"options": self._ask(self.kind.scores, "score", split)}

    def answers(self, split: str, *others: Any, **options: Any) -> Answers:
        """The greedy answers to a split's prompts; nothing else can be asked."""
        if others or options:
            return self._refuse()
        texts = self._ask(self.kind.answers, "answer", split)
        return Answers([[text] for text in texts], [])
