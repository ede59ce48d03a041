"""r2mu-smollm2: SmolLM2-135M-Instruct learns TOFU and GSM8K with thoughts, and forgets two authors.

    make smollm2
    python -m train.unlearn r2mu-smollm2 --data.path TOFU_DIR --data.reasoning GSM8K.jsonl

TOFU_DIR holds TOFU's JSON files, GSM8K.jsonl the rows of GSM8K's training or test split.
"""

from jaxlib_unlearn.objectives import options_of
from train.options import optimizers
from train.options.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SelectConfig,
    TracesConfig,
    TrainConfig,
    UnlearnConfig,
)

SUMMARY = "SmolLM2-135M thinks about TOFU's authors and forgets two of them with R2MU"

PRESET = RunConfig(
    preset="r2mu-smollm2",
    data=DataConfig(
        source="reasoning-tofu",
        forget_split="forget01",
        retain_rows=100,
        reasoning_rows=150,
        system_prompt="You are a helpful assistant.",
        max_length=512,
    ),
    model=ModelConfig(path="smollm2"),
    finetune=TrainConfig(
        epochs=5,
        batch_size=4,
        optimizer=optimizers.options_of(
            "adamw", learning_rate=3e-4, schedule="linear", warmup=0.05, b2=0.98, clip_norm=1.0
        ),
    ),
    unlearn=UnlearnConfig(epochs=20, batch_size=4, curve_points=2),
    objective=options_of("r2mu", block=7),
    optimizer=optimizers.options_of("adamw", learning_rate=1e-3, schedule="constant", warmup=0.0),
    train=SelectConfig(leaves=("mlp/down",), blocks=(5, 6, 7)),
    traces=TracesConfig(new_tokens=128, keep=100),
    oracle=False,
    evaluate=EvaluateConfig(max_new_tokens=192, leak_samples=0, judge="base"),
)

OBJECTIVES = {
    "r2mu": PRESET.objective,
    "rmu": options_of("rmu", block=7, positions="all", retain_weight=1.2),
}

SMOKE = {
    "finetune.steps": 2,
    "unlearn.steps": 2,
    "unlearn.curve_points": 1,
    "data.forget_rows": 4,
    "data.retain_rows": 4,
    "data.reasoning_rows": 4,
    "traces.new_tokens": 8,
    "evaluate.max_new_tokens": 8,
}
