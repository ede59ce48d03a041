"""The presets of the programs about text-to-image models: `PRESET`, `SUMMARY`, `SMOKE`."""

from types import ModuleType

from train.presets import fashion, sd14

PRESETS: dict[str, ModuleType] = {"fashion": fashion, "sd14": sd14}
