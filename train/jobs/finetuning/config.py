"""The configuration of a preset of `train.finetune`: reasoning rows, condensed, packed, learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxlib_unlearn.cot import Condense
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from models.decoder.model import DecoderConfig
from models.files.weights import DTYPES
from models.text.prompts import DATE
from train.data.packed_rows import MODES
from train.jobs.finetuning.sources import SOURCES
from train.options import optimizers
from train.options.config import CacheConfig, ModelConfig, ProgramConfig, TrainConfig
from train.options.optimizer_options import AdamW
from train.options.rows import chosen
from train.runtime import reporters
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig


@dataclass(frozen=True)
class ReasoningData:
    """The rows that a model learns to reason by, and how they fill rows of tokens."""

    source: str = option(
        "rows",
        "`search` (generated in the run), `gsm8k`, `openr1` (OpenR1-Math-220k) or `rows` (your own "
        "file, as train.condense reads it).",
        choices=tuple(SOURCES),
    )
    path: Path | None = option(
        None,
        "file of rows, JSONL or parquet; of `gsm8k` and `openr1` also the folder of such files; "
        "None: the Hub's.",
    )
    revision: str | None = option(
        None, "commit, branch or tag of the Hub's data set; None: the newest."
    )
    train_rows: int | None = option(
        None, "rows to train on, drawn by the seed; None: all that are left.", low=1
    )
    test_rows: int = option(100, "rows to judge by, drawn by the seed.", low=1)
    row_tokens: int = option(
        1024, "tokens of a row that examples share, and the longest example.", low=2
    )
    packing: str = option(
        "first-fit",
        "`first-fit`: whole examples that do not see each other; `chop`: one long text that is cut "
        "every `row_tokens`, as the trainer of EPiC's artefacts does; `none`: an example a row.",
        choices=tuple(MODES),
    )
    mask_prompt: bool = option(
        False, "train on trace and answer alone; otherwise on the question as well, as published."
    )
    system_prompt: str | None = option(
        None, "system message of the chat template; None: the template's own default."
    )
    template: str = option("auto", "how questions are written, as in train.unlearn.")
    template_date: str = option(DATE, "today's date in chat templates that print one.")


@dataclass(frozen=True)
class CondenseConfig(Condense):
    """How traces are shortened before they are learned; tau 1 leaves them whole."""

    cost_matched: bool = option(
        False,
        "learn whole traces, of so many examples that they have as many tokens as the shortened "
        "traces of all.",
    )


@dataclass(frozen=True)
class ReasoningModel(ModelConfig):
    """The model to start from."""

    rope_theta: float | None = option(
        None, "base of the rotary positions; None: as in the model.", low=1
    )
    context: int | None = option(
        None, "longest context of the model; None: as in the model.", low=2
    )


def stretched(shape: DecoderConfig, model: ReasoningModel) -> DecoderConfig:
    """The shape of a model with the rotary base and the context that the options give.

    Raises:
        UserError: its positions are learned.
    """
    changes = {"rope_theta": model.rope_theta, "max_position_embeddings": model.context}
    given: dict[str, Any] = {name: x for name, x in changes.items() if x is not None}
    if given and shape.learned_positions is not None:
        raise UserError(
            f"{model.path} has learned positions, whose number is fixed; leave out --model.context "
            "and --model.rope-theta"
        )
    return replace(shape, **given)


@dataclass(frozen=True)
class JudgeConfig:
    """How models are judged."""

    max_new_tokens: int = option(512, "longest generated answer, with its trace.", low=1)
    generate_rows: int = option(64, "answers generated at once.", low=1)
    score_tokens: int = option(4096, "rows times length of one scoring batch.", low=1)


@dataclass(frozen=True)
class FitConfig:
    """How long is trained, and in which steps."""

    epochs: float = option(
        1.0, "passes over the rows (ignored when `steps` is given).", low=0, high=1e9
    )
    steps: int | None = option(None, "optimizer steps; None: from `epochs`.", low=1)
    batch_size: int = option(8, "rows of tokens in a step.", low=1)
    accumulate: int = option(
        1, "micro-batches that a step is split into; results do not depend on it.", low=1
    )
    checkpoint_seconds: float = option(
        120.0, "least time between two checkpoints.", low=0, high=math.inf
    )


@dataclass(frozen=True)
class ReasoningRun(ProgramConfig):
    """One model that learns from traces, judged before and after."""

    data: ReasoningData = ReasoningData()
    condense: CondenseConfig = CondenseConfig()
    model: ReasoningModel = ReasoningModel()
    train: FitConfig = FitConfig()
    optimizer: optimizers.Options = chosen(optimizers.ROWS, AdamW(learning_rate=5e-5))
    mesh: MeshConfig = MeshConfig()
    evaluate: JudgeConfig = JudgeConfig()
    stage: CacheConfig = CacheConfig()
    export_dtype: str = option("float32", "dtype of the exported weights.", choices=tuple(DTYPES))
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = option(
        "",
        "trackers that receive the metrics too, comma-separated: tensorboard, wandb, trackio.",
        words=tuple(reporters.REPORTERS),
    )


def stage_of(config: ReasoningRun) -> TrainConfig:
    """The training stage."""
    return TrainConfig(**vars(config.train), optimizer=config.optimizer)
