"""The models of a run: a judge of images, an autoencoder, and a text-to-image denoiser."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.diffusion.denoiser import Diffusion, DiffusionLearner
from models.diffusion.schedulers import Schedule
from models.diffusion.unet import UNet, UNetConfig
from models.diffusion.vae import VAE, VAEConfig, VAELearner
from models.learner import PlainLearner
from models.text.tokenizer import Tokenizer
from models.vision.cnn import CNN, CNNConfig, CNNLearner
from train.options.config import to_json
from train.runtime import residency, sharding
from train.runtime.checkpointing import params_sha256


class Held(NamedTuple):
    """A model of any kind as runs hold it.

    Args:
        learner: the learner that trains it.
        params: its parameters.
        sha: the sha256 of the parameters.
    """

    learner: Any
    params: Any
    sha: str

    @property
    def model(self) -> Any:
        """Its pure functions."""
        return self.learner.model

    def identity(self) -> dict[str, Any]:
        """The inputs that its answers depend on, as JSON values."""
        model = self.learner.identity()
        return {
            "params": self.sha,
            "model": to_json(model) if dataclasses.is_dataclass(model) else model,
        }

    def to_host(self) -> Held:
        """The model with its parameters in host memory."""
        return self._replace(params=residency.to_host(self.params))

    def to_device(self) -> Held:
        """The model with its parameters in device memory."""
        return self._replace(params=residency.to_device(self.params))


class Painter(NamedTuple):
    """A text-to-image model with all that it takes to draw.

    Args:
        denoiser: the text encoder and the denoiser.
        vae: the autoencoder.
        schedule: the schedule of the noise.
        tokenizer: the tokenizer of prompts.
    """

    denoiser: Held
    vae: Held
    schedule: Schedule
    tokenizer: Tokenizer

    @property
    def learner(self) -> Any:
        """The learner of the denoiser."""
        return self.denoiser.learner

    @property
    def sha(self) -> str:
        """The sha256 of the denoiser's parameters."""
        return self.denoiser.sha

    @property
    def params(self) -> Any:
        """The parameters of the denoiser."""
        return self.denoiser.params

    @property
    def length(self) -> int:
        """The number of tokens of a prompt."""
        return self.denoiser.model.text.config.num_positions

    def identity(self) -> dict[str, Any]:
        """The inputs that its images depend on, as JSON values."""
        return {
            "denoiser": self.denoiser.identity(),
            "vae": self.vae.identity(),
            "schedule": dataclasses.asdict(self.schedule),
            "tokenizer": self.tokenizer.backend.to_str(),
        }

    def to_host(self) -> Painter:
        """The models with their parameters in host memory."""
        return self._replace(denoiser=self.denoiser.to_host(), vae=self.vae.to_host())

    def to_device(self) -> Painter:
        """The models with their parameters in device memory."""
        return self._replace(denoiser=self.denoiser.to_device(), vae=self.vae.to_device())


@dataclasses.dataclass(frozen=True)
class ArraysLearner(PlainLearner):
    """The learner of untrained arrays that are stored like a model, whole on every device."""

    rules = ((r"", ()),)


def arrays(**shapes: tuple[int, ...]) -> Held:
    """A stand-in for arrays still to be computed, the `like` of `train.engine.run.compute`."""
    made = {name: jax.numpy.zeros(shape, "float32") for name, shape in shapes.items()}
    return Held(ArraysLearner(None), made, "")


def random(learner: Any, mesh: Any, seed: int) -> Held:
    """A model with random weights, laid out on the mesh."""
    params = sharding.put_params(_init(learner.model, jax.random.key(seed)), mesh, learner.rules)
    return Held(learner, params, params_sha256(params))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Any, key: jax.Array) -> Any:
    return model.init(key)


def placed(learner: Any, params: Any, mesh: Any) -> Held:
    """A model with given weights, laid out on the mesh."""
    params = sharding.put_params(params, mesh, learner.rules)
    return Held(learner, params, params_sha256(params))


def new_judge(config: Any, shape: tuple[int, int, int], classes: int) -> CNNLearner:
    """The classifier of images of `--judge.*`.

    Raises:
        ValueError: the sizes do not go together.
    """
    channels = tuple(config.judge.channels)
    return CNNLearner(CNN(CNNConfig(shape[0], shape[2], classes, channels, config.judge.features)))


def new_vae(config: Any, shape: tuple[int, int, int]) -> VAELearner:
    """The autoencoder of `--model.*`.

    Raises:
        ValueError: the sizes do not go together.
    """
    m = config.model
    shape_ = VAEConfig(
        sample_size=shape[0],
        in_channels=shape[2],
        out_channels=shape[2],
        latent_channels=m.latent_channels,
        channels=tuple(m.vae_channels),
        layers_per_block=m.layers_per_block,
        norm_groups=m.norm_groups,
        scaling_factor=1.0,
        dtype=m.dtype,
    )
    return VAELearner(VAE(shape_, m.remat))


def new_denoiser(config: Any, vae: VAEConfig, vocab_size: int) -> DiffusionLearner:
    """The text encoder and the denoiser of `--model.*`.

    Raises:
        ValueError: the sizes do not go together.
    """
    m = config.model
    text = ClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=4 * m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_positions=m.length,
        dtype=m.dtype,
    )
    unet = UNetConfig(
        sample_size=vae.sample_size // vae.factor,
        in_channels=vae.latent_channels,
        out_channels=vae.latent_channels,
        channels=tuple(m.unet_channels),
        attends=(True,) * len(m.unet_channels),
        layers_per_block=m.layers_per_block,
        num_heads=m.num_heads,
        cross_attention_dim=m.hidden_size,
        norm_groups=m.norm_groups,
        dtype=m.dtype,
    )
    return DiffusionLearner(Diffusion(ClipText(text, m.remat), UNet(unet, m.remat)))
