"""The roles of a run's models: they are data of the run, not names in code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NONE = "none"
# The evaluators of question-answering benchmarks.
QUESTION_ANSWERING = (
    *("tofu", "memorization", "membership", "control", "utility"),
    *("readability", "fact_recall", "fluency", "leak"),
)


class Roles(NamedTuple):
    """The models that the others are compared with, by their names in `summary.json`.

    A run may have any number of further models (`attacked:…`), shown beside these three.

    Args:
        start: The model before unlearning.
        reference: The model that never saw the data to forget; `none`: there is no such model.
        judged: The model that the verdicts are about.
        against: The model that another is compared with in place of the reference, by the other's
            name: an attacked model is compared with the attacked reference.
    """

    start: str = "original"
    reference: str = "oracle"
    judged: str = "unlearned"
    against: Mapping[str, str] = {}

    @property
    def models(self) -> tuple[str, str, str]:
        """The names of the models in the three roles."""
        return self.start, self.reference, self.judged

    def held_to(self, model: str) -> str:
        """The model that another is compared with.

        Example:
            >>> roles = Roles(against={"relearned": "relearned oracle"})
            >>> roles.held_to("relearned"), roles.held_to("unlearned")
            ('relearned oracle', 'oracle')
        """
        return self.against.get(model, self.reference)

    def order(self, models: Iterable[str]) -> list[str]:
        """Models in reading order: start, reference and judged where present, then others by name.

        Without a reference a run is a chain of models, and they stay in their order.

        Example:
            >>> Roles().order(["b", "unlearned", "a", "original"])
            ['original', 'unlearned', 'a', 'b']
            >>> Roles("original", "none", "defended").order(["original", "erased", "defended"])
            ['original', 'erased', 'defended']
        """
        found = dict.fromkeys(models)
        if self.reference == NONE:
            return list(found)
        first = [model for model in self.models if model in found]
        return [*first, *sorted(set(found) - set(first))]


ROLES = Roles()


def roles_of(named: Any) -> Roles:
    """The roles that `run.json` names; the defaults where it names none.

    Example:
        >>> roles_of({"judged": "merged"}).judged, roles_of(None).judged
        ('merged', 'unlearned')
        >>> roles_of({"against": {"attacked": "attacked oracle"}}).held_to("attacked")
        'attacked oracle'
    """
    if not isinstance(named, dict):
        return ROLES
    names = {r: named[r] for r in ("start", "reference", "judged") if isinstance(named.get(r), str)}
    held = named.get("against")
    pairs = held.items() if isinstance(held, dict) else ()
    return ROLES._replace(**names, against={m: to for m, to in pairs if isinstance(to, str)})
