"""r2mu-tiny: a model made in the run thinks about invented authors, and forgets some with R2MU.

    python -m train.unlearn r2mu-tiny

No download, no data file, no accelerator. --objective.name rmu, --objective.cot-weight 0 (R2MU-v0),
--objective.reflection-penalty 1 (RTP) and --evaluate.think-start "<think></think>" (ZeroThink) are
what the paper compares with; tests/bench/table.py r2mu runs them all. On one core the original
takes two to three minutes and a method one.
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

SUMMARY = "a small model writes thoughts about 40 invented authors and forgets 8 with R2MU"

# Words that its thoughts begin with, as entries of the tokenizer that is trained in the run.
WORDS = ("Okay", "Hmm", "Wait")

PRESET = RunConfig(
    preset="r2mu-tiny",
    data=DataConfig(source="reasoning-authors", num_authors=40, retain_rows=48, max_length=256),
    model=ModelConfig(
        path="scratch",
        vocab_size=1024,
        split_digits=True,
        hidden_size=192,
        intermediate_size=640,
        num_layers=4,
        num_heads=6,
        num_kv_heads=3,
    ),
    finetune=TrainConfig(
        epochs=16,
        batch_size=16,
        optimizer=optimizers.options_of(
            "adamw", learning_rate=2e-3, schedule="cosine", warmup=0.05, b2=0.98
        ),
    ),
    unlearn=UnlearnConfig(steps=100, batch_size=16, curve_points=4),
    objective=options_of(
        "r2mu",
        block=2,
        steering=12.0,
        retain_weight=1.2,
        cot_weight=5.0,
        reflection_words=WORDS,
    ),
    optimizer=optimizers.options_of("adamw", learning_rate=1e-3, schedule="constant", warmup=0.0),
    train=SelectConfig(leaves=("mlp/down",), blocks=(0, 1, 2)),
    # Its thoughts have no trigger: they are all that it has learnt to write.
    traces=TracesConfig(new_tokens=96, keep=96, trigger="", tag="<think>\n"),
    evaluate=EvaluateConfig(max_new_tokens=96, leak_samples=8, generate_rows=128),
)

# Hidden states of block 2 have a norm of about 17. In a first run RMU left half of the answers
# right at the published 6.5 and a third at 12; R2MU does as well with either.
OBJECTIVES = {
    "r2mu": PRESET.objective,
    "rmu": options_of(
        "rmu", block=2, steering=12.0, positions="all", retain_weight=1.2, reflection_words=WORDS
    ),
}

SMOKE = {
    "data.num_authors": 10,
    "model.hidden_size": 48,
    "model.intermediate_size": 96,
    "model.num_layers": 3,
    "finetune.steps": 8,
    "unlearn.steps": 4,
    "unlearn.curve_points": 1,
    "traces.new_tokens": 24,
    "evaluate.leak_samples": 2,
    "evaluate.max_new_tokens": 24,
}
