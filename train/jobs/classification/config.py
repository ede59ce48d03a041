"""The configuration of `train.classify`, and the tasks that it knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.options import option
from models.decoder.model import REMAT
from models.files.weights import DTYPES
from train.options import optimizers
from train.options.config import COMPUTE, CacheConfig, LoraConfig, ProgramConfig
from train.options.optimizer_options import ZOMuon
from train.options.rows import chosen
from train.runtime import reporters
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig
from train.tasks import images, reading, superglue
from train.tasks.labelled import Labelled

TASKS: dict[str, Labelled] = {
    row.name: row for row in (*superglue.ROWS, *reading.ROWS, *images.ROWS)
}
"""Every task by name. A new one is one more row."""


@dataclass(frozen=True)
class ClassifyData:
    """The rows that a model learns to classify."""

    path: Path | None = option(
        None,
        "a file (GLUE's TSV, JSON lines, CSV, parquet), or a folder with one for training and one "
        "for validation; of images a folder of IDX files or with a folder of PNG files for each "
        "class, or a `.npz` file; None: the Hub's, or what is installed.",
    )
    revision: str | None = option(
        None, "commit, branch or tag of the Hub's data set; None: the newest."
    )
    train_rows: int | None = option(
        1000, "rows to train on, drawn by the seed; None: all of a training file.", low=1
    )
    dev_rows: int | None = option(
        None,
        "rows drawn beside them, evaluated during training; None: 500, for small data sets 100.",
        low=1,
    )
    test_rows: int | None = option(
        None,
        "rows to test on, drawn by the seed from the validation file or, where there is none, from "
        "what is left; None: all of these.",
        low=1,
    )
    max_length: int = option(
        2048, "longest prompt with an option, in tokens; longer ones lose their beginning.", low=2
    )
    row_tokens: int = option(
        320,
        "short rows are packed into rows of about that many tokens; 0: one row each. The losses "
        "are the same.",
        low=0,
    )
    resize: bool = option(
        False,
        "bring images that are not of the model's size and colours to them (bilinear), in place of "
        "refusing them.",
        later=True,
    )


@dataclass(frozen=True)
class ClassifyModel:
    """The model to start from."""

    path: str = option(
        "smollm2",
        "an HF folder, a `.gguf` file, a Hub id, or `smollm2` (the installed package); of images "
        "an HF folder, an ImageNet-21k `.npz` file, or `scratch` (`--start.*`).",
    )
    revision: str | None = option(None, "commit, branch or tag of a Hub id; None: the newest.")
    dtype: str = option(
        "float32",
        "dtype of the computation, `float32` or `bfloat16`; parameters stay float32.",
        choices=COMPUTE,
    )
    remat: str = option(
        "dots", "what a backward pass recomputes: `none`, `dots`, `full`.", choices=tuple(REMAT)
    )


@dataclass(frozen=True)
class ClassifyTrain:
    """How much is trained."""

    forwards: int = option(
        40_000,
        "the budget, in forward passes of a batch: a first-order step counts 3, a zeroth-order "
        "step the losses that it evaluates.",
        low=1,
    )
    batch_size: int = option(16, "rows of a step.", low=1)
    accumulate: int = option(
        1, "micro-batches that a step is split into; results do not depend on it.", low=1
    )
    curve_points: int = option(10, "evaluations on the dev rows during training (0: none).", low=0)
    checkpoint_seconds: float = option(
        120.0, "least time between two checkpoints.", low=0, high=math.inf
    )


@dataclass(frozen=True)
class StartConfig:
    """The vision transformer to start from, where the run trains it itself (`scratch`)."""

    classes: int = option(
        8, "it learns the images of so many classes, the first ones.", low=2, later=True
    )
    steps: int = option(1000, "of AdamW.", low=1, later=True)
    batch_size: int = option(64, "images of a step.", low=1, later=True)
    learning_rate: float = option(
        1e-3, "the highest; it rises for a tenth of the steps.", low=0, later=True
    )
    patch_size: int = option(
        4, "pixels along a side of a patch; it divides an image's.", low=1, later=True
    )
    hidden_size: int = option(96, "width of the residual stream.", low=1, later=True)
    intermediate_size: int = option(384, "width of the MLPs.", low=1, later=True)
    num_layers: int = option(4, "blocks.", low=1, later=True)
    num_heads: int = option(3, "attention heads; they divide the width.", low=1, later=True)


@dataclass(frozen=True)
class ClassifyEvaluate:
    """How models are judged."""

    score_tokens: int = option(4096, "rows times length of one scoring batch.", low=1)
    generate_rows: int = option(64, "rows decoded at once.", low=1)


@dataclass(frozen=True)
class ClassifyRun(ProgramConfig):
    """One model that learns to classify, judged before and after."""

    task: str = option("sst2", "what is learned; --list names all.", choices=tuple(TASKS))
    data: ClassifyData = ClassifyData()
    model: ClassifyModel = ClassifyModel()
    start: StartConfig = StartConfig()
    train: ClassifyTrain = ClassifyTrain()
    optimizer: optimizers.Options = chosen(optimizers.ROWS, ZOMuon(schedule="constant", warmup=0.0))
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: ClassifyEvaluate = ClassifyEvaluate()
    stage: CacheConfig = CacheConfig()
    export_dtype: str = option("float32", "dtype of the exported weights.", choices=tuple(DTYPES))
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = option(
        "",
        "trackers that receive the metrics too, comma-separated: tensorboard, wandb, trackio.",
        words=tuple(reporters.REPORTERS),
    )
