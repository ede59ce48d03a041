"""The presets, one file each: `PRESET` (a `RunConfig`), `SUMMARY` (a line), `SMOKE` (what `--smoke` shrinks)."""

from types import ModuleType

from train.presets import quickstart, tofu_smollm2

PRESETS: dict[str, ModuleType] = {"quickstart": quickstart, "tofu-smollm2": tofu_smollm2}
