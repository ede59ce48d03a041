"""The options of the classification job, and the tasks that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.options import option
from train.options import optimizers
from train.options.config import (
    BatchConfig,
    CurveConfig,
    LoraConfig,
    ProgramConfig,
    RevisionConfig,
    RowTokensConfig,
    ScoringConfig,
    SizesConfig,
    SourceConfig,
    TrainConfig,
    again,
)
from train.options.recipe import Recipe
from train.options.rows import chosen
from train.tasks import images, reading, superglue
from train.tasks.labelled import Labelled

TASKS: dict[str, Labelled] = {
    row.name: row for row in (*superglue.ROWS, *reading.ROWS, *images.ROWS)
}
"""Every task by name. A new one is one more row."""


@dataclass(frozen=True)
class ClassifyData(RowTokensConfig, RevisionConfig):
    """The rows that a model learns to classify."""

    path: Path | None = option(
        None,
        "A file (GLUE's TSV, JSON lines, CSV, parquet), or a folder with one for training and one "
        "for validation; of images a folder of IDX files or with a folder of PNG files for each "
        "class, or a `.npz` file; None: the Hub's, or what is installed.",
    )
    train_rows: int | None = option(
        1000,
        "This many rows are trained on, drawn by the seed; None: all of a training file.",
        low=1,
    )
    dev_rows: int | None = option(
        None,
        "This many rows are drawn beside them and evaluated during training; None: 500, for small "
        "data sets 100.",
        low=1,
    )
    test_rows: int | None = option(
        None,
        "This many rows are tested on, drawn by the seed from the validation file or, where there "
        "is none, from what is left; None: all of these.",
        low=1,
    )
    max_length: int = option(
        2048,
        "A prompt with an option has at most this many tokens; longer ones lose their beginning.",
        low=2,
    )
    resize: bool = option(
        False,
        "Bring images that are not of the model's size and colours to them (bilinear), in place of "
        "refusing them.",
    )


@dataclass(frozen=True)
class ClassifyModel(SourceConfig):
    """The model to start from."""

    path: str = again(
        SourceConfig,
        "path",
        "smollm2",
        "The model: an HF folder, a `.gguf` file, a Hub id, or `smollm2` (the installed package); "
        "of images an HF folder, an ImageNet-21k `.npz` file, or `scratch` (`--start.*`).",
    )


@dataclass(frozen=True)
class ClassifyTrain(BatchConfig, CurveConfig):
    """The length and the batches of the training."""

    forwards: int = option(
        40_000,
        "The budget, in forward passes of a batch: a first-order step counts 3, a zeroth-order "
        "step the losses that it evaluates.",
        low=1,
    )
    batch_size: int = again(BatchConfig, "batch_size", 16)
    curve_points: int = again(CurveConfig, "curve_points", 10)


@dataclass(frozen=True)
class StartConfig(SizesConfig):
    """The vision transformer to start from, where the run trains it itself (`scratch`)."""

    classes: int = option(
        8, "It learns the images of this many classes, counted from the first.", low=2
    )
    steps: int = option(1000, "It takes this many steps of AdamW.", low=1)
    batch_size: int = option(64, "A step has this many images.", low=1)
    learning_rate: float = option(
        1e-3, "The highest learning rate, to which it rises for a tenth of the steps.", low=0
    )
    patch_size: int = option(
        4, "A patch has this many pixels along a side; they divide an image's.", low=1
    )
    hidden_size: int = again(SizesConfig, "hidden_size", 96)
    num_heads: int = again(SizesConfig, "num_heads", 3)


@dataclass(frozen=True)
class ClassifyRun(ProgramConfig):
    """One model that learns to classify, judged before and after."""

    task: str = option("sst2", "The task that is learned; --list names all.", choices=tuple(TASKS))
    data: ClassifyData = ClassifyData()
    model: ClassifyModel = ClassifyModel()
    start: StartConfig = StartConfig()
    train: ClassifyTrain = ClassifyTrain()
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS, optimizers.options_of("zo-muon", schedule="constant", warmup=0.0)
    )
    lora: LoraConfig = LoraConfig()
    evaluate: ScoringConfig = ScoringConfig()


def recipe_of(config: ClassifyRun, steps: int) -> Recipe:
    """The recipe of the training, of so many steps."""
    t = config.train
    stage = TrainConfig(
        steps=steps,
        batch_size=t.batch_size,
        accumulate=t.accumulate,
        optimizer=config.optimizer,
        curve_points=t.curve_points,
        checkpoint_seconds=t.checkpoint_seconds,
    )
    return Recipe(stage, config.optimizer, adapters=config.lora, row_tokens=config.data.row_tokens)
