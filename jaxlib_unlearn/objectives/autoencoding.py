r"""Learning to encode: images through latents that are nearly normal, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_unlearn.losses import upcast
from jaxlib_unlearn.objectives.base import Objective, Options, Terms, named
from jaxlib_unlearn.objectives.context import Batch, Context
from jaxlib_unlearn.options import option


@dataclasses.dataclass(frozen=True)
class Autoencode(Options):
    """Options of ``autoencode``."""

    name: str = named("autoencode")
    kl_weight: float = option(
        1e-6, "The latents' divergence from a standard normal has this factor; 1e-6 is published.",
        low=0, wanted="0 or more",
    )  # fmt: skip


def autoencode(context: Context, batches: Mapping[str, Batch], options: Autoencode) -> Terms:
    r"""Squared error of an image that went through its latents, and their divergence.

    .. math::
        L = E \lVert x - D(\mu + \sigma \epsilon) \rVert^2 / n
          + k\, E \tfrac12 \sum_i (\mu_i^2 + \sigma_i^2 - 1 - \log \sigma_i^2) / n

    with n the entries of an image. The model answers ``encode(batch)``, mean and logarithm of the
    variance ``(B, ..)``, and ``decode(latents)``, images like ``batch["image"]``, from -1 to 1. The
    noise of a row is that of seed, step and ``row_id``.

    Kingma & Welling, arXiv:1312.6114; the weights of the two parts as in latent diffusion.
    """
    batch = batches["train"]
    model: Any = context.model
    mean, logvar = map(upcast, model.encode(batch))
    keys = context.row_keys(batch, "latents")
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    found = upcast(model.decode(mean + jnp.exp(logvar / 2) * noise))
    image = upcast(batch["image"])
    axes = tuple(range(1, image.ndim))
    entries = image[0].size
    error = jnp.sum(jnp.square(found - image), axes) / entries
    divergence = jnp.sum(
        (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2, tuple(range(1, mean.ndim))
    )
    rows = jnp.asarray(len(image), jnp.float32)
    return {"train": (jnp.sum(error + options.kl_weight * divergence / entries), rows)}


ROWS = (
    Objective(
        name="autoencode",
        loss=autoencode,
        streams=("train",),
        columns={"train": ("image",)},
        reference={},
        forward={},
        additive=True,
        paper="Kingma & Welling 2014, arXiv 1312.6114",
        options=Autoencode,
        summary="squared error of images through latents, and the latents' divergence",
        asks={"train": ("latents",)},
    ),
)
