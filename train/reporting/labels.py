"""Names of experiments that are compared: options that distinguish their configurations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from train.runtime.plain import plain

# Two runs are the same experiment when they differ only in these, at any level of the config.
INCIDENTAL = {
    *("seed", "output", "command", "tensorboard", "mesh", "remat", "row_tokens", "curve_points"),
    *("notes", "report_to", "micro_tokens", "cache"),
}
# Options that a label begins with, where they differ: a method's name stands for its options.
HEADS = ("preset", "objective.name", "optimizer.name", "combine")
RATE = "optimizer.learning_rate"
SHORT = {"learning_rate": "lr"}
TOLD = 4

Flat = Mapping[str, Any]


def flat(config: Any) -> dict[str, Any]:
    """The options of a configuration by their dotted names, without `INCIDENTAL` ones.

    An option without a value is left out, since earlier programs, which lacked it, wrote none.

    Example:
        >>> flat({"seed": 1, "optimizer": {"name": "muon", "learning_rate": 0.1}})
        {'optimizer.learning_rate': 0.1, 'optimizer.name': 'muon'}
    """
    pairs = dict(_pairs(config))
    if not pairs.get("smoke"):
        pairs.pop("smoke", None)
    return {name: value for name, value in pairs.items() if value is not None}


def _pairs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for name, value in sorted(config.items()):
            if name not in INCIDENTAL:
                yield from _pairs(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, config


def named(flats: Sequence[Flat], folders: Sequence[str]) -> list[str]:
    """A distinct label for each of some configurations, which differ from each other.

    Args:
        flats: the configurations, as :func:`flat` gives them.
        folders: the name of each configuration that would have no label.

    Example:
        >>> one, other = ({"optimizer.name": "muon", "optimizer.learning_rate": r} for r in (1, 2))
        >>> named([one, other, {"optimizer.name": "adamw"}], ["a", "b", "c"])
        ['muon lr=1', 'muon lr=2', 'adamw']
    """
    only = len(flats) == 1
    heads = [n for n in HEADS if (only and n != "combine") or _differs(n, flats)]
    namesakes: dict[tuple[str, ...], list[int]] = {}
    for i, one in enumerate(flats):
        parts = ["SMOKE"] if one.get("smoke") else []
        parts += [plain(one[n]) for n in heads if one.get(n) not in (None, "")]
        namesakes.setdefault(tuple(parts), []).append(i)
    labels = [""] * len(flats)
    for parts, places in namesakes.items():
        for i, options in zip(places, _apart([flats[i] for i in places]), strict=True):
            words = [*parts, *options]
            labels[i] = " ".join(
                words if words not in ([], ["SMOKE"]) else [*words, plain(folders[i])]
            )
    # Values that differ and are written alike (1 and "1").
    twice = {label for label, count in Counter(labels).items() if count > 1}
    return [f"{label} ({i})" if label in twice else label for i, label in enumerate(labels, 1)]


def _differs(name: str, flats: Collection[Flat]) -> bool:
    return len({_written(one, name) for one in flats}) > 1


def _written(one: Flat, name: str) -> str:
    return json.dumps(one.get(name), default=str)


def _apart(flats: Sequence[Flat]) -> list[list[str]]:
    """The options that distinguish each of some configurations, as `option=value`.

    Options are chosen one by one, each time the one that makes most configurations distinct; if
    fewer than `TOLD` are needed, other differing options are added.
    """
    every = sorted({name for one in flats for name in one} - {"smoke"})
    differ = [name for name in every if _differs(name, flats)]
    chosen = [name for name in (RATE,) if name in differ]

    def told(names: Sequence[str]) -> int:
        return len({tuple(_written(one, name) for name in names) for one in flats})

    left = [name for name in differ if name not in chosen]
    while left and told(chosen) < len(flats):
        chosen.append(max(left, key=lambda name: told([*chosen, name])))
        left.remove(chosen[-1])
    chosen += left[: max(0, TOLD - len(chosen))]
    chosen.sort(key=lambda name: (name != RATE, name))
    ends = [name.rsplit(".", 1)[-1] for name in chosen]
    titles = [
        name if ends.count(end) > 1 else SHORT.get(end, end)
        for name, end in zip(chosen, ends, strict=True)
    ]
    left_out = {}
    for name in chosen:
        value, count = Counter(_written(one, name) for one in flats).most_common(1)[0]
        if name != RATE and count > 1:
            left_out[name] = value
    return [
        [
            plain(f"{title}={one.get(name)}")
            for name, title in zip(chosen, titles, strict=True)
            if _written(one, name) != left_out.get(name)
        ]
        for one in flats
    ]
