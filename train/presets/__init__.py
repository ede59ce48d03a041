"""The presets, one file each.

`PRESET` is a `RunConfig`, `SUMMARY` one line about it, `SMOKE` the values that `--smoke` sets,
`OBJECTIVES` the options tuned for it, by objective, and `OPTIMIZERS` those by optimizer, each with
the other options that it changes (`unlearn.steps`). `ORIGINAL` and `OTHER_DATA`, where a preset has
them, are its objectives for a given original model and for other rows.
"""

from types import ModuleType

from train.presets import (
    quickstart,
    quickstart_documents,
    r2mu_r1_llama_8b,
    r2mu_r1_qwen_14b,
    r2mu_smollm2,
    r2mu_tiny,
    tofu_npo_llama3_8b,
    tofu_npo_llama3_70b,
    tofu_smollm2,
)

PRESETS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "quickstart-documents": quickstart_documents,
    "tofu-smollm2": tofu_smollm2,
    "tofu-npo-llama3-8b": tofu_npo_llama3_8b,
    "tofu-npo-llama3-70b": tofu_npo_llama3_70b,
    "r2mu-tiny": r2mu_tiny,
    "r2mu-smollm2": r2mu_smollm2,
    "r2mu-r1-llama-8b": r2mu_r1_llama_8b,
    "r2mu-r1-qwen-14b": r2mu_r1_qwen_14b,
}
