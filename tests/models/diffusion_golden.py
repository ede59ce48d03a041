"""Outputs of diffusers' networks, kept so that they can be compared with where torch is not there.

Weights and inputs are drawn by NumPy from the names of tensors, so only outputs are kept. To make
them anew, with torch and diffusers installed: python tests/models/diffusion_golden.py
"""

import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("diffusion_golden.safetensors")
# The smallest configurations with every kind of block, as diffusers names what is in them.
UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 32,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of a file; norms and biases are far from 1 and 0, so that each matters."""
    draw = np.random.default_rng([0, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) > 1:
        return (draw / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (0.3 * draw + ("norm" in name and name.endswith("weight"))).astype(np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Latents, times (one of them fractional), text states and images, float64."""
    draw = np.random.default_rng(1)
    return {
        "latents": draw.standard_normal((2, 16, 16, 4)),
        "times": np.array([7.0, 978.6]),
        "context": draw.standard_normal((2, 5, 24)),
        "images": draw.uniform(-1, 1, (1, 32, 32, 3)),
        "coded": draw.standard_normal((1, 4, 4, 4)),
    }


def params(shapes, name_of, at: str = "") -> dict:
    """The same weights as a tree; kernels are `(in, out)` and `(height, width, in, out)`.

    Args:
        shapes: of the tree, a nested dict.
        name_of: a leaf's path -> its name in files.
        at: path of the tree itself.
    """
    found = {}
    for key, value in shapes.items():
        path = f"{at}/{key}".lstrip("/")
        if isinstance(value, dict):
            found[key] = params(value, name_of, path)
            continue
        # (height, width, in, out) here, (out, in, height, width) there.
        order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[len(value.shape)]
        stored = weight(name_of(path), tuple(value.shape[axis] for axis in order))
        found[key] = stored.transpose(np.argsort(order))
    return found


def made() -> tuple:
    """diffusers' denoiser and autoencoder with these weights.

    The embedding of times is computed in the dtype of the model; diffusers' own is float32 always.
    """
    import diffusers
    import torch

    class Sinusoid(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = [model]

        def forward(self, times):
            half = self.model[0].config.block_out_channels[0] // 2
            steps = torch.arange(half, dtype=self.model[0].dtype)
            frequencies = torch.exp(-np.log(10000) * steps / half)
            angles = times.to(frequencies.dtype)[:, None] * frequencies
            return torch.cat([torch.cos(angles), torch.sin(angles)], -1)

    models = diffusers.UNet2DConditionModel(**UNET), diffusers.AutoencoderKL(**VAE)
    models[0].time_proj = Sinusoid(models[0])
    for model in models:
        model.load_state_dict(
            {
                name: torch.as_tensor(weight(name, tuple(value.shape)))
                for name, value in model.state_dict().items()
            }
        )
        model.eval()
    return models


def outputs(unet, vae, dtype: str) -> dict[str, np.ndarray]:
    """What they make of the inputs, `(B, H, W, C)`."""
    import torch

    kind = getattr(torch, dtype)
    unet.to(kind), vae.to(kind)
    given = {
        name: torch.as_tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).to(kind)
        for name, x in inputs().items()
    }
    with torch.no_grad():
        coded = vae.encode(given["images"]).latent_dist
        found = {
            "noise": unet(given["latents"], given["times"], given["context"]).sample,
            "mean": coded.mean,
            "logvar": coded.logvar,
            "decoded": vae.decode(given["coded"] / VAE["scaling_factor"]).sample,
        }
    return {
        name: np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)) for name, x in found.items()
    }


if __name__ == "__main__":
    from safetensors.numpy import save_file

    save_file(outputs(*made(), "float64"), FILE)
