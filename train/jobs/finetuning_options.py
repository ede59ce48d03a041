"""The options of the fine-tuning job: reasoning rows, condensed, packed, learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxlib_unlearn.cot import Condense
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from models.decoder.model import DecoderConfig
from train.data.packed_rows import MODES
from train.jobs.sources import SOURCES
from train.options import optimizers
from train.options.config import (
    AnswersConfig,
    LengthConfig,
    ModelConfig,
    ProgramConfig,
    PromptConfig,
    RevisionConfig,
    RowTokensConfig,
    TrainConfig,
    again,
)
from train.options.recipe import Recipe
from train.options.rows import chosen


@dataclass(frozen=True)
class ReasoningData(RowTokensConfig, PromptConfig, RevisionConfig):
    """The rows from which a model learns to reason, and their packing."""

    source: str = option(
        "rows",
        "The rows: `search` (generated in the run), `gsm8k`, `openr1` (OpenR1-Math-220k) or `rows` "
        "(your own file, as train.condense reads it).",
        choices=tuple(SOURCES),
    )
    path: Path | None = option(
        None,
        "A file of rows, JSONL or parquet; of `gsm8k` and `openr1` also the folder of such files; "
        "None: the Hub's.",
    )
    train_rows: int | None = option(
        None, "This many rows are trained on, drawn by the seed; None: all that are left.", low=1
    )
    test_rows: int = option(100, "This many rows judge the model, drawn by the seed.", low=1)
    row_tokens: int = option(
        1024, "Examples share rows of this many tokens, which is also the longest example.", low=2
    )
    packing: str = option(
        "first-fit",
        "Rows are filled by `first-fit`: whole examples that do not see each other; `chop`: one "
        "long text that is cut every `row_tokens`, as the trainer of EPiC's artefacts does; "
        "`none`: an example a row.",
        choices=tuple(MODES),
    )
    mask_prompt: bool = option(
        False,
        "Train on trace and answer alone; otherwise on the question as well, as published.",
    )


@dataclass(frozen=True)
class CondenseConfig(Condense):
    """Options of shortening traces before they are learned; tau 1 leaves them whole."""

    cost_matched: bool = option(
        False,
        "Learn whole traces, of so many examples that they have as many tokens as the shortened "
        "traces of all.",
    )


@dataclass(frozen=True)
class ReasoningModel(ModelConfig):
    """The model to start from."""

    rope_theta: float | None = option(
        None, "The base of the rotary positions; None: as in the model.", low=1
    )
    context: int | None = option(
        None, "The longest context of the model; None: as in the model.", low=2
    )


def stretched(shape: DecoderConfig, model: ReasoningModel) -> DecoderConfig:
    """The shape of a model with the rotary base and the context that the options give.

    Raises:
        UserError: the positions of the model are learned.
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
class ReasoningRun(ProgramConfig):
    """One model that learns from traces, judged before and after."""

    data: ReasoningData = ReasoningData()
    condense: CondenseConfig = CondenseConfig()
    model: ReasoningModel = ReasoningModel()
    train: LengthConfig = LengthConfig()
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS, optimizers.options_of("adamw", learning_rate=5e-5)
    )
    evaluate: AnswersConfig = AnswersConfig(max_new_tokens=512)


@dataclass(frozen=True)
class FinetuneRun(ProgramConfig, PromptConfig):
    """One model that learns the questions and answers of a file.

    Args:
        model: the first argument: an HF folder, `.gguf` file, Hub id or `smollm2`.
        rows: the second argument: JSON lines or a JSON list with `question` and `answer`.
    """

    model: str = ""
    rows: str = ""
    output: Path | None = again(ProgramConfig, "output", Path("runs/finetune"))
    max_length: int = option(512, "An example has at most this many tokens.", low=2)
    train: TrainConfig = TrainConfig(
        epochs=5, optimizer=optimizers.options_of("adamw", learning_rate=1e-5)
    )


def recipe_of(config: ReasoningRun) -> Recipe:
    """The recipe of the training."""
    return Recipe(config.train, config.optimizer)
