"""The presets, one file each.

`PRESET` is a `RunConfig`, `SUMMARY` one line about it, `SMOKE` the values that `--smoke` sets,
`OBJECTIVES` the options tuned for it, by objective, and `OPTIMIZERS` those by optimizer, each with
the other options that it changes (`unlearn.steps`). `ORIGINAL` and `OTHER_DATA`, where a preset has
them, are its objectives for a given original model and for other rows.
"""

from types import ModuleType

from train.presets import quickstart, tofu_npo_llama3_8b, tofu_npo_llama3_70b, tofu_smollm2

PRESETS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "tofu-smollm2": tofu_smollm2,
    "tofu-npo-llama3-8b": tofu_npo_llama3_8b,
    "tofu-npo-llama3-70b": tofu_npo_llama3_70b,
}
