"""The options of the pre-training job, and the checks that need them and the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from train.data import corpus
from train.data.corpus import CorpusConfig
from train.data.token_rows import TokenRows
from train.options import optimizers
from train.options.config import (
    CheckpointConfig,
    ComputeConfig,
    CurveConfig,
    ModelConfig,
    ProfileConfig,
    ProgramConfig,
    SizesConfig,
    TrainConfig,
    again,
    run_folder,
)
from train.options.recipe import Recipe
from train.options.rows import chosen
from train.runtime import remote, sharding

FAMILIES = ("llama", "gpt2")


@dataclass(frozen=True)
class NewModelConfig(ComputeConfig, SizesConfig):
    """The model, which starts from random weights."""

    family: str = option("llama", "The architecture.", choices=FAMILIES)
    vocab_size: int = option(
        2048,
        "The model has this many ids, and so has a tokenizer that is trained.",
        low=259,
        high=2**20,
    )
    hidden_size: int = again(SizesConfig, "hidden_size", 192)
    intermediate_size: int = again(SizesConfig, "intermediate_size", 512)
    num_kv_heads: int | None = again(
        ModelConfig,
        "num_kv_heads",
        None,
        "The number of heads of keys and values, shared by groups of attention heads; None: as "
        "many.",
    )
    tie_embeddings: bool = option(True, "Input and output share one table of token vectors.")


@dataclass(frozen=True)
class BudgetConfig(CheckpointConfig, CurveConfig):
    """The length and the batches of the training."""

    tokens: float = option(
        2.0**20,
        "This many tokens are trained on, also as 1.1e9; a last incomplete batch is left out.",
        low=1,
    )
    batch_tokens: int = option(4096, "A step has this many tokens.", low=1)
    micro_tokens: int = option(
        16384,
        "A device holds at most this many tokens at once; a larger batch is accumulated. Results "
        "do not depend on it.",
        low=1,
    )
    curve_points: int = again(CurveConfig, "curve_points", 8)


@dataclass(frozen=True)
class PerplexityConfig:
    """Options of judging the model."""

    tokens: int | None = option(
        None, "Perplexity is computed on this many held-out tokens; None: all.", low=1
    )
    curve_tokens: int = option(
        32768, "Each evaluation during training is on this many of these.", low=1
    )


@dataclass(frozen=True)
class PretrainConfig(ProgramConfig, ProfileConfig):
    """One pre-training run."""

    data: CorpusConfig = CorpusConfig()
    model: NewModelConfig = NewModelConfig()
    train: BudgetConfig = BudgetConfig()
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS, optimizers.options_of("adamw", learning_rate=1e-3)
    )
    evaluate: PerplexityConfig = PerplexityConfig()


def num_steps(config: PretrainConfig) -> int:
    """The number of optimizer steps of the budget.

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
    """The rows of a step and its micro-batches, on `ways` devices that split a batch.

    There are as few micro-batches as possible; a device holds at most `micro_tokens`, or one row.

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


def recipe_of(config: PretrainConfig, ways: int) -> Recipe:
    """The recipe of the training, on `ways` devices that split a batch."""
    rows, parts = batch_rows(config, ways)
    stage = TrainConfig(
        steps=num_steps(config),
        batch_size=rows,
        accumulate=parts,
        optimizer=config.optimizer,
        checkpoint_seconds=config.train.checkpoint_seconds,
    )
    return Recipe(stage, config.optimizer, profile=config.profile)


def check_size(config: PretrainConfig, known: corpus.Known) -> None:
    """Raise `UserError` for a corpus that cannot fill a batch, whatever the tokenizer."""
    batch = config.train.batch_tokens
    if known.counts is not None and known.counts.num_bytes + 2 * known.counts.documents < batch:
        raise UserError(
            f"the corpus ({known.counts.words()}) has fewer than the {batch} tokens of a step; "
            "give more text, or lower --train.batch-tokens"
        )


def check_rows(config: PretrainConfig, rows: TokenRows, mesh: Any) -> None:
    """Raise `UserError` for fewer rows than a batch has."""
    batch, _ = batch_rows(config, sharding.batch_ways(mesh))
    if len(rows) < batch:
        raise UserError(
            f"the corpus has {len(rows.part.tokens)} training tokens, {len(rows)} row(s) of "
            f"--data.context {rows.context}, fewer than the {batch} of a step; give more text, or "
            "lower --train.batch-tokens"
        )


def cache_of(config: PretrainConfig) -> Path:
    """The folder of tokenised corpora, on this machine."""
    if config.data.cache is not None:
        return config.data.cache
    output = run_folder(config)
    return (Path("runs") if remote.is_remote(output) else output.parent) / "corpora"
