"""sst2-tiny: the tiny model that was pre-trained here learns the sentiment of film reviews.

    python -m train.pretrain pretrain-tiny
    python -m train.classify sst2-tiny --data.path DIR

DIR holds GLUE's train.tsv and dev.tsv. At the published budget of 40 000 forward passes.
"""

from train.options.config import replace
from train.presets import sst2_smollm2

SUMMARY = "an export of pretrain-tiny learns SST-2 at the published budget (minutes on two cores)"

PRESET = replace(
    sst2_smollm2.PRESET,
    **{
        "preset": "sst2-tiny",
        "data.max_length": 256,  # its context
        "model.path": "runs/pretrain-tiny-seed0/export",
        "train.forwards": 40_000,
        "train.curve_points": 20,
        "optimizer.learning_rate": 1e-2,
    },
)

# What makes the model that the preset starts from.
MADE_BY = "python -m train.pretrain pretrain-tiny"

# Rates by NLL on the dev rows at 2000 forward passes (tests/bench/table.py PRESET --tune); of
# those tried, AdamW's, MeZO's and row-wise directions' are the lowest.
OPTIMIZERS = sst2_smollm2.OPTIMIZERS | {"zo-muon": (PRESET.optimizer, {})}

SMOKE = sst2_smollm2.SMOKE
