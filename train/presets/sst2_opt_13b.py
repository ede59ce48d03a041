"""sst2-opt-13b: as sst2-opt-1.3b, with OPT-13B.

python -m train.classify sst2-opt-13b     (on every host of a slice)
"""

from train.options.config import replace
from train.presets import sst2_opt_1_3b as small
from train.runtime.sharding import MeshConfig

SUMMARY = "OPT-13B, else as sst2-opt-1.3b (several accelerators)"

PRESET = replace(
    small.PRESET,
    **{
        "preset": "sst2-opt-13b",
        "model.path": "facebook/opt-13b",
        # Parameters split over every chip.
        "mesh": MeshConfig(data=1, fsdp=-1, tp=1),
    },
)

OPTIMIZERS = small.OPTIMIZERS

SMOKE = small.SMOKE
