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
from train.presets import vit_fashion
from train.presets.tuned import at_rate

SUMMARY = "ViT-B/16 of ImageNet-21k learns CIFAR-100 at the published budget (an accelerator)"

# As published (arXiv 2602.17155, its code): 2000 steps, 17 forward passes of 256 images each.
ZO_MUON = at_rate("zo-muon", 1e-2, vector_rate=1e-4, rank=64, refresh=100, queries=16)

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
    "adamw": (at_rate("adamw", 3e-5, "linear"), {}),
    "mezo": (at_rate("mezo", 1e-4), {}),
    "subspace-mezo": (at_rate("subspace-mezo", 1e-4), {}),
    "rowwise": (at_rate("rowwise", 1e-4), {}),
    "hybrid": (at_rate("hybrid", 3e-5, zo_learning_rate=1e-4), {}),
    "zo-muon": (ZO_MUON, {}),
}

SMOKE = {name: value for name, value in vit_fashion.SMOKE.items() if not name.startswith("start")}
