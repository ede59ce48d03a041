"""The command that repeats a run: its preset, and every option that differs from the preset's."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from typing import Any

from jaxlib_unlearn.errors import UserError

# What reads the command line of a program. Imported when asked: it knows the presets, and these
# all that they configure. Behind a colon, the name of a function other than `read_arguments`.
READERS = {
    "train.unlearn": "train.presets.unlearning_arguments",
    "train.pretrain": "train.presets.pretraining_arguments",
    "train.classify": "train.presets.classification_arguments",
    "train.finetune": "train.presets.finetuning_arguments",
    "train.diffuse": "train.presets.diffusing_arguments",
    "train.erase": "train.presets.diffusing_arguments:read_erase",
    "train.attack": "train.presets.diffusing_arguments:read_attack",
    "train.defend": "train.presets.diffusing_arguments:read_defend",
}
UNLEARN = "train.unlearn"
# They choose which options there are, or what the others start from.
FIRST = ("name", "source", "task", "path", "original", "forget", "retain")


def command(config: Mapping[str, Any], program: str | None = None) -> str:
    r"""The command that repeats a run, one option a line.

    Args:
        config: its `config.json`.
        program: what ran it; None: train.unlearn.

    Returns:
        The preset with what differs from it, which reads as `config` again. Where no options do
        that (a preset of another version), the command that takes the stored configuration.

    Example:
        >>> from train.options.config import identity
        >>> from train.presets import PRESETS
        >>> config = identity(PRESETS["quickstart"].PRESET, "stage.cache")
        >>> print(command(config | {"seed": 3}))
        python -m train.unlearn quickstart \
            --seed 3
    """
    given = config.get("command")
    if given:
        return given if isinstance(given, str) else shlex.join(str(word) for word in given)
    program = program or UNLEARN
    lines = options(config, program)
    if lines is None:
        lines = ["--config RUN/config.json"]
    return " \\\n    ".join([f"python -m {program} {lines[0]}", *lines[1:]])


def options(config: Mapping[str, Any], program: str) -> list[str] | None:
    """The preset and its options, each with its values; None where none give this configuration."""
    preset = config.get("preset")
    if not preset or program not in READERS:
        return None
    from train.options.config import identity

    module, _, function = READERS[program].partition(":")
    read = getattr(importlib.import_module(module), function or "read_arguments")
    lines = [shlex.quote(str(preset)), *(["--smoke"] if config.get("smoke") else [])]
    wanted = _flat(config)
    for _ in range(4):
        try:
            found = _flat(identity(read(shlex.split(" ".join(lines)))))
        except UserError:
            return None
        differ = [name for name in wanted if wanted[name] != found.get(name, ...)]
        if not differ:  # a younger option at its default is not in the file (`to_json`)
            return lines if found.keys() == wanted.keys() else None
        first = [name for name in differ if name.rpartition(".")[2] in FIRST]
        lines += [_option(name, wanted[name]) for name in first or differ]
    return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _option(name: str, value: Any) -> str:
    """An option as it is typed."""
    head, _, last = name.replace("_", "-").rpartition(".")
    group = f"{head}." if head else ""
    if isinstance(value, bool):
        return f"--{group}{'' if value else 'no-'}{last}"
    words = [str(word) for word in (value if isinstance(value, list) else [value])]
    return f"--{group}{last} {shlex.join(words)}"
