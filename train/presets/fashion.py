"""fashion: a small Stable Diffusion of clothes, trained on Fashion-MNIST with captions.

    apt install dataset-fashion-mnist
    python -m train.diffuse fashion
    python -m train.erase runs/fashion-seed0 --erase.concept sneaker --erase.method uce
    python -m train.attack runs/fashion-uce-sneaker-seed0 --attack subattack

A judge, an autoencoder and the model itself are trained in the run, on 28 x 28 pixels with a border
to 32 x 32. `--smoke` draws shapes in the place of clothes and needs no file.
"""

from train.jobs.diffusing.config import DiffuseRun
from train.tasks.erasure import ESD, RECE, UCE

SUMMARY = "a small Stable Diffusion of clothes, trained here"

PRESET = DiffuseRun(preset="fashion")

# Behind a name every token of a short prompt carries it. On drawn shapes, editing the last word's
# state alone (as published for Stable Diffusion) tripled the Fréchet distance of the other classes.
# The 29 prompts of a concept stand against 1044 of the other classes: with weight 10 half as many
# sneakers are left as with 1 (of 20 images 5 and 9), and the other classes are drawn as before.
# RECE: states have 64 entries, and those of a concept's prompts fill many of them; its round as
# published brought 18 of 20 sneakers back.
# ESD: after 300 steps 13 of 20 sneakers were left with guidance 1, none with 3.
ERASE = {
    "uce": UCE(positions="onward", erase_weight=10.0),
    "rece": RECE(positions="onward", again=True),
    "esd": ESD(guidance=3.0),
}

SMOKE = {
    "data.source": "shapes",
    "data.train_rows": 200,
    "data.test_rows": 40,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.unet_channels": (16,),
    "model.vae_channels": (8, 8),
    "model.norm_groups": 4,
    "judge.channels": (8, 8),
    "judge.features": 16,
    "classifier.epochs": 4.0,
    "classifier.batch_size": 20,
    "vae.steps": 8,
    "vae.batch_size": 8,
    "original.steps": 8,
    "original.batch_size": 8,
    "draw.images": 2,
    "draw.steps": 2,
    "draw.rows": 20,
}
