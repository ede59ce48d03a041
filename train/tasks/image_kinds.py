"""Vision transformers that `train.classify` trains: images, and a logit for each of their classes.

With `--model.path scratch` the run trains its model first, on the images of the first classes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models import arrays
from models.vision.vit import ViT, ViTConfig
from train.data.images import Pictures, check_image, resized
from train.engine import image_models
from train.engine.image_models import ImageModel
from train.options import optimizers
from train.options.config import TrainConfig
from train.runtime import distributed
from train.runtime.sharding import batch_ways, check_batch, put_batch
from train.runtime.stages import json_stage
from train.runtime.tracking import progress, say
from train.tasks.kinds import Kind, Rows

OBJECTIVE = "classes"
SCRATCH = "scratch"


def check(config: Any) -> None:
    """Raise `UserError` where no vision transformer is at `--model.path`."""
    start = config.start
    if config.model.path != SCRATCH and start != type(start)():
        raise UserError(
            "--start.* is of a model that the run trains itself; leave it out, or give "
            "--model.path scratch"
        )
    if start.hidden_size % start.num_heads:
        raise UserError(
            f"--start.num-heads {start.num_heads} does not divide --start.hidden-size "
            f"{start.hidden_size}; choose others"
        )
    image_models.check_model(config.model.path, config.model.revision)


def load(config: Any, rows: Any, mesh: Any) -> ImageModel:
    """The vision transformer at `--model.path`, or one with random weights for these images.

    Raises:
        UserError: it cannot be read, patches do not divide the images, or adapters are given with
            a head of zeros.
    """
    names = rows.train[0]["options"].words
    m, start = config.model, config.start
    if m.path == SCRATCH:
        model = _random(config, rows, names[: start.classes], mesh)
    else:
        model = image_models.load_model(m.path, names, m.remat, mesh, m.dtype)
    head = model.params["head"]["kernel"]
    if config.lora.rank is not None and not bool(jax.numpy.any(head)):
        raise UserError(
            "--lora.rank: adapters leave the head as it is, and this one is of zeros, through "
            "which nothing is learned; leave it out, or give a model with a head for these "
            f"{len(names)} classes"
        )
    return model


def _random(config: Any, rows: Any, names: tuple[str, ...], mesh: Any) -> ImageModel:
    start, pixels = config.start, rows.train[0]["image"].pixels
    height, width, channels = pixels.shape
    if height != width or height % start.patch_size:
        raise UserError(
            f"--start.patch-size {start.patch_size}: patches of that side do not divide images of "
            f"{height} x {width} pixels, which must be square too; choose another"
        )
    check_batch(mesh, start.batch_size, 1, "--start.batch-size:")
    count = len(rows.train[0]["options"])
    if start.classes > count:
        raise UserError(f"--start.classes {start.classes}: there are {count}; give at most these")
    shape = ViTConfig(
        image_size=height,
        patch_size=start.patch_size,
        channels=channels,
        hidden_size=start.hidden_size,
        intermediate_size=start.intermediate_size,
        num_layers=start.num_layers,
        num_heads=start.num_heads,
        num_classes=len(names),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        dtype=config.model.dtype,
    )
    return image_models.new_model(shape, names, config.model.remat, mesh, config.seed)


def encode(model: ImageModel, rows: Rows, data: Any, where: str) -> list[tuple[np.ndarray, int]]:
    """Images that the model can read, with the numbers of their classes."""
    shape = model.vit.config.image_shape
    for number, row in enumerate(rows, 1):
        check_image(row["image"].pixels, shape, data.resize, f"{where}, row {number}")
    return [(row["image"].pixels, row["gold"]) for row in rows]


def stream(model: ImageModel, encoded: list[tuple[np.ndarray, int]], batch_size: int) -> Pictures:
    """A stream of images."""
    del batch_size
    golds = np.array([gold for _, gold in encoded], np.int64)
    return Pictures([pixels for pixels, _ in encoded], golds, model.vit.config.image_shape)


@functools.partial(jax.jit, static_argnums=0)
def _logits(vit: ViT, params: Any, images: jax.Array) -> jax.Array:
    return vit.logits(params, images)


def score(
    model: ImageModel, encoded: list[tuple[np.ndarray, int]], mesh: Any, evaluate: Any, label: str
) -> list[np.ndarray]:
    """The logits of the classes of every image, float64."""
    shape, ways, found = model.vit.config.image_shape, batch_ways(mesh), []
    rows = min(max(1, evaluate.score_tokens // model.vit.config.num_tokens), len(encoded))
    rows = -(-rows // ways) * ways
    with progress(label, len(encoded)) as advance:
        for first in range(0, len(encoded), rows):
            mine = [resized(pixels, shape) for pixels, _ in encoded[first : first + rows]]
            filled = np.stack(mine + mine[-1:] * (rows - len(mine)))  # one shape, one compilation
            batch = put_batch({"image": filled}, mesh)
            logits = arrays.host(_logits(model.vit, model.params, batch["image"]))
            found += list(logits[: len(mine)].astype(np.float64))
            advance(len(mine))
            distributed.stop_point()
    return found


def begin(config: Any, run: Any, rows: Any, encoded: Any, model: ImageModel) -> ImageModel:
    """The model after its training on the first classes, with a head of zeros for all of them.

    It is exported to `RUN/start`: a replay of the run begins there.
    """
    if config.model.path != SCRATCH:
        if model.note:
            say(model.note)
        return model
    from train.engine.run import Recipe, train

    start = config.start
    seen = {
        split: [(pixels, gold) for pixels, gold in encoded[split] if gold < start.classes]
        for split in ("train", "test")
    }
    optimizer = optimizers.options_of(
        "adamw", learning_rate=start.learning_rate, schedule="cosine", warmup=0.1, weight_decay=0.05
    )
    stage = TrainConfig(steps=start.steps, batch_size=start.batch_size, optimizer=optimizer)
    row = objectives.resolve(OBJECTIVE, objectives.LEARNING)
    streams = {"train": stream(model, seen["train"], start.batch_size)}
    untrained: Any = model  # `train` takes any model with a learner
    recipe = Recipe(stage, optimizer)
    trained: Any = train(run, "start", untrained, row, streams, recipe)

    def judged() -> float:
        scores = score(trained.to_device(), seen["test"], run.mesh, config.evaluate, "start")
        right = [
            int(np.argmax(values)) == gold
            for values, (_, gold) in zip(scores, seen["test"], strict=True)
        ]
        return float(np.mean(right)) if right else 0.0

    inputs = {"params": trained.sha, "rows": streams["train"].identity(), "of": len(seen["test"])}
    right = json_stage(run.folder / "computed" / "start.json", inputs, judged)
    classes, images = start.classes, len(seen["test"])
    say(f"start: {classes} classes, accuracy {right:.3f} on the {images} test images of them")
    names = rows.train[0]["options"].words
    made = image_models.for_classes(trained, names, run.mesh)
    what = f"A model that learned {classes} of the classes of {config.task} with jaxlib-unlearn."
    image_models.export_model(made, run.folder / "start", "float32", what)
    return made


def export(model: ImageModel, folder: Path, dtype: str, what: str) -> None:
    """Write the model as an HF folder."""
    image_models.export_model(model, folder, dtype, what)


CLASSES = Kind(
    objective=OBJECTIVE,
    evaluators=("choice",),
    check=check,
    load=load,
    encode=encode,
    stream=stream,
    scores=score,
    export=export,
    begin=begin,
)
