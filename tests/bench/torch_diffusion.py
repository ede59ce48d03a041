"""What a user of torch and diffusers would run: the other side of `diffusion.py`.

    python tests/bench/torch_diffusion.py WORK FOLDER   < requests

A separate process with the protocol of `torch_peers.py`. FOLDER is a Stable Diffusion folder, which
diffusers and transformers load as they are. Float32, eager, their own models and attention.
"""

from __future__ import annotations

import sys

import diffusers
import numpy as np
import torch
import transformers
from torch.nn import functional as F
from torch_peers import Data, Work, serve


def train(folder: str, data: Data) -> Work:
    """A step of denoiser and text encoder together, as diffusers' example of text-to-image."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    text = transformers.CLIPTextModel.from_pretrained(f"{folder}/text_encoder").train()
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    optimizer = torch.optim.AdamW(
        [*unet.parameters(), *text.parameters()], fused=True, **data["adamw"]
    )

    def step(batch: Data) -> float:
        latents, noise = (torch.tensor(batch[name]) for name in ("latents", "noise"))
        time, tokens = (torch.tensor(batch[name]) for name in ("time", "tokens"))
        states = text(tokens)[0]
        found = unet(scheduler.add_noise(latents, noise, time), time, states).sample
        loss = F.mse_loss(found, noise)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = batch["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Work(step)


def sample(folder: str, data: Data) -> Work:
    """Guided images by DDIM, from given latents."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def step(request: Data) -> np.ndarray:
        latents = torch.tensor(request["latents"])
        return pipe(data["texts"], latents=latents, output_type="np", **data["how"]).images

    return Work(step, np.ndarray.tolist)


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    serve({"train": train, "sample": sample}, sys.argv[1:])
