"""The configurations of the programs about text-to-image models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jaxlib_unlearn.options import option
from models.diffusion.schedulers import SAMPLERS
from train.options import optimizers
from train.options.config import (
    CombineConfig,
    ComputeConfig,
    ProgramConfig,
    SelectConfig,
    TrainConfig,
    UnlearnConfig,
    again,
)
from train.options.optimizer_options import AdamW
from train.options.rows import chosen
from train.tasks import erasure as methods

SOURCES = ("fashion", "digits", "shapes", "objects")


@dataclass(frozen=True)
class ImagesConfig:
    """The images, of ten classes with four names each."""

    source: str = option(
        "fashion",
        "`fashion` (Fashion-MNIST), `digits` (scikit-learn's), `shapes` (drawn ones with the names "
        "of clothes) or `objects` (ten classes of ImageNet).",
        choices=SOURCES,
    )
    path: Path | None = option(
        None,
        "a folder of IDX files, of `train` and `test` with a folder of PNG files for each class, "
        "or a `.npz` file; None: Debian's dataset-fashion-mnist.",
    )
    train_rows: int | None = option(
        None, "the first so many images are trained on; None: all.", low=1
    )
    test_rows: int | None = option(
        None, "the first so many of the others are tested on; None: all.", low=2
    )


@dataclass(frozen=True)
class ModelConfig(ComputeConfig):
    """The text-to-image model: its sizes where it is trained from random weights."""

    path: str = option(
        "scratch", "a Stable Diffusion folder as diffusers writes it, or `scratch` (trained here)."
    )
    hidden_size: int = option(64, "width of the text encoder.", low=1)
    num_layers: int = option(2, "its blocks.", low=1)
    num_heads: int = option(4, "attention heads, of the text encoder and the denoiser.", low=1)
    length: int = option(24, "tokens of a prompt, with the first and the end token.", low=3)
    unet_channels: tuple[int, ...] = option((64, 128), "channels of the denoiser by level.")
    vae_channels: tuple[int, ...] = option(
        (16, 32, 32), "channels of the autoencoder by level; each but the first halves the image."
    )
    latent_channels: int = option(4, "channels of its latents.", low=1)
    layers_per_block: int = option(1, "residual blocks of a level, of both.", low=1)
    norm_groups: int = option(8, "groups of a group norm, of both.", low=1)
    kl_weight: float = option(
        1e-4, "factor of the latents' divergence from a standard normal.", low=0
    )
    dropout: float = option(
        0.1, "share of prompts that are dropped in training, for guidance.", low=0, below=1
    )
    remat: str = again(ComputeConfig, "remat", "none")


@dataclass(frozen=True)
class JudgeConfig:
    """The classifier that judges images."""

    path: str = option(
        "scratch",
        "an HF folder of an image classifier that knows the classes by name, or `scratch`.",
    )
    least: float = option(
        0.88, "held-out accuracy below which the run stops; --smoke: no bound.", low=0, high=1
    )
    channels: tuple[int, ...] = option((32, 64), "channels by level.")
    features: int = option(128, "units whose values are compared in Fréchet distances.", low=1)


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn to judge a model."""

    images: int = option(20, "drawn for each kind of prompt and each class.", low=2)
    steps: int = option(25, "of the sampler.", low=1)
    sampler: str = option("ddim", "of the model.", choices=tuple(SAMPLERS))
    guidance: float = option(
        5.0, "w: how far predictions go from the empty prompt's towards the prompt's.", low=0
    )
    rows: int = option(64, "images drawn at once.", low=1)
    shown: int = option(6, "images of each kind on the page.", low=0)


@dataclass(frozen=True)
class ConceptRun(ProgramConfig):
    """What the runs of all four programs have."""

    data: ImagesConfig = ImagesConfig()
    model: ModelConfig = ModelConfig()
    judge: JudgeConfig = JudgeConfig()
    draw: DrawConfig = DrawConfig()


@dataclass(frozen=True)
class DiffuseRun(ConceptRun):
    """A text-to-image model that is trained: its judge, its autoencoder, itself."""

    classifier: TrainConfig = TrainConfig(
        epochs=2, batch_size=64, optimizer=AdamW(learning_rate=1e-3)
    )
    vae: TrainConfig = TrainConfig(
        steps=2000, batch_size=64, optimizer=AdamW(learning_rate=1e-3, schedule="cosine")
    )
    original: TrainConfig = TrainConfig(
        steps=3000, batch_size=64, optimizer=AdamW(learning_rate=1e-3, schedule="cosine")
    )


@dataclass(frozen=True)
class EraseRun(DiffuseRun, CombineConfig):
    """A concept that is erased from a text-to-image model.

    Args:
        run: of train.diffuse, whose models are taken; None: they are made here.
    """

    run: Path | None = None
    erase: methods.Erase = chosen(methods.ERASING, methods.UCE())
    unlearn: UnlearnConfig = UnlearnConfig(steps=300, batch_size=16, curve_points=0)
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS, AdamW(learning_rate=1e-4, schedule="constant")
    )
    train: SelectConfig = SelectConfig(leaves=("attn2",))

    @property
    def title(self) -> str:
        """What its run folder is called, but for the seed."""
        return f"{self.preset}-{self.erase.name}-{self.erase.concept.replace(' ', '-')}"


@dataclass(frozen=True)
class AttackRun(ConceptRun):
    """An attack on a model from which a concept was erased.

    Args:
        run: of train.erase (or of train.defend).
    """

    run: Path | None = None
    attack: methods.Attack = chosen(methods.ATTACKS, methods.SubAttack())
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS,
        AdamW(learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=1e-2),
    )

    @property
    def title(self) -> str:
        """What its run folder is called, but for the seed."""
        return f"{_without_seed(self.run)}-{self.attack.name}"


@dataclass(frozen=True)
class DefendConfig:
    """SubDefense."""

    where: str = option(
        "lookup",
        "`lookup`: every embedding that enters the text encoder is projected; `table`: the "
        "vocabulary alone, which an embedding of no word passes by.",
        choices=("lookup", "table"),
    )
    tokens: int | None = option(None, "K: the first so many tokens; None: all.", low=1)
    skip_special: bool = option(
        False, "leave the first, the end and the padding token as they are."
    )


@dataclass(frozen=True)
class DefendRun(ConceptRun):
    """A model whose token embeddings lose the span of attack tokens.

    Args:
        run: the run that was attacked.
        attack: the run of train.attack whose tokens are taken.
    """

    run: Path | None = None
    attack: Path | None = None
    defend: DefendConfig = DefendConfig()

    @property
    def title(self) -> str:
        """What its run folder is called, but for the seed."""
        return f"{_without_seed(self.run)}-defended"


def _without_seed(run: Path | None) -> str:
    """The name of a run folder without its seed.

    Example:
        >>> _without_seed(Path("runs/fashion-uce-sneaker-seed0-smoke"))
        'fashion-uce-sneaker'
    """
    return "run" if run is None else re.sub(r"-seed\d+(-smoke)?$", "", run.resolve().name)
