"""tofu-npo-llama3-70b: as tofu-npo-llama3-8b, with Llama-3-70B.

python -m train.plan tofu-npo-llama3-70b --topology v5p:8x8x8   (on any machine)
python -m train.unlearn tofu-npo-llama3-70b                     (on every host of the slice)
"""

from train.options.config import replace
from train.presets import tofu_npo_llama3_8b as small

SUMMARY = "Llama-3-70B, else as tofu-npo-llama3-8b (a large TPU slice)"

PRESET = replace(
    small.PRESET,
    **{
        "preset": "tofu-npo-llama3-70b",
        "model.path": "meta-llama/Meta-Llama-3-70B-Instruct",
        "finetune.batch_size": 512,
        "unlearn.batch_size": 512,
    },
)

OBJECTIVES = small.OBJECTIVES

OPTIMIZERS = small.OPTIMIZERS

SMOKE = small.SMOKE
