"""quickstart-documents: pages about fictitious authors and a tiny model, both made in the run.

    python -m train.unlearn quickstart-documents

No download, no data file, no accelerator. Texts of one's own: --data.forget FILES --data.retain
FILES --data.holdout FILES.
"""

from jaxlib_unlearn.objectives import options_of
from train.options import optimizers
from train.options.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UnlearnConfig,
)

SUMMARY = "a tiny model learns 40 pages about fictitious authors and forgets 4 of them"

PRESET = RunConfig(
    preset="quickstart-documents",
    data=DataConfig(source="documents", num_authors=40, holdout_rows=20, max_length=128),
    model=ModelConfig(path="scratch", vocab_size=2048),
    finetune=TrainConfig(
        epochs=60,
        batch_size=16,
        optimizer=optimizers.options_of(
            "adamw", learning_rate=2e-3, schedule="cosine", warmup=0.05, b2=0.98
        ),
    ),
    unlearn=UnlearnConfig(steps=60, batch_size=16, curve_points=8),
    objective=options_of("simnpo", beta=1.0, delta=-0.25, retain="nll"),
    optimizer=optimizers.options_of("adamw", learning_rate=5e-4, schedule="cosine", warmup=0.1),
    evaluate=EvaluateConfig(generate_rows=128),
)
# With twice the steps the recall falls below the oracle's, and NPO loses some of what is kept.
OBJECTIVES = {"simnpo": PRESET.objective}

SMOKE = {
    "finetune.steps": 8,
    "unlearn.steps": 4,
    "unlearn.curve_points": 2,
    "evaluate.max_new_tokens": 24,
}
