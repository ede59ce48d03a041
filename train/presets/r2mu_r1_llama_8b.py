"""r2mu-r1-llama-8b: DeepSeek-R1-Distill-Llama-8B forgets documents, and what it thinks of them.

    python -m train.plan r2mu-r1-llama-8b --topology v5e:2x4            (on any machine)
    python -m train.unlearn r2mu-r1-llama-8b --data.path DIR            (on every host of the slice)

DIR holds forget.jsonl and retain.jsonl: documents (`text`), reasoning to keep (`question`,
`thoughts`, `answer`, topic `reasoning`) and questions to judge by. The values are those of the
authors' code, but for 8 rows a step (one a chip) in place of 4: 500 steps, blocks 5 to 7, block 7,
c = 6.5, retain weight 1.4, a rate of 7.5e-5 with a weight decay of 0.01, traces of 100
tokens (there, the first 100 of 1024 that are generated). Reasoning to keep is cut at 512 tokens
(--data.max-length), as every stream is; there at 150. Its corpora are not part of this repository,
and its weights, gradients and moments are bfloat16: with float32 ones, as here, the same rate moves
every weight, so rate and retain weight may want less.
"""

from jaxlib_unlearn.objectives import options_of
from train.options import optimizers
from train.options.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SelectConfig,
    StageConfig,
    TracesConfig,
    UnlearnConfig,
)
from train.runtime.sharding import MeshConfig

SUMMARY = "DeepSeek-R1-Distill-Llama-8B forgets documents with R2MU (a TPU slice or GPUs)"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

PRESET = RunConfig(
    preset="r2mu-r1-llama-8b",
    seed=42,
    data=DataConfig(source="reasoning", max_length=512),
    model=ModelConfig(path=MODEL, dtype="bfloat16", remat="full"),
    stage=StageConfig(original=MODEL),
    mesh=MeshConfig(data=1, fsdp=-1, tp=1),
    unlearn=UnlearnConfig(steps=500, batch_size=8, curve_points=2),
    objective=options_of("r2mu", block=7, steering=6.5, retain_weight=1.4),
    optimizer=optimizers.options_of(
        "adamw", learning_rate=7.5e-5, schedule="constant", warmup=0.0, b2=0.999, weight_decay=0.01
    ),
    train=SelectConfig(leaves=("mlp/down",), blocks=(5, 6, 7)),
    traces=TracesConfig(segments=1, new_tokens=1024, keep=100),
    oracle=False,
    evaluate=EvaluateConfig(max_new_tokens=2000, leak_samples=0, judge="base"),
    export_dtype="bfloat16",
)

OBJECTIVES = {
    "r2mu": PRESET.objective,
    "rmu": options_of("rmu", block=7, positions="all", retain_weight=1.4),
}

SMOKE = {
    "unlearn.steps": 2,
    "unlearn.curve_points": 1,
    "data.forget_rows": 4,
    "traces.new_tokens": 8,
    "evaluate.max_new_tokens": 8,
}
