"""sst2-opt-1.3b: OPT-1.3B learns SST-2 at the published budget, on one accelerator.

python -m train.classify sst2-opt-1.3b
"""

from train.options.config import replace
from train.presets import sst2_smollm2
from train.presets.tuned import at_rate

SUMMARY = "OPT-1.3B learns SST-2 as published (an accelerator)"

PRESET = replace(
    sst2_smollm2.PRESET,
    **{
        "preset": "sst2-opt-1.3b",
        "model.path": "facebook/opt-1.3b",
        "model.dtype": "bfloat16",
        "train.forwards": 40_000,
        "train.curve_points": 20,
        "optimizer.learning_rate": 1e-2,
        "export_dtype": "bfloat16",
    },
)

# The published rates (arXiv 2602.17155, its code). A step of AdamW counts as three forward passes:
# its published 625 steps are a budget of 1875.
OPTIMIZERS = {
    "adamw": (
        at_rate("adamw", 1e-5, "linear"),
        {"train.batch_size": 8, "train.forwards": 1875},
    ),
    "mezo": (at_rate("mezo", 1e-7), {}),
    "zo-muon": (PRESET.optimizer, {}),
}

SMOKE = sst2_smollm2.SMOKE
