"""tofu-smollm2: SmolLM2-135M-Instruct learns a part of TOFU and forgets two authors, on a laptop.

    make smollm2
    python -m train.unlearn tofu-smollm2 --data.path DIR

DIR holds TOFU's JSON files; without it they come from the Hub id locuslab/TOFU.
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
)

SUMMARY = "SmolLM2-135M learns a part of TOFU and forgets forget01 (about an hour on two cores)"

PRESET = RunConfig(
    preset="tofu-smollm2",
    data=DataConfig(
        source="tofu",
        forget_split="forget01",
        retain_rows=100,
        extra_rows=50,
        holdout_rows=40,
        system_prompt="You are a helpful assistant.",
        alternates=1,
        alternate_temperature=0.8,
    ),
    model=ModelConfig(path="smollm2"),
    finetune=TrainConfig(
        epochs=5,
        batch_size=4,
        optimizer=optimizers.options_of(
            "adamw", learning_rate=3e-4, schedule="linear", warmup=0.05, b2=0.98, clip_norm=1.0
        ),
    ),
    unlearn=UnlearnConfig(epochs=24, batch_size=8, curve_points=3),
    # One other answer a question, sampled from the model before it learnt the facts, takes the
    # place of the true one, which is pushed down to the NLL of a guess. Learned well, it holds the
    # text together: with three that say different things, at temperature 1, and a stronger push,
    # half of the answers went in circles. The push spares the last four labels, the full stop and
    # the end of the turn: without them every second answer went on until it was cut.
    objective=options_of(
        "alternate", push=0.4, beta=4.0, delta=2.0, spare_end=4, retain="nll", forget_weight=0.4
    ),
    optimizer=optimizers.options_of("adamw", learning_rate=5e-5, schedule="linear", warmup=0.1),
    evaluate=EvaluateConfig(max_new_tokens=72, leak_samples=16, judge="base"),
)

# For --stage.original, a model that knows the facts: no other answers can be sampled from it.
ORIGINAL = options_of("asu")

# Options tuned for this preset, by objective; others start from their own defaults.
# ASU: the middle blocks hold the facts; smoothing the first ones breaks the text before the facts
# (tried for 6 epochs at a rate of 1e-4).
OBJECTIVES = {
    "alternate": PRESET.objective,
    "asu": options_of(
        "asu", temperature=5.0, layers=tuple(range(8, 20)), retain="nll", forget_weight=0.2
    ),
}

SMOKE = {
    "finetune.steps": 2,
    "unlearn.steps": 2,
    "unlearn.batch_size": 4,
    "unlearn.curve_points": 1,
    "data.forget_rows": 4,
    "data.retain_rows": 4,
    "data.judged_retain_rows": 2,
    "data.extra_rows": 2,
    "data.holdout_rows": 2,
    "data.alternates": 1,
    "evaluate.leak_samples": 2,
    "evaluate.max_new_tokens": 8,
}
