"""Images that a text-to-image model draws: prompts in batches of one shape, guided, decoded.

One program serves all prompts: the embedding at a placeholder, and the span that a defence takes
out of all embeddings, are arguments, zeros where there is none. Noise belongs to the seed and to
the number of an image, so two models draw the same number from the same noise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn.concepts import project
from models.diffusion import schedulers
from models.diffusion.denoiser import TEXT, Diffusion
from models.diffusion.schedulers import Schedule
from models.diffusion.text_to_image import draw_images, draw_latents
from models.diffusion.vae import VAE
from train.jobs.diffusing import prompts
from train.jobs.diffusing.batched import batched
from train.jobs.diffusing.held import Painter


@dataclass(frozen=True)
class How:
    """The static options for which a drawing program is compiled."""

    model: Diffusion
    vae: VAE
    schedule: Schedule
    steps: int
    sampler: str
    spare: tuple[int, ...] = ()  # tokens that a defence leaves as they are


class Shield(NamedTuple):
    """A defence at the look-up.

    Args:
        basis: orthonormal columns, `(d, K)`.
        spare: the ids of tokens that stay as they are.
    """

    basis: np.ndarray
    spare: tuple[int, ...] = ()


class Wanted(NamedTuple):
    """Images to draw.

    Args:
        texts: the prompts, one an image.
        numbers: the numbers of the images, which determine their noise.
        embeddings: `(N, d)`, the embedding at the placeholder of each; None: there are none.
    """

    texts: Sequence[str]
    numbers: Sequence[int]
    embeddings: np.ndarray | None = None


@functools.partial(jax.jit, static_argnums=0)
def _latents(
    how: How, params: Any, batch: Any, empty: Any, basis: Any, seed: Any, guidance: Any
) -> jax.Array:
    """Latents `(B, h, w, C)` of a batch of prompts."""
    unet = how.model.unet.config
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(batch["number"])
    noise = jax.vmap(lambda key: jax.random.normal(key, unet.latent_shape))(keys)

    def embedded(tokens, place, learned):
        here = (jnp.arange(tokens.shape[1]) == place[:, None])[..., None]
        embeds = how.model.text.embed(params[TEXT], tokens)
        embeds = jnp.where(here, learned[:, None].astype(embeds.dtype), embeds)
        shut = project(embeds, basis)
        free = jnp.isin(tokens, jnp.asarray(how.spare, jnp.int32)) if how.spare else False
        return jnp.where((jnp.asarray(free) & ~here[..., 0])[..., None], embeds, shut)

    given = embedded(batch["tokens"], batch["place"], batch["embedding"])
    nothing = embedded(empty, jnp.full(1, -1), jnp.zeros((1, given.shape[-1])))
    steps = schedulers.plan(how.schedule, how.steps, how.sampler)
    return draw_latents(how.model, params, steps, noise, given, nothing[0], guidance)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(vae: VAE, params: Any, latents: jax.Array) -> jax.Array:
    """uint8 pixels."""
    return jnp.round(255 * draw_images(vae, params, latents)).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(vae: VAE, params: Any, images: jax.Array) -> jax.Array:
    """Mean latents, scaled, of uint8 pixels."""
    mean, logvar = vae.encode(params, images / jnp.float32(127.5) - 1)
    return vae.sample(mean, logvar, jnp.zeros_like(mean))


def drawn(
    painter: Painter,
    wanted: Wanted,
    draw: Any,
    mesh: Any,
    *,
    seed: int,
    shield: Shield | None = None,
    label: str = "",
    decode: bool = True,
) -> np.ndarray:
    """The images that a model draws for prompts, uint8 `(N, H, W, C)`, or their float32 latents.

    Args:
        painter: the model.
        wanted: the images.
        draw: the options `--draw.*`.
        mesh: the devices.
        seed: the seed of the noise.
        shield: the defence at the look-up, if any.
        label: the label of the progress.
        decode: whether latents become images.
    """
    painter = painter.to_device()
    model, vae = painter.denoiser.model, painter.vae.model
    spare = () if shield is None else shield.spare
    how = How(model, vae, painter.schedule, draw.steps, draw.sampler, spare)
    width, count = model.text.config.hidden_size, len(wanted.texts)
    rows = prompts.encode(painter.tokenizer, wanted.texts, painter.length, label)
    empty = prompts.encode(painter.tokenizer, [""], painter.length).tokens
    basis = np.zeros((width, 1), np.float32) if shield is None else shield.basis
    embeddings = wanted.embeddings
    if embeddings is None:
        embeddings = np.zeros((count, width), np.float32)
    columns = {
        "tokens": rows.tokens,
        "place": rows.place,
        "embedding": np.asarray(embeddings, np.float32),
        "number": np.asarray(wanted.numbers, np.int32),
    }
    guidance = jnp.float32(draw.guidance)

    def compute(batch: Any) -> jax.Array:
        latents = _latents(how, painter.denoiser.params, batch, empty, basis, seed, guidance)
        return _decoded(vae, painter.vae.params, latents) if decode else latents

    def read(mine: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x[mine] for name, x in columns.items()}

    return batched(count, draw.rows, mesh, label, read, compute)


def encoded(vae: Any, images: np.ndarray, rows: int, mesh: Any, label: str) -> np.ndarray:
    """The mean latents of images, scaled, float32 `(N, h, w, C)`."""
    vae = vae.to_device()

    def compute(batch: Any) -> jax.Array:
        return _encoded(vae.model, vae.params, batch["image"]).astype(jnp.float32)

    return batched(len(images), rows, mesh, label, lambda mine: {"image": images[mine]}, compute)
