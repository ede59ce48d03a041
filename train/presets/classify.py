"""The presets of `train.classify`, one file each: `PRESET`, `SUMMARY`, `SMOKE`, `OPTIMIZERS`."""

from types import ModuleType

from train.presets import (
    sst2_opt_1_3b,
    sst2_opt_13b,
    sst2_smollm2,
    sst2_tiny,
    vit_b16_cifar100,
    vit_fashion,
)

PRESETS: dict[str, ModuleType] = {
    "sst2-tiny": sst2_tiny,
    "sst2-smollm2": sst2_smollm2,
    "sst2-opt-1.3b": sst2_opt_1_3b,
    "sst2-opt-13b": sst2_opt_13b,
    "vit-fashion": vit_fashion,
    "vit-b16-cifar100": vit_b16_cifar100,
}
