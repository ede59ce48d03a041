"""tofu-smollm2: SmolLM2-135M-Instruct learns a part of TOFU and forgets two authors, on a laptop.

    make smollm2
    python -m train.unlearn tofu-smollm2 --data.path DIR

DIR holds TOFU's JSON files; without it they come from the Hub id locuslab/TOFU.
"""

from jaxlib_unlearn.objectives import options_of
from train.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UnlearnConfig,
)
from train.optimizer_options import AdamW

SUMMARY = "SmolLM2-135M learns a part of TOFU and forgets forget01 (about an hour on two cores)"

PRESET = RunConfig(
    preset="tofu-smollm2",
    data=DataConfig(
        source="tofu",
        forget_split="forget01",
        retain_rows=100,
        extra_rows=50,
        holdout_rows=40,
        system_prompt="You are a helpful assistant.",
    ),
    model=ModelConfig(path="smollm2"),
    finetune=TrainConfig(
        epochs=5,
        batch_size=4,
        optimizer=AdamW(learning_rate=3e-4, schedule="linear", warmup=0.05, b2=0.98, clip_norm=1.0),
    ),
    unlearn=UnlearnConfig(epochs=6, batch_size=8, curve_points=3),
    # The middle blocks hold the facts; smoothing the first ones breaks the text before the facts.
    objective=options_of(
        "asu", temperature=5.0, layers=tuple(range(8, 20)), retain="nll", forget_weight=0.2
    ),
    optimizer=AdamW(learning_rate=1e-4, schedule="linear", warmup=0.1),
    evaluate=EvaluateConfig(max_new_tokens=72, leak_samples=16, judge="base"),
)

# Options tuned for this preset, by objective; others start from their own defaults.
OBJECTIVES = {"asu": PRESET.objective}

SMOKE = {
    "finetune.steps": 2,
    "unlearn.steps": 2,
    "unlearn.curve_points": 1,
    "data.forget_rows": 4,
    "data.retain_rows": 4,
    "data.judged_retain_rows": None,
    "data.extra_rows": 2,
    "data.holdout_rows": 4,
    "evaluate.leak_samples": 2,
    "evaluate.max_new_tokens": 16,
}
