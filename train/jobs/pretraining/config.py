"""The configuration of a pre-training run: frozen dataclasses, as in `train/options/config.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from models.bounds import MOST_LAYERS
from models.decoder.model import REMAT
from models.files.weights import DTYPES
from train.data.corpus import CorpusConfig
from train.options import optimizers
from train.options.config import COMPUTE, ProgramConfig, TrainConfig
from train.options.optimizer_options import AdamW
from train.options.rows import chosen
from train.runtime import reporters
from train.runtime.distributed import DistributedConfig
from train.runtime.sharding import MeshConfig

FAMILIES = ("llama", "gpt2")


@dataclass(frozen=True)
class NewModelConfig:
    """The model, which starts from random weights."""

    family: str = option("llama", "architecture.", choices=FAMILIES)
    vocab_size: int = option(
        2048,
        "ids that the model has; of a tokenizer that is trained as well.",
        low=259,
        high=2**20,
    )
    hidden_size: int = option(192, "width of the residual stream.", low=1)
    intermediate_size: int = option(512, "width inside an MLP.", low=1)
    num_layers: int = option(4, "blocks.", low=1, high=MOST_LAYERS)
    num_heads: int = option(4, "attention heads.", low=1)
    num_kv_heads: int | None = option(
        None,
        "heads of keys and values, shared by groups of attention heads; None: as many.",
        low=1,
    )
    tie_embeddings: bool = option(True, "one table of token vectors, for input and output.")
    dtype: str = option(
        "float32",
        "dtype of the computation, `float32` or `bfloat16`; parameters stay float32.",
        choices=COMPUTE,
    )
    remat: str = option(
        "dots",
        "what the backward pass recomputes: `none`, `dots` or `full`, as in train.unlearn.",
        choices=tuple(REMAT),
    )


@dataclass(frozen=True)
class BudgetConfig:
    """How long is trained, and in which steps."""

    tokens: float = option(
        2.0**20, "tokens to train on, also as 1.1e9; a last incomplete batch is left out.", low=1
    )
    batch_tokens: int = option(4096, "tokens of a step.", low=1)
    micro_tokens: int = option(
        16384,
        "tokens that a device holds at once, at most; a batch that is larger is accumulated. "
        "Results do not depend on it.",
        low=1,
    )
    curve_points: int = option(
        8, "evaluations during training, on held-out tokens (0: none).", low=0
    )
    checkpoint_seconds: float = option(
        120.0, "least time between two checkpoints.", low=0, high=math.inf
    )


@dataclass(frozen=True)
class JudgeConfig:
    """How the model is judged."""

    tokens: int | None = option(
        None, "held-out tokens that perplexity is computed on; None: all.", low=1
    )
    curve_tokens: int = option(32768, "of these, for each evaluation during training.", low=1)


@dataclass(frozen=True)
class PretrainConfig(ProgramConfig):
    """One pre-training run."""

    data: CorpusConfig = CorpusConfig()
    model: NewModelConfig = NewModelConfig()
    train: BudgetConfig = BudgetConfig()
    optimizer: optimizers.Options = chosen(optimizers.ROWS, AdamW(learning_rate=1e-3))
    evaluate: JudgeConfig = JudgeConfig()
    mesh: MeshConfig = MeshConfig()
    export_dtype: str = option("float32", "dtype of the exported weights.", choices=tuple(DTYPES))
    profile: Path | None = option(None, "folder for a trace of a few steps; None: no trace.")
    distributed: DistributedConfig = DistributedConfig()
    report_to: str = option(
        "",
        "trackers that receive the metrics too, comma-separated: tensorboard, wandb, trackio.",
        words=tuple(reporters.REPORTERS),
    )


def num_steps(config: PretrainConfig) -> int:
    """Optimizer steps of the budget.

    Raises:
        UserError: there is none.
    """
    steps = int(config.train.tokens) // config.train.batch_tokens
    if steps < 1:
        raise UserError(
            f"--train.tokens {config.train.tokens:.15g} are fewer than the "
            f"{config.train.batch_tokens} of a step (--train.batch-tokens); raise them"
        )
    return steps


def batch_rows(config: PretrainConfig, ways: int) -> tuple[int, int]:
    """Rows of a step and its micro-batches, on `ways` devices that split a batch.

    The fewest micro-batches of which a device holds at most `micro_tokens`, or one row.

    Raises:
        UserError: the batch is no whole number of rows, or does not divide over the devices.

    Example:
        >>> from train.options.config import replace
        >>> config = replace(PretrainConfig(), **{"train.micro_tokens": 1024})
        >>> batch_rows(config, 1), batch_rows(config, 4)
        ((16, 4), (16, 1))
    """
    batch, context = config.train.batch_tokens, config.data.context
    rows, rest = divmod(batch, context)
    if rest or rows < 1 or rows % ways:
        over = f" and {ways} devices that split a batch" if ways > 1 else ""
        raise UserError(
            f"--train.batch-tokens {batch} is no multiple of rows of --data.context {context}"
            f"{over}; use a multiple of {context * ways}"
        )
    each = rows // ways
    held = max(1, config.train.micro_tokens // context)
    parts = next(n for n in range(-(-each // held), each + 1) if each % n == 0)
    return rows, parts


def stage_of(config: PretrainConfig, ways: int) -> TrainConfig:
    """The budget as a stage of training."""
    rows, parts = batch_rows(config, ways)
    return TrainConfig(
        steps=num_steps(config),
        batch_size=rows,
        accumulate=parts,
        optimizer=config.optimizer,
        checkpoint_seconds=config.train.checkpoint_seconds,
    )
