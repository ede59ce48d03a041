"""Meaning of a model's name: a path, a bucket, or a repository of the Hugging Face Hub.

A name is a path. One that does not exist here is a Hub id when it says so (`hub:owner/name`), or
has the form `owner/name` and exists there. `@` and a commit, branch or tag may follow an id.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import exists, one_line, reading, shortened_path

BUCKET = re.compile(r"(gs|s3):/+(.+)")
ID = re.compile(r"(hub:)?([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:@([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 10
T = TypeVar("T")


def local(name: str) -> Path:
    """A name as a local path."""
    with reading(shortened_path(name), "give another path", "cannot be a path"):
        return Path(name).expanduser()


def is_here(name: str) -> bool:
    """Whether a name is a path that exists; a name with `hub:` never is."""
    return not name.startswith("hub:") and exists(local(name))


def check_source(source: str | Path, revision: str | None = None) -> None:
    """Raise `UserError` for a model that cannot be found; none of its files is read.

    Args:
        source: the model, as `models.load` takes it.
        revision: commit, branch or tag of a Hub id.

    Raises:
        UserError: neither here nor at the Hub, or a revision of something that is not a Hub id.
    """
    name = str(source)
    check_revision(source, revision)
    if BUCKET.fullmatch(name):
        return
    if is_here(name):
        if local(name).is_dir() and not (local(name) / "config.json").exists():
            raise UserError(
                f"{shortened_path(name)} is a folder without config.json, so no model; give a "
                "Hugging Face folder, a .gguf file or a Hub id"
            )
        return
    said, repository, given = parts(name)
    if said:
        return

    def look() -> None:
        import huggingface_hub

        at = given or revision
        config = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=at)
        if not isinstance(config, str):
            huggingface_hub.HfApi().model_info(repository, revision=at, timeout=SECONDS)

    _ask(name, look)


def check_revision(source: str | Path, revision: str | None) -> None:
    """Raise `UserError` for a revision without a Hub id, or for two different ones."""
    if revision is None:
        return
    name = str(source)
    found = None if BUCKET.fullmatch(name) or is_here(name) else ID.fullmatch(name)
    if found is None:
        raise UserError(
            f"revision {one_line(revision, 60)} of {shortened_path(name)}: only a Hub id "
            "(owner/name) has revisions; leave it out"
        )
    if found[3] and found[3] != revision:
        raise UserError(f"revision {one_line(revision, 60)} of {name}: give one of the two")


def parts(name: str) -> tuple[bool, str, str | None]:
    """Whether a Hub id starts with `hub:`, its repository, and its revision.

    Raises:
        UserError: the name can only be a path, and nothing is there.

    Example:
        >>> parts("hub:owner/name@main")
        (True, 'owner/name', 'main')
    """
    found = ID.fullmatch(name)
    if found is None or found[2].endswith(".gguf"):
        raise UserError(
            f"{shortened_path(name)}: no such file or folder{_near(name)}; give a model folder, a "
            ".gguf file or a Hub id (owner/name, hub:owner/name)"
        )
    return bool(found[1]), found[2], found[3]


def download(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder into which a Hub id was downloaded; it is named after its commit.

    Args:
        name: the id.
        revision: commit, branch or tag.
        weights: whether to download the weights; not needed for a tokenizer or a configuration.

    Raises:
        UserError: the name is not an id, or the Hub gave nothing.
    """
    _, repository, given = parts(name)
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *["*.safetensors"] * weights]

    def get() -> str:
        import huggingface_hub

        return huggingface_hub.snapshot_download(
            repository,
            revision=given or revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
        )

    return Path(_ask(name, get))


def _ask(name: str, question: Callable[[], T]) -> T:
    """An answer of the Hub, or a `UserError`: its client's exceptions share no base class."""
    try:
        return question()
    except Exception as error:
        raise UserError(
            f"{name}: no such file or folder here{_near(name)}, and the Hub gave no such model "
            f"({type(error).__name__}: {one_line(error)}); check the path or name, the network or "
            "your login"
        ) from error


def _near(name: str) -> str:
    """A hint at a file or folder with a similar name."""
    path = Path(name.removeprefix("hub:"))
    try:
        there = [item.name for item in path.expanduser().parent.iterdir()]
    except (OSError, ValueError, RuntimeError):
        return ""
    close = difflib.get_close_matches(path.name, there, 1, 0.6)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
