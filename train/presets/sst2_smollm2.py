"""sst2-smollm2: SmolLM2-135M-Instruct learns the sentiment of film reviews, all parameters.

    make smollm2
    python -m train.classify sst2-smollm2 --data.path DIR

DIR holds GLUE's train.tsv and dev.tsv; without it they come from the Hub id nyu-mll/glue.
"""

from train.jobs.classification_options import ClassifyModel, ClassifyRun, ClassifyTrain
from train.presets.tuned import at_rate

SUMMARY = "SmolLM2-135M learns SST-2 (about an hour on two cores)"

# Zeroth order as published (arXiv 2602.17155 and its code) but for its rate: constant, no warm-up.
PRESET = ClassifyRun(
    preset="sst2-smollm2",
    task="sst2",
    model=ClassifyModel(path="smollm2"),
    train=ClassifyTrain(forwards=2000, batch_size=16, curve_points=5),
    optimizer=at_rate("zo-muon", 3e-2, rank=64, refresh=100, queries=4),
)

# By optimizer: its options, and the other options that it changes. Rates by NLL on the dev rows at
# 200 forward passes (tests/bench/table.py PRESET --tune): AdamW's the best of its grid, those of
# zeroth order a third of theirs (on vit-fashion the best of a short run was too high for a long
# one). Subspace-MeZO's was not tuned.
OPTIMIZERS = {
    "adamw": (at_rate("adamw", 3e-5, "linear"), {}),
    "mezo": (at_rate("mezo", 1e-5), {}),
    "subspace-mezo": (at_rate("subspace-mezo", 1e-4), {}),
    "rowwise": (at_rate("rowwise", 1e-5), {}),
    "zo-muon": (PRESET.optimizer, {}),
}

SMOKE = {
    "train.forwards": 15,
    "train.batch_size": 4,
    "train.curve_points": 1,
    "data.train_rows": 16,
    "data.dev_rows": 8,
    "data.test_rows": 16,
}
