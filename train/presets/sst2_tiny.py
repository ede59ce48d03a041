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
from train.presets import sst2_smollm2
from train.presets.tuned import at_rate

SUMMARY = "an export of pretrain-tiny learns SST-2 at the published budget (minutes on two cores)"

PRESET = ClassifyRun(
    preset="sst2-tiny",
    task="sst2",
    data=ClassifyData(max_length=256),  # its context
    model=ClassifyModel(path="runs/pretrain-tiny-seed0/export"),
    train=ClassifyTrain(forwards=40_000, batch_size=16, curve_points=20),
    optimizer=at_rate("zo-muon", 1e-2, rank=64, refresh=100, queries=4),
)

# What makes the model that the preset starts from.
MADE_BY = "python -m train.pretrain pretrain-tiny"

# Rates by NLL on the dev rows at 2000 forward passes (tests/bench/table.py PRESET --tune); of
# those tried, AdamW's, MeZO's and row-wise directions' are the lowest.
OPTIMIZERS = {
    "adamw": (at_rate("adamw", 3e-5, "linear"), {}),
    "mezo": (at_rate("mezo", 1e-5), {}),
    "subspace-mezo": (at_rate("subspace-mezo", 1e-4), {}),
    "rowwise": (at_rate("rowwise", 1e-5), {}),
    "zo-muon": (PRESET.optimizer, {}),
}

SMOKE = sst2_smollm2.SMOKE
