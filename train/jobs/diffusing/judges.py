"""Judges of images: a classifier that the run trains, or a vision transformer that is given."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import reading
from models import arrays
from models.files.export import write_tensors
from models.files.weights import flatten, insert, stored_in
from models.vision.cnn import CNN, CNNConfig, CNNLearner
from models.vision.vit import ViT, ViTLearner
from train.data.images import resized
from train.engine import exports, image_models
from train.jobs.diffusing import held
from train.jobs.diffusing.batched import batched
from train.jobs.diffusing.held import Held
from train.options import config as configs
from train.runtime import distributed, seal
from train.runtime.stages import write_atomic

NONE = -1  # the number of anything else than the classes


class Judge(NamedTuple):
    """A classifier that judges images.

    Args:
        held: the model.
        columns: the number of each class's logit; None: the classes are those of the model.
    """

    held: Held
    columns: tuple[int, ...] | None = None

    @property
    def model(self) -> CNN | ViT:
        """Its pure functions."""
        learner = self.held.learner
        return learner.vit if isinstance(learner, ViTLearner) else learner.model

    def identity(self) -> dict[str, Any]:
        """The inputs that its judgement depends on, as JSON values."""
        return {**self.held.identity(), "columns": self.columns}

    def seen(self, logits: np.ndarray) -> np.ndarray:
        """The class of each row of logits; `NONE` for something else.

        Example:
            >>> Judge(None, (2, 0)).seen(np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])).tolist()
            [0, 1, -1]
        """
        best = np.argmax(logits, -1)
        if self.columns is None:
            return best
        found = np.full(len(best), NONE)
        for label, column in enumerate(self.columns):
            found[best == column] = label
        return found


@functools.partial(jax.jit, static_argnums=0)
def _judged(model: CNN | ViT, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    if isinstance(model, CNN):
        return model.logits(params, images), model.features(params, images)
    width = model.config.hidden_size
    head = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}  # passes the features on
    return model.logits(params, images), model.logits({**params, "head": head}, images)


def judged(
    judge: Judge, images: np.ndarray, mesh: Any, rows: int, label: str = "judge images"
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(N, classes)` and features `(N, d)` of uint8 images, brought to the model's size."""
    model = judge.model
    params, shape = judge.held.to_device().params, model.config.image_shape
    return batched(
        len(images),
        rows,
        mesh,
        label,
        lambda mine: {"image": np.stack([resized(images[i], shape) for i in mine])},
        lambda batch: _judged(model, params, batch["image"]),
    )


def accuracy(judge: Judge, images: np.ndarray, labels: np.ndarray, mesh: Any, rows: int) -> float:
    """The share of images whose class the judge sees."""
    logits, _ = judged(judge, images, mesh, rows, "classifier: held-out images")
    return float(np.mean(judge.seen(logits) == labels))


def given(path: str, names: Sequence[str], mesh: Any, remat: str = "none") -> Judge:
    """A vision transformer that knows the classes by name.

    A name such as "church, church building" in its files is known by each of its parts.

    Raises:
        UserError: it cannot be read, or does not know a class.
    """
    image_models.check_model(path)
    model = image_models.load_model(path, None, remat, mesh)
    parts = [{part.strip().lower() for part in name.split(",")} for name in model.names]
    columns = []
    for name in names:
        found = [i for i, known in enumerate(parts) if name in known]
        if not found:
            raise UserError(
                f"--judge.path {path} knows no class {name!r}; give a classifier with the classes "
                f"{', '.join(names)}"
            )
        columns.append(found[0])
    return Judge(Held(ViTLearner(model.vit), model.params, model.sha).to_host(), tuple(columns))


def store(judge: Judge, target: Path) -> None:
    """A classifier that the run trained as a sealed folder: `config.json`, `model.safetensors`."""
    shape = configs.to_json(judge.held.model.config)

    def write() -> None:
        tensors = {n: arrays.host(x) for n, x in flatten(judge.held.to_device().params).items()}

        def put() -> None:
            target.mkdir(parents=True, exist_ok=True)
            write_atomic(target / "config.json", json.dumps(shape, indent=1))
            write_tensors(iter(tensors.items()), target)

        distributed.of_first(put)

    exports.sealed(target, judge.held.sha, shape, write)


def load(folder: Path, mesh: Any) -> Judge:
    """A classifier that `store` wrote.

    Raises:
        UserError: it is damaged.
    """
    seal.check(folder)
    with reading(folder, "run the command of its run again", "no judge that reads"):
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = CNNConfig(**{**raw, "channels": tuple(raw["channels"])})
        tree: dict[str, Any] = {}
        for name, tensor in read_tensors(folder / "model.safetensors").items():
            insert(tree, name, tensor)
    return Judge(held.placed(CNNLearner(CNN(shape)), tree, mesh).to_host())


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the command of its run again")
    return {name: np.asarray(x.read(0, x.shape[0])) for name, x in stored_in(path).items()}
