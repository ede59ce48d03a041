"""A small convolutional network, the judge of image models: it tells classes of images apart, and
the distance of two sets of images is that of its features."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layout
from models.decoder.layers import Linear
from models.diffusion.layers import Conv, abstract, draw
from models.learner import CLASSES, AskedClassifier, PlainLearner

Params = Mapping[str, Any]

RULES: layout.Rules = (
    (r"conv_\d+/kernel$", ("fsdp", None)),
    (r"hidden/kernel$", ("fsdp", "tp")),
    (r"head/kernel$", ("fsdp", None)),
    (r"bias$", ()),
)


@dataclass(frozen=True)
class CNNConfig:
    """Shape of the network: a convolution and a halving of both sides for each of `channels`, then
    a hidden layer whose units are the features, then the classes."""

    image_size: int
    colours: int
    num_classes: int
    channels: tuple[int, ...] = (32, 64)
    features: int = 128
    dtype: str = "float32"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and colours of an image."""
        return self.image_size, self.image_size, self.colours


@dataclass(frozen=True)
class CNN:
    r"""The network as pure functions of `params`.

    .. math::
        x_{i+1} = \mathrm{pool}(\max(x_i * K_i + b_i, 0)), \qquad
        f = \max(W x_n + b, 0), \qquad z = H f + h

    Args:
        config: the shape.

    Raises:
        ValueError: the sides cannot be halved that often.

    Example:
        >>> cnn = CNN(CNNConfig(8, 1, 10))
        >>> jax.eval_shape(cnn.logits, cnn.shapes(), jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)

    LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """

    config: CNNConfig

    def __post_init__(self):
        c, times = self.config, 2 ** len(self.config.channels)
        if c.image_size % times:
            raise ValueError(f"{times} does not divide images of side {c.image_size}")

    def shapes(self) -> dict[str, Any]:
        """The parameter tree as float32 `jax.ShapeDtypeStruct`s."""
        return _abstract(self.config)[1]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters: kernels `N(0, 1 / in)`, biases and head 0."""
        return draw(key, self.shapes(), ("head",))

    def features(self, params: Params, images: jax.Array) -> jax.Array:
        """The units before the classes.

        Args:
            params: the parameter tree.
            images: `(B, H, W, C)`, uint8 pixels, or floats from -1 to 1.

        Returns:
            `(B, features)`, not negative.

        Raises:
            ValueError: images of another shape.
        """
        return self._run(params, images)[0]

    def logits(self, params: Params, images: jax.Array) -> jax.Array:
        """Logits of the classes, float32 `(B, num_classes)`; arguments as in `features`."""
        return self._run(params, images)[1]

    def _run(self, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        if images.shape[1:] != c.image_shape:
            raise ValueError(f"images are {images.shape[1:]}, the model reads {c.image_shape}")
        if images.dtype == jnp.uint8:
            images = images / jnp.float32(127.5) - 1
        return nnx.merge(_abstract(c)[0], params)(images.astype(c.dtype))


@functools.lru_cache(maxsize=64)
def _abstract(config: CNNConfig) -> tuple[Any, Any]:
    return abstract(lambda: _Network(config))


class _Network(nnx.Module):
    def __init__(self, c: CNNConfig):
        before = (c.colours, *c.channels)
        for i, (size_in, size_out) in enumerate(zip(before, c.channels, strict=False)):
            setattr(self, f"conv_{i}", Conv(size_in, size_out))
        side = c.image_size // 2 ** len(c.channels)
        self.hidden = Linear(side * side * before[-1], c.features, True)
        self.head = Linear(c.features, c.num_classes, True)
        self.depth = len(c.channels)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for i in range(self.depth):
            x = jax.nn.relu(getattr(self, f"conv_{i}")(x))
            rows, height, width, channels = x.shape
            x = x.reshape(rows, height // 2, 2, width // 2, 2, channels).max((2, 4))
        features = jax.nn.relu(self.hidden(x.reshape(len(x), -1))).astype(jnp.float32)
        return features, self.head(features)


@dataclass(frozen=True)
class CNNLearner(PlainLearner):
    """The network as the trainer sees it, see `models.learner.Learner`.

    Args:
        model: the network.
    """

    model: CNN
    answers = frozenset((CLASSES,))
    rules = RULES

    @property
    def sizes(self) -> Mapping[str, int]:
        """Number of features and classes."""
        return {"hidden": self.model.config.features, "classes": self.model.config.num_classes}

    def ask(self, params: Any, together: Any = ()) -> Any:
        """The network as objectives ask it."""
        del together
        return AskedClassifier(functools.partial(self.model.logits, params))
