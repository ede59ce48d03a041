"""tofu-npo-llama3-8b: Llama-3-8B learns TOFU and forgets a tenth of it with NPO, on a TPU slice.

    python -m train.plan tofu-npo-llama3-8b --topology v5e:8x8      (on any machine)
    python -m train.unlearn tofu-npo-llama3-8b                      (on every host of the slice)

The weights are gated on the Hub: accept their licence and log in, or give --model.path a folder.
"""

from jaxlib_unlearn.objectives import options_of
from train.options import optimizers
from train.options.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UnlearnConfig,
    replace,
)
from train.options.optimizers import other
from train.runtime.sharding import MeshConfig

SUMMARY = "Llama-3-8B learns TOFU and forgets a tenth of it with NPO (a TPU slice or GPUs)"

PRESET = RunConfig(
    preset="tofu-npo-llama3-8b",
    # The official sizes: all retain rows, 400 of them judged, 100 real authors, 117 facts.
    data=DataConfig(
        source="tofu",
        forget_split="forget10",
        retain_split="retain90",
        retain_rows=None,
        judged_retain_rows=400,
        extra_rows=None,
        holdout_rows=400,
        max_length=512,
    ),
    model=ModelConfig(path="meta-llama/Meta-Llama-3-8B-Instruct", dtype="bfloat16", remat="full"),
    # Parameters, gradients and optimizer state split over every chip.
    mesh=MeshConfig(data=1, fsdp=-1, tp=1),
    finetune=TrainConfig(
        epochs=5,
        batch_size=64,
        optimizer=optimizers.options_of("adamw", learning_rate=1e-5, schedule="linear", warmup=0.1),
    ),
    unlearn=UnlearnConfig(epochs=10, batch_size=64),
    objective=options_of("npo", retain="nll"),
    optimizer=optimizers.options_of("adamw", learning_rate=1e-5, schedule="linear", warmup=0.1),
    evaluate=EvaluateConfig(max_new_tokens=200, score_tokens=65536, generate_rows=256),
    export_dtype="bfloat16",
)

OBJECTIVES = {"npo": PRESET.objective}

# Their matrix products use bfloat16 on accelerators in any case.
OPTIMIZERS = {
    name: (replace(other(PRESET.optimizer, name), comm_dtype="bfloat16"), {})
    for name in ("muon", "teon")
}

SMOKE = {
    "finetune.steps": 4,
    "unlearn.steps": 2,
    "unlearn.curve_points": 1,
    "data.forget_rows": 4,
    "data.retain_rows": 4,
    "data.judged_retain_rows": None,
    "data.extra_rows": 2,
    "data.holdout_rows": 4,
    "evaluate.leak_samples": 2,
    "evaluate.max_new_tokens": 16,
}
