"""sd14: Stable Diffusion v1.4 from a folder as diffusers writes it.

    python -m train.diffuse sd14 --model.path DIR --data.path IMAGES
    python -m train.erase sd14 --model.path DIR --data.path IMAGES --erase.concept church

Nothing is downloaded. IMAGES has a folder of images of one size for each of ten classes of ImageNet
(`--data.source objects`): the judge is trained on these, and distances are measured to them.
"""

from train.jobs.diffusing.config import DiffuseRun
from train.options.config import replace

SUMMARY = "Stable Diffusion v1.4 from a folder (--model.path), for accelerators"

PRESET = replace(
    DiffuseRun(preset="sd14"),
    **{
        "data.source": "objects",
        "model.path": "stable-diffusion-v1-4",
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "draw.steps": 50,
        "draw.sampler": "lms",
        "draw.guidance": 7.5,
        "draw.rows": 4,
    },
)

SMOKE = {
    "data.train_rows": 200,
    "data.test_rows": 40,
    "classifier.epochs": 1.0,
    "draw.images": 2,
    "draw.steps": 2,
    "draw.rows": 20,
}
