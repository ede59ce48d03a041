"""Presets of train.finetune that condense traces before they are learned (EPiC).

The paper's body gives no settings. Those of `epic-qwen2.5-math-7b` are of Open-R1's recipe, by
which the authors' published models were most likely trained; what is not known is marked. The
other two are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from train.jobs.finetuning_options import (
    CondenseConfig,
    ReasoningData,
    ReasoningModel,
    ReasoningRun,
)
from train.options import optimizers
from train.options.config import AnswersConfig, LengthConfig
from train.runtime.sharding import MeshConfig


class Preset(NamedTuple):
    """A configuration, a line about it, and the changes of `--smoke`."""

    PRESET: ReasoningRun
    SUMMARY: str
    SMOKE: Mapping[str, Any]


SMOKE = {
    "data.train_rows": 24,
    "data.test_rows": 4,
    "train.steps": 3,
    "evaluate.max_new_tokens": 16,
}


TINY = Preset(
    ReasoningRun(
        preset="epic-tiny",
        data=ReasoningData(
            source="search",
            train_rows=8000,
            test_rows=300,
            row_tokens=416,
            # Unlike the published runs: the steps of a question are drawn, so that learning to
            # foresee them works against looking them up.
            mask_prompt=True,
        ),
        condense=CondenseConfig(mode="line"),
        model=ReasoningModel(
            path="scratch",
            vocab_size=512,
            hidden_size=96,
            intermediate_size=192,
            num_layers=2,
            # Wide heads: in narrow ones few rotary pairs turn slowly enough to find a step by its
            # name from afar.
            num_heads=3,
            num_kv_heads=3,
        ),
        train=LengthConfig(epochs=1, batch_size=3),
        optimizer=optimizers.options_of(
            "muon",
            learning_rate=0.02,
            adam_learning_rate=3e-3,
            shape_scale="spectral",
            schedule="cosine",
            warmup=0.05,
            b2=0.98,
        ),
        evaluate=AnswersConfig(max_new_tokens=256, generate_rows=100),
    ),
    "a tiny model learns to move on a ring from traces that search first (no download, minutes)",
    {
        **SMOKE,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
    },
)

GSM8K = Preset(
    ReasoningRun(
        preset="epic-gsm8k-smollm2",
        # GSM8K's test file has 1319 rows; its solutions have a thought a line, 3.7 on average.
        data=ReasoningData(source="gsm8k", train_rows=900, test_rows=419, row_tokens=1024),
        model=ReasoningModel(path="smollm2"),
        train=LengthConfig(epochs=1, batch_size=4),
        optimizer=optimizers.options_of("adamw", learning_rate=1e-4, schedule="cosine", warmup=0.1),
        evaluate=AnswersConfig(max_new_tokens=256, generate_rows=64),
    ),
    "SmolLM2-135M learns 900 solutions of GSM8K: this shows the time, not the accuracy",
    SMOKE,
)

QWEN = Preset(
    ReasoningRun(
        preset="epic-qwen2.5-math-7b",
        data=ReasoningData(
            source="openr1",  # OpenR1-Math-220k, default split, 93.7k rows
            test_rows=500,  # unknown: the paper judges by other benchmarks
            row_tokens=32768,
        ),
        condense=CondenseConfig(tau=0.5, policy="edge"),
        model=ReasoningModel(
            path="Qwen/Qwen2.5-Math-7B",
            dtype="bfloat16",
            remat="full",
            rope_theta=300_000.0,
            context=32768,
        ),
        # A batch of 16 rows is inferred from the authors' numbers of steps.
        train=LengthConfig(epochs=3, batch_size=16),
        optimizer=optimizers.options_of(
            "adamw",
            learning_rate=5e-5,
            schedule="linear",
            warmup=0.1,
            b1=0.9,
            b2=0.999,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tp=1),
        evaluate=AnswersConfig(
            max_new_tokens=8192,  # unknown; greedy, where Open-R1 samples up to 32768
            generate_rows=64,
            score_tokens=32768,
        ),
        export_dtype="bfloat16",
    ),
    "Qwen2.5-Math-7B learns OpenR1-Math-220k, as Open-R1's recipe (a slice of accelerators)",
    {**SMOKE, "train.batch_size": 8},
)

PRESETS: dict[str, Preset] = {preset.PRESET.preset: preset for preset in (TINY, GSM8K, QWEN)}
