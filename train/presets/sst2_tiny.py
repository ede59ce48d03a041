"""sst2-tiny: the tiny model that was pre-trained here learns the sentiment of film reviews.

    python -m train.pretrain pretrain-tiny
    python -m train.classify sst2-tiny --data.path DIR

DIR holds GLUE's train.tsv and dev.tsv. At the published budget of 40 000 forward passes.
"""

from train.jobs.classification_options import (
    ClassifyData,
    ClassifyModel,
    ClassifyRun,
    ClassifyTrain,
)
from train.options import optimizers
from train.presets import sst2_smollm2

SUMMARY = "an export of pretrain-tiny learns SST-2 at the published budget (minutes on two cores)"

PRESET = ClassifyRun(
    preset="sst2-tiny",
    task="sst2",
    data=ClassifyData(max_length=256),  # its context
    model=ClassifyModel(path="runs/pretrain-tiny-seed0/export"),
    train=ClassifyTrain(forwards=40_000, batch_size=16, curve_points=20),
    optimizer=optimizers.options_of(
        "zo-muon",
        learning_rate=1e-2,
        rank=64,
        refresh=100,
        queries=4,
        schedule="constant",
        warmup=0.0,
    ),
)

# What makes the model that the preset starts from.
MADE_BY = "python -m train.pretrain pretrain-tiny"

# Rates by NLL on the dev rows at 2000 forward passes (tests/bench/classify_table.py --tune); of
# those tried, AdamW's, MeZO's and row-wise directions' are the lowest.
OPTIMIZERS = {
    "adamw": (
        optimizers.options_of("adamw", learning_rate=3e-5, schedule="linear", warmup=0.0),
        {},
    ),
    "mezo": (
        optimizers.options_of("mezo", learning_rate=1e-5, schedule="constant", warmup=0.0),
        {},
    ),
    "subspace-mezo": (
        optimizers.options_of("subspace-mezo", learning_rate=1e-4, schedule="constant", warmup=0.0),
        {},
    ),
    "rowwise": (
        optimizers.options_of("rowwise", learning_rate=1e-5, schedule="constant", warmup=0.0),
        {},
    ),
    "zo-muon": (PRESET.optimizer, {}),
}

SMOKE = sst2_smollm2.SMOKE
