"""The presets, one file each.

`PRESET` is a `RunConfig`, `SUMMARY` a line about it, `SMOKE` what `--smoke` shrinks, and
`OBJECTIVES` the options that suit it, by objective.
"""

from types import ModuleType

from train.presets import quickstart, tofu_smollm2

PRESETS: dict[str, ModuleType] = {"quickstart": quickstart, "tofu-smollm2": tofu_smollm2}
