"""Images of prompts: latents by a sampler with guidance in one scan, then the decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from models.diffusion.denoiser import TEXT, UNET, Diffusion
from models.diffusion.schedulers import Steps, guided, sample
from models.diffusion.vae import VAE, pixels


def draw_latents(
    model: Diffusion,
    params: Any,
    steps: Steps,
    noise: jax.Array,
    embeds: jax.Array,
    empty: jax.Array,
    guidance: jax.Array | float = 7.5,
) -> jax.Array:
    r"""Latents of prompts, guided away from the empty one.

    .. math:: \epsilon = \epsilon_\theta(z_t, t, \emptyset)
        + w\, (\epsilon_\theta(z_t, t, c) - \epsilon_\theta(z_t, t, \emptyset))

    The texts are encoded once; each step is one pass of the denoiser over a batch of 2B.

    Args:
        model: text encoder and denoiser.
        params: the tree of both.
        steps: the table of a sampler that draws no noise of its own.
        noise: standard normal `(B, H, W, C)`; latents are in its dtype.
        embeds: token embeddings of the prompts, `(B, T, d)`.
        empty: token embeddings of the empty prompt, `(T, d)`.
        guidance: w; 1 is the prompt alone. It may be traced.

    Returns:
        Scaled latents `(B, H, W, C)`.

    Example:
        >>> from models.diffusion.clip_text import ClipText, ClipTextConfig
        >>> from models.diffusion.schedulers import Schedule, plan
        >>> from models.diffusion.unet import UNet, UNetConfig
        >>> model = Diffusion(ClipText(ClipTextConfig()), UNet(UNetConfig()))
        >>> steps, x = plan(Schedule(), 50, "ddim"), jnp.zeros((2, 77, 768))
        >>> def draw(params):
        ...     return draw_latents(model, params, steps, jnp.ones((2, 64, 64, 4)), x, x[0])
        >>> jax.eval_shape(draw, model.shapes()).shape
        (2, 64, 64, 4)

    Paper: Ho and Salimans, arXiv:2207.12598, equation 6.
    """
    both = jnp.concatenate([jnp.broadcast_to(empty, embeds.shape), embeds])
    states = model.text.apply_embeds(params[TEXT], both)

    def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
        eps = model.unet.apply(params[UNET], jnp.concatenate([x, x]), time, states)
        # The difference is multiplied by w, so it is taken in the precision of the latents.
        return guided(eps.astype(x.dtype), guidance)

    return sample(steps, denoise, noise)


def draw_images(vae: VAE, params: Any, latents: jax.Array) -> jax.Array:
    """Pixels of latents.

    Args:
        vae: the autoencoder.
        params: its parameters; the encoder's may be left out.
        latents: scaled `(B, h, w, C)`.

    Returns:
        Float32 `(B, factor h, factor w, 3)` from 0 to 1.

    Example:
        >>> from models.diffusion.vae import VAEConfig
        >>> vae = VAE(VAEConfig(8, channels=(4, 8), layers_per_block=1, norm_groups=2))
        >>> draw = lambda params: draw_images(vae, params, jnp.zeros((2, 4, 4, 4)))
        >>> jax.eval_shape(draw, vae.shapes()).shape
        (2, 8, 8, 3)
    """
    return pixels(vae.decode(params, latents).astype(jnp.float32))
