"""Which of a run's models is which: roles are data of the run, not names in code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

NONE = "none"


class Roles(NamedTuple):
    """The models that the others are compared with, by their names in `summary.json`.

    A run may have any number of further models (`attacked:…`); they are shown beside these.

    Args:
        start: the model before unlearning.
        reference: the model that never saw what is to be forgotten; `none`: there is none.
        judged: the model that the verdicts are about.
    """

    start: str = "original"
    reference: str = "oracle"
    judged: str = "unlearned"

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
        return [*(m for m in self if m in found), *sorted(set(found) - set(self))]


ROLES = Roles()


def roles_of(named: Any) -> Roles:
    """The roles that `run.json` names; the defaults where it names none, as in older runs.

    Example:
        >>> roles_of({"judged": "merged"}).judged, roles_of(None).judged
        ('merged', 'unlearned')
    """
    if not isinstance(named, dict):
        return ROLES
    known = {role: name for role, name in named.items() if role in Roles._fields}
    return ROLES._replace(**{role: name for role, name in known.items() if isinstance(name, str)})
