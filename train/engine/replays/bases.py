"""The models that a replay may begin at: language models, and vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from models.files.vit_files import is_vit
from train.engine import base_models, exports, image_models
from train.engine.replays.stored import Replay


class Source(NamedTuple):
    """A kind of model.

    Args:
        check: `check(path, revision)`: whether there is one; nothing is read.
        load: `load(model, made, mesh)`: the model at `--model.path`, for the replay of a file.
        export: `export(model, folder, dtype)`.
    """

    check: Callable[[str, str | None], None]
    load: Callable[[Any, Replay, Any], Any]
    export: Callable[[Any, Path, str], None]


def _decoder(model: Any, made: Replay, mesh: Any) -> Any:
    return base_models.load_model(model.path, "none", mesh, revision=model.revision)


def _images(model: Any, made: Replay, mesh: Any) -> Any:
    return image_models.load_model(model.path, _classes(made.header), "none", mesh)


def _classes(header: dict[str, Any]) -> tuple[str, ...] | int | None:
    """The names of the classes; a file of an earlier version has their number at most."""
    if isinstance(header.get("classes"), list):
        return tuple(map(str, header["classes"]))
    head = header["leaves"].get("head/bias")  # of adapters alone the file has none
    return None if head is None else head[1]


def _export_images(model: Any, folder: Path, dtype: str) -> None:
    what = "A model fine-tuned with jaxlib-unlearn, from the replay of its coefficients."
    image_models.export_model(model, folder, dtype, what)


DECODERS = Source(base_models.check_model, _decoder, exports.export_model)
IMAGES = Source(image_models.check_model, _images, _export_images)


def source_of(path: str) -> Source:
    """The kind of model at a `--model.path`."""
    return IMAGES if is_vit(path) else DECODERS
