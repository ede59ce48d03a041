"""vit-b16-cifar100: ViT-B/16, pre-trained on ImageNet-21k, learns CIFAR-100.

    python -m train.classify vit-b16-cifar100 --model.path ViT-B_16.npz --data.path FOLDER

FOLDER has the folders train and test, each with a folder of PNG files for every class. The model is
the published .npz file, or the Hugging Face folder of google/vit-base-patch16-224-in21k.
"""

from train.jobs.classification_options import (
    ClassifyData,
    ClassifyModel,
    ClassifyRun,
    ClassifyTrain,
)
from train.options import optimizers
from train.presets import vit_fashion

SUMMARY = "ViT-B/16 of ImageNet-21k learns CIFAR-100 at the published budget (an accelerator)"

# As published (arXiv 2602.17155, its code): 2000 steps, 17 forward passes of 256 images each.
ZO_MUON = optimizers.options_of(
    "zo-muon",
    learning_rate=1e-2,
    vector_rate=1e-4,
    rank=64,
    refresh=100,
    queries=16,
    schedule="constant",
    warmup=0.0,
)

PRESET = ClassifyRun(
    preset="vit-b16-cifar100",
    task="images",
    data=ClassifyData(train_rows=None, resize=True),
    model=ClassifyModel(path="ViT-B_16.npz"),
    train=ClassifyTrain(forwards=34_000, batch_size=256, curve_points=10),
    optimizer=ZO_MUON,
)

# The rates of zeroth order are the published ones (row-wise directions have MeZO's), not tuned.
OPTIMIZERS = {
    "adamw": (
        optimizers.options_of("adamw", learning_rate=3e-5, schedule="linear", warmup=0.0),
        {},
    ),
    "mezo": (
        optimizers.options_of("mezo", learning_rate=1e-4, schedule="constant", warmup=0.0),
        {},
    ),
    "subspace-mezo": (
        optimizers.options_of("subspace-mezo", learning_rate=1e-4, schedule="constant", warmup=0.0),
        {},
    ),
    "rowwise": (
        optimizers.options_of("rowwise", learning_rate=1e-4, schedule="constant", warmup=0.0),
        {},
    ),
    "hybrid": (
        optimizers.options_of(
            "hybrid", learning_rate=3e-5, zo_learning_rate=1e-4, schedule="constant", warmup=0.0
        ),
        {},
    ),
    "zo-muon": (ZO_MUON, {}),
}

SMOKE = {name: value for name, value in vit_fashion.SMOKE.items() if not name.startswith("start")}
