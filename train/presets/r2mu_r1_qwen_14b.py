"""r2mu-r1-qwen-14b: DeepSeek-R1-Distill-Qwen-14B forgets documents, and what it thinks of them.

    python -m train.plan r2mu-r1-qwen-14b --topology v5e:4x4            (on any machine)
    python -m train.unlearn r2mu-r1-qwen-14b --data.path DIR            (on every host of the slice)

As r2mu-r1-llama-8b, with another model. What the authors set for this one is unknown: the values
are those of the 8B model, block and blocks too. (Their code would train the seventh parameter of a
block, which is `o` in this family; here it is `mlp/down`, as in the other.)
"""

import dataclasses

from train.presets import r2mu_r1_llama_8b as small

SUMMARY = "DeepSeek-R1-Distill-Qwen-14B forgets documents with R2MU (a TPU slice or GPUs)"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"

PRESET = dataclasses.replace(
    small.PRESET,
    preset="r2mu-r1-qwen-14b",
    model=dataclasses.replace(small.PRESET.model, path=MODEL),
    stage=dataclasses.replace(small.PRESET.stage, original=MODEL),
)

OBJECTIVES = small.OBJECTIVES
SMOKE = small.SMOKE
