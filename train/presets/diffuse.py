"""The presets of the programs about text-to-image models: `PRESET`, `SUMMARY`, `SMOKE`.

`ERASE`, where a preset has it: the options tuned for it, by method.
"""

from types import ModuleType

from train.presets import fashion, sd14

PRESETS: dict[str, ModuleType] = {"fashion": fashion, "sd14": sd14}
