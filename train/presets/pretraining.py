"""Presets of train.pretrain: a tiny model for a laptop, and the models of TEON's experiments.

The published settings are those of arXiv 2601.23261 where its text gives them. What it does not
give is marked as unknown here; such values are those of the same authors' code for Muon+ (rates,
decay, clipping, schedules), or of GaLore's models of the same names (shapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from train.data.corpus import CorpusConfig
from train.jobs.pretraining_options import (
    BudgetConfig,
    NewModelConfig,
    PerplexityConfig,
    PretrainConfig,
)
from train.options import optimizers
from train.options.config import replace
from train.options.optimizers import Options, other
from train.runtime.sharding import MeshConfig


class Preset(NamedTuple):
    """A configuration, a line about it, the changes of `--smoke`, and optimizers tuned for it."""

    PRESET: PretrainConfig
    SUMMARY: str
    SMOKE: Mapping[str, Any]
    OPTIMIZERS: Mapping[str, tuple[Options, Mapping[str, Any]]]


def optimizers_of(adamw: Any, rate: float, **more: Any) -> dict[str, Options]:
    """AdamW, and Muon, NorMuon and TEON with matrices at `rate` and AdamW's rate for the rest."""
    found: dict[str, Options] = {"adamw": adamw}
    for name in ("muon", "normuon", "teon"):
        found[name] = replace(
            other(adamw, name),
            learning_rate=rate,
            adam_learning_rate=adamw.learning_rate,
            shape_scale="spectral",
            orthogonalize="polar_express",
            **more,
        )
    found["teon"] = replace(found["teon"], group_size=2, groups="qkv", axis="in")
    return found


def _alone(found: Mapping[str, Options]) -> dict[str, tuple[Options, Mapping[str, Any]]]:
    """Optimizers that change no other option of their preset."""
    return {name: (options, {}) for name, options in found.items()}


TINY = optimizers_of(
    optimizers.options_of("adamw",
        learning_rate=4e-3, schedule="hold", warmup=0.05, b1=0.9, b2=0.95, weight_decay=0.1,
        clip_norm=1.0,
    ),
    0.01,
)  # fmt: skip
# The best of the grids of `make pretrain-table`; the rest of the leaves beside Muon's matrices stay
# at 4e-3, where AdamW alone does worse.
TINY["adamw"] = replace(TINY["adamw"], learning_rate=1e-3)
TINY["normuon"] = replace(TINY["normuon"], learning_rate=0.02)

SMOKE = {
    "data.documents": 60,
    "data.validation": 0.1,
    "model.vocab_size": 384,
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.num_layers": 2,
    "data.context": 64,
    "train.tokens": 2048.0,
    "train.batch_tokens": 512,
    "train.curve_points": 2,
    "evaluate.tokens": 4096,
    "evaluate.curve_tokens": 1024,
}


def _tiny() -> Preset:
    config = PretrainConfig(
        preset="pretrain-tiny",
        data=CorpusConfig(context=256),
        model=NewModelConfig(),
        train=BudgetConfig(tokens=256 * 4096.0, batch_tokens=4096),
        optimizer=TINY["teon"],
    )
    summary = "2.2 M parameters on the Python files of installed packages (no download, minutes)"
    return Preset(config, summary, SMOKE, _alone(TINY))


def _published(
    name: str,
    summary: str,
    model: NewModelConfig,
    context: int,
    tokens: float,
    batch_tokens: int,
    optimizers: Mapping[str, Options],
    subset: str = "sample-10BT",
    tokenizer: str = "meta-llama/Llama-2-7b-hf",
) -> Preset:
    config = PretrainConfig(
        preset=name,
        data=CorpusConfig(source="hub", subset=subset, tokenizer=tokenizer, context=context),
        model=model,
        # Scores of attention are the largest arrays: a row of them on a device at once.
        train=BudgetConfig(
            tokens=tokens,
            batch_tokens=batch_tokens,
            micro_tokens=max(context, 4096),
            curve_points=20,
        ),
        optimizer=optimizers["teon"],
        evaluate=PerplexityConfig(tokens=2**23, curve_tokens=2**19),  # unknown
        mesh=MeshConfig(data=1, fsdp=-1, tp=1),
        export_dtype="bfloat16",
    )
    smoke = {
        "data.documents": 1000,
        "data.validation": 0.05,
        "train.tokens": 16.0 * context,
        "train.batch_tokens": 8 * context,  # rows for the devices of a host
        "train.curve_points": 1,
        "evaluate.tokens": 2 * context,
        "evaluate.curve_tokens": context,
    }
    return Preset(config, summary, smoke, _alone(optimizers))


def _rates(adamw: Any, rate: float) -> dict[str, Options]:
    """As `optimizers_of`, with AdamW's leaves at the rate of the matrices, as in Muon+."""
    found = optimizers_of(adamw, rate, comm_dtype="bfloat16")
    for name in ("muon", "normuon", "teon"):
        found[name] = replace(found[name], adam_learning_rate=None)
    return found


# GPT: constant for 40 % of the steps, then in a line towards 0, clipped at a tenth, as in Muon+.
# Rate and decay of the AdamW baseline are unknown.
def _gpt(rate: float) -> dict[str, Options]:
    adamw = optimizers.options_of("adamw",
        learning_rate=6e-4, schedule="hold", warmup=0.0, b1=0.95, b2=0.95, weight_decay=0.1,
        clip_norm=1.0,
    )  # fmt: skip
    return _rates(adamw, rate)


def _gpt_shape(hidden: int, layers: int, heads: int, remat: str = "dots") -> NewModelConfig:
    return NewModelConfig(
        family="gpt2",
        vocab_size=50257,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        dtype="bfloat16",
        remat=remat,
    )


# LLaMA: rotary positions with theta 10000, RMSNorm with epsilon 1e-5, no shared heads of keys and
# values. Whether embeddings are tied is unknown; untied they have the sizes of their names.
# Schedule, rates and decay are those of Muon+: 10 % of warm-up, cosine to 0. The rate of the AdamW
# baseline is unknown.
def _llama(rate: float, weight_decay: float) -> dict[str, Options]:
    adamw = optimizers.options_of("adamw",
        learning_rate=1e-3,  # unknown
        schedule="cosine", warmup=0.1, b1=0.95, b2=0.95,
        weight_decay=weight_decay, clip_norm=1.0,
    )  # fmt: skip
    return _rates(adamw, rate)


def _llama_shape(
    hidden: int, mlp: int, layers: int, heads: int, remat: str = "dots"
) -> NewModelConfig:
    return NewModelConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        tie_embeddings=False,
        dtype="bfloat16",
        remat=remat,
    )


PRESETS: dict[str, Preset] = {
    preset.PRESET.preset: preset
    for preset in (
        _tiny(),
        _published(
            "gpt-small",
            "GPT-2, 124 M parameters, 10 G tokens of FineWeb (accelerators)",
            _gpt_shape(768, 12, 12),
            1024,  # "1024-2048"
            10e9,
            2**19,  # "0.5-1.0M"
            _gpt(0.01),
            tokenizer="openai-community/gpt2",
        ),
        _published(
            "gpt-base",
            "GPT-2, 362 M parameters, 10 G tokens of FineWeb (accelerators)",
            _gpt_shape(1024, 24, 16),
            4096,
            10e9,
            2**21,  # "2.1M"
            _gpt(0.005),
            tokenizer="openai-community/gpt2",
        ),
        _published(
            "gpt-large",
            "GPT-2, 774 M parameters, 10 G tokens of FineWeb (accelerators)",
            _gpt_shape(1280, 36, 20, remat="full"),
            8192,
            10e9,
            2**22,  # "4.2M"
            _gpt(0.005),  # unknown
            tokenizer="openai-community/gpt2",
        ),
        _published(
            "llama-60m",
            "LLaMA, 60 M parameters, 1.1 G tokens of FineWeb (one accelerator)",
            _llama_shape(512, 1376, 8, 8),
            1024,
            1.1e9,
            2**19,  # "0.5M"
            _llama(0.04, 0.05),
        ),
        _published(
            "llama-130m",
            "LLaMA, 130 M parameters, 2.2 G tokens of FineWeb (accelerators)",
            _llama_shape(768, 2048, 12, 12),  # unknown; GaLore's
            1024,  # unknown
            2.2e9,
            2**19,  # unknown
            _llama(0.04, 0.05),  # unknown
        ),
        _published(
            "llama-350m",
            "LLaMA, 350 M parameters, 6.4 G tokens of FineWeb (accelerators)",
            _llama_shape(1024, 2736, 24, 16),
            4096,
            6.4e9,
            2**21,  # "2.1M"
            _llama(0.1, 0.1),
        ),
        _published(
            "llama-1b",
            "LLaMA, 1.3 G parameters, 13.1 G tokens of FineWeb (a TPU slice: train.plan)",
            _llama_shape(2048, 5461, 24, 32, remat="full"),
            4096,
            13.1e9,
            2**21,  # "2.1M"
            _llama(0.1, 0.1),  # unknown
            subset="sample-100BT",
        ),
    )
}
