"""Fields of configurations, and other values for them: for tests that change every field."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field, nested ones too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def another(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Another value of a field: that in `given`, where there is one."""
    if name in given:
        return given[name]
    last = name.rpartition(".")[2]
    choices = {"schedule": "constant", "bases": "svd", "state_dtype": "bfloat16", "name": "muon"}
    choices |= {"comm_dtype": "bfloat16", "mask": "static", "orthogonalize": "svd"}
    choices |= {"shape_scale": "unit", "axis": "out", "groups": "all"}
    if last in choices:
        return choices[last]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 0.75 + 1e-4
    return "other" if isinstance(value, str) else 2
