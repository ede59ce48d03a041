"""Configurations as files: the `config.json` of a run, or YAML that people write."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import parse_json, read_text, reading, shortened_path
from train.options import cli
from train.options.config import to_json
from train.runtime import files, suggest

SAVE = "--save-config"
YAML = (".yaml", ".yml")
ADVICE = "give the config.json of a run, or what --save-config wrote"
LARGEST = 10**6


class Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as in JSON, and a key that stands twice is an error."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; references to others are refused, for they can make a short text endless."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("references (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The entries of an object."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no name")
            if key in keys[:place]:
                raise ValueError(f"the key {key!r} stands twice in one object")
        return super().construct_mapping(node, deep)


# PyYAML reads YAML 1.1, where a number with an exponent needs a point and a sign.
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or has references, a key twice or a key that is no name.

    Example:
        >>> parse_yaml("optimizer: {name: sift, learning_rate: 1e-4}")
        {'optimizer': {'name': 'sift', 'learning_rate': 0.0001}}
    """
    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values alone
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_config(cls: type, path: Path, presets: Mapping[str, Any] | None = None) -> Any:
    """The configuration in a JSON or YAML file.

    Args:
        cls: the dataclass of the configuration.
        path: the `config.json` of a run folder, an edited copy of it, or a YAML file.
        presets: the presets by name; entries that the file leaves out are those of the preset
            that it names.

    Raises:
        UserError: the file cannot be read, is damaged, or has an unknown or unfitting entry.
    """
    files.check_key(path)
    what = "cannot be read as a configuration"
    text = read_text(path, ADVICE, what=what, limit=LARGEST)
    with reading(shortened_path(path), ADVICE, what):
        value = (parse_yaml if path.suffix in YAML else parse_json)(text)
        name = value.get("preset") if isinstance(value, dict) else None
        preset = (presets or {}).get(name) if isinstance(name, str) else None
        if preset is not None:
            value = _over(to_json(preset.PRESET), value)
        config = cli.from_json(cls, value)
        if preset is None and presets:
            _check_whole(cls, value, presets)
        return config


def _check_whole(cls: Any, value: Mapping[str, Any], presets: Mapping[str, Any]) -> None:
    """Refuse a short file without a preset to fill it from."""
    if missing := [f.name for f in dataclasses.fields(cls) if f.name not in value]:
        if "preset" not in value:
            raise UserError(
                f"it has no entry {missing[0]!r}, and no preset to take it from; add a line such "
                f"as `preset: {next(iter(presets))}`"
            )
        suggest.choose(str(value["preset"]), presets, "preset")


def _over(base: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, with the entries of `base` that it leaves out; another method keeps its own."""
    found = {**base, **value}
    for key, entry in value.items():
        under = base.get(key)
        if isinstance(entry, dict) and isinstance(under, dict):
            same = entry.get("name", under.get("name")) == under.get("name")
            found[key] = _over(under, entry) if same else entry
    return found


def without_save(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--save-config FILE`, and that file.

    Example:
        >>> without_save(["quickstart", "--save-config", "a.yaml", "--seed", "1"])
        (['quickstart', '--seed', '1'], PosixPath('a.yaml'))
    """
    rest: list[str] = []
    found: str | None = None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != SAVE:
            rest.append(word)
            continue
        found = value if equals else next(words, "")
        if not found or found.startswith("-"):
            raise UserError(f"{SAVE} needs a file, such as run.yaml")
    if found and not rest:
        raise UserError(f"{SAVE} {found}: give a preset first, or --config FILE")
    return rest, Path(found).expanduser() if found else None


def save_config(config: Any, path: Path) -> None:
    """Write a configuration as YAML, or as JSON where the file's name ends in `.json`.

    Raises:
        UserError: the file exists, or its name has another ending.
        OSError: it cannot be written.
    """
    if path.suffix not in (*YAML, ".json"):
        raise UserError(f"--save-config {path}: give a name that ends in .yaml or .json")
    if path.exists():
        raise UserError(f"--save-config {path} exists; give another name or remove it")
    value = to_json(config)
    if path.suffix == ".json":
        text = json.dumps(value, indent=1) + "\n"
    else:
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
