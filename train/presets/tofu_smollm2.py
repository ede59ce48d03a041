"""tofu-smollm2: SmolLM2-135M-Instruct learns a part of TOFU and forgets two authors, on a laptop.

    make smollm2
    python -m train.unlearn tofu-smollm2 --data.path DIR

DIR holds TOFU's JSON files; without it they come from the Hub id locuslab/TOFU.
"""

from jaxlib_unlearn.objectives import ObjectiveConfig
from train.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UnlearnConfig,
)
from train.optimizers import OptimizerConfig

SUMMARY = "SmolLM2-135M learns a part of TOFU and forgets forget01 (about an hour on two cores)"

PRESET = RunConfig(
    preset="tofu-smollm2",
    data=DataConfig(
        source="tofu", forget_split="forget01", retain_rows=100, extra_rows=50, holdout_rows=40
    ),
    model=ModelConfig(path="smollm2"),
    finetune=TrainConfig(
        epochs=8,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup=0.05),
    ),
    unlearn=UnlearnConfig(epochs=8, batch_size=8, curve_points=4),
    objective=ObjectiveConfig(name="asu", temperature=2.3, retain="nll"),
    optimizer=OptimizerConfig(learning_rate=5e-5, schedule="linear", warmup=0.1),
    evaluate=EvaluateConfig(max_new_tokens=72, leak_samples=16, judge="base"),
)

# Options that suit this preset, by objective; others start from their own defaults.
OBJECTIVES = {"asu": PRESET.objective}

SMOKE = {
    "finetune.steps": 4,
    "unlearn.steps": 2,
    "unlearn.curve_points": 1,
    "data.retain_rows": 12,
    "data.extra_rows": 4,
    "data.holdout_rows": 4,
    "evaluate.leak_samples": 2,
    "evaluate.max_new_tokens": 16,
}
