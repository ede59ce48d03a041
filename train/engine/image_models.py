"""Vision transformers as runs hold them: trained from random weights, or loaded from a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_unlearn.errors import UserError
from models import bounds
from models.files import vit_files
from models.files.hub import is_here
from models.vision.vit import RULES, ViT, ViTConfig, ViTLearner
from train.engine import exports
from train.options.config import to_json
from train.runtime import cards, distributed, residency, seal, sharding
from train.runtime.checkpointing import params_sha256


class ImageModel(NamedTuple):
    """A vision transformer with its parameters, its classes and the sha256 of the parameters.

    `note` says what became of the head in its files, where it is not as it was.
    """

    vit: ViT
    params: Any
    names: tuple[str, ...]
    sha: str
    note: str = ""

    @property
    def learner(self) -> ViTLearner:
        """The learner that trains it."""
        return ViTLearner(self.vit)

    def identity(self) -> dict[str, Any]:
        """The inputs that its answers depend on, as JSON values."""
        return {"params": self.sha, "model": to_json(self.vit.config), "names": list(self.names)}

    def to_host(self) -> ImageModel:
        """The model with its parameters in host memory."""
        return self._replace(params=residency.to_host(self.params))

    def to_device(self) -> ImageModel:
        """The model with its parameters in device memory."""
        return self._replace(params=residency.to_device(self.params))


def check_model(path: str, revision: str | None = None) -> None:
    """Raise `UserError` for a `--model.path` without a vision transformer; little is read."""
    if revision is not None:
        raise UserError(
            "--model.revision is of a Hub id, and vision transformers are read from folders and "
            ".npz files; leave it out"
        )
    if path == "scratch":
        return
    if not is_here(path):
        raise UserError(
            f"--model.path {path} does not exist; give a Hugging Face folder of a vision "
            "transformer, an ImageNet-21k .npz file, or scratch"
        )
    if not vit_files.is_vit(path):
        raise UserError(
            f"--model.path {path} is no vision transformer (a .npz file, or a folder whose "
            "config.json says vit); give one, or scratch"
        )


def load_model(
    path: str, names: Sequence[str] | int | None, remat: str, mesh: Any, dtype: str = "float32"
) -> ImageModel:
    """A vision transformer from a folder or a `.npz` file, see `models.files.vit_files.load`.

    Raises:
        UserError: it cannot be read, an export there is damaged, or the mesh splits more heads
            than there are.
    """
    distributed.of_first(lambda: seal.check(Path(path).expanduser()))
    with distributed.together():
        loaded = vit_files.load(
            path,
            names,
            shardings=lambda name, shape: sharding.sharding_of(name, shape, mesh, RULES),
        )
        sharding.check_heads(mesh, loaded.config.num_heads)
    vit = ViT(dataclasses.replace(loaded.config, dtype=dtype), remat)
    sha = params_sha256(loaded.params)
    return ImageModel(vit, loaded.params, loaded.names, sha, loaded.note)


def new_model(
    config: ViTConfig, names: Sequence[str], remat: str, mesh: Any, seed: int
) -> ImageModel:
    """A vision transformer with random weights.

    Raises:
        UserError: more parameters than this host's memory holds, or than the mesh has heads for.
    """
    vit = ViT(config, remat)
    sharding.check_heads(mesh, config.num_heads)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vit.shapes()))
    bounds.check_memory(size, "--start.hidden-size and the other sizes", "make it smaller")
    params = sharding.put_params(jax.jit(vit.init)(jax.random.key(seed)), mesh, RULES)
    return ImageModel(vit, params, tuple(names), params_sha256(params))


def for_classes(model: ImageModel, names: Sequence[str], mesh: Any) -> ImageModel:
    """The model for other classes, all of which its head of zeros finds equally probable."""
    config = dataclasses.replace(model.vit.config, num_classes=len(names))
    head = {
        name: jnp.zeros((*x.shape[:-1], len(names)), x.dtype)
        for name, x in model.params["head"].items()
    }
    params = {**model.params, "head": sharding.put_params({"head": head}, mesh, RULES)["head"]}
    vit = ViT(config, model.vit.remat)
    return ImageModel(vit, params, tuple(names), params_sha256(params))


def export_model(model: ImageModel, folder: Path, dtype: str, what: str) -> None:
    """Export a model as an HF folder, unless the folder already holds it with the same card.

    Args:
        model: the model.
        folder: the folder to write.
        dtype: the dtype of its tensors.
        what: a sentence on its origin, for its card.
    """
    text = cards.of_images(what, model.sha)
    config = dataclasses.replace(model.vit.config, dtype="float32")

    def write() -> None:
        loaded = vit_files.LoadedViT(config, model.to_device().params, model.names)
        vit_files.export(
            loaded, folder, dtype=dtype, card=lambda written: cards.with_digests(text, written)
        )

    exports.sealed(folder, f"{model.sha} {dtype}", text, write)
