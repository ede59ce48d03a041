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
from train.options.rows import chosen
from train.tasks import erasure as methods

SOURCES = ("fashion", "digits", "shapes", "objects")


@dataclass(frozen=True)
class ImagesConfig:
    """The images, of ten classes with four names each."""

    source: str = option(
        "fashion",
        "The images: `fashion` (Fashion-MNIST), `digits` (scikit-learn's), `shapes` (drawn ones "
        "with the names of clothes) or `objects` (ten classes of ImageNet).",
        choices=SOURCES,
    )
    path: Path | None = option(
        None,
        "A folder of IDX files, a folder with `train` and `test` that each have a folder of PNG "
        "files for each class, or a `.npz` file; None: Debian's dataset-fashion-mnist.",
    )
    train_rows: int | None = option(
        None, "The model is trained on this many images from the start; None: all.", low=1
    )
    test_rows: int | None = option(
        None, "The model is tested on this many of the others from the start; None: all.", low=2
    )


@dataclass(frozen=True)
class ModelConfig(ComputeConfig):
    """The text-to-image model: its sizes where it is trained from random weights."""

    path: str = option(
        "scratch", "A Stable Diffusion folder as diffusers writes it, or `scratch` (trained here)."
    )
    hidden_size: int = option(
        64, "The hidden states of the text encoder have this many entries.", low=1
    )
    num_layers: int = option(2, "The text encoder has this many blocks.", low=1)
    num_heads: int = option(
        4, "The text encoder and the denoiser have this many attention heads.", low=1
    )
    length: int = option(
        24, "A prompt has this many tokens, including the first and the end token.", low=3
    )
    unet_channels: tuple[int, ...] = option(
        (64, 128), "The levels of the denoiser have this many channels."
    )
    vae_channels: tuple[int, ...] = option(
        (16, 32, 32),
        "The levels of the autoencoder have this many channels; each level but the first halves "
        "the image.",
    )
    latent_channels: int = option(
        4, "The latents of the autoencoder have this many channels.", low=1
    )
    layers_per_block: int = option(
        1, "A level of either model has this many residual blocks.", low=1
    )
    norm_groups: int = option(8, "A group norm of either model has this many groups.", low=1)
    kl_weight: float = option(
        1e-4, "The latents' divergence from a standard normal has this factor.", low=0
    )
    dropout: float = option(
        0.1, "This share of the prompts is dropped in training, for guidance.", low=0, below=1
    )
    remat: str = again(ComputeConfig, "remat", "none")


@dataclass(frozen=True)
class JudgeConfig:
    """The classifier that judges images."""

    path: str = option(
        "scratch",
        "An HF folder of an image classifier that knows the classes by name, or `scratch` "
        "(trained here).",
    )
    least: float = option(
        0.88,
        "The run stops when the held-out accuracy is below this; --smoke: no bound.",
        low=0,
        high=1,
    )
    channels: tuple[int, ...] = option(
        (32, 64), "The levels of the classifier have this many channels."
    )
    features: int = option(128, "Fréchet distances compare the values of this many units.", low=1)


@dataclass(frozen=True)
class DrawConfig:
    """The options of drawing images to judge a model."""

    images: int = option(
        20, "This many images are drawn for each kind of prompt and each class.", low=2
    )
    steps: int = option(25, "The sampler takes this many steps.", low=1)
    sampler: str = option("ddim", "The sampler that draws the images.", choices=tuple(SAMPLERS))
    guidance: float = option(
        5.0,
        "w: predictions move this many times the way from the empty prompt's to the prompt's.",
        low=0,
    )
    rows: int = option(64, "This many images are drawn at once.", low=1)
    shown: int = option(6, "The page shows this many images of each kind.", low=0)


@dataclass(frozen=True)
class ConceptRun(ProgramConfig):
    """The options that the runs of all four programs have."""

    data: ImagesConfig = ImagesConfig()
    model: ModelConfig = ModelConfig()
    judge: JudgeConfig = JudgeConfig()
    draw: DrawConfig = DrawConfig()


@dataclass(frozen=True)
class DiffuseRun(ConceptRun):
    """The training of a text-to-image model with its judge and its autoencoder."""

    classifier: TrainConfig = TrainConfig(
        epochs=2, batch_size=64, optimizer=optimizers.options_of("adamw", learning_rate=1e-3)
    )
    vae: TrainConfig = TrainConfig(
        steps=2000,
        batch_size=64,
        optimizer=optimizers.options_of("adamw", learning_rate=1e-3, schedule="cosine"),
    )
    original: TrainConfig = TrainConfig(
        steps=3000,
        batch_size=64,
        optimizer=optimizers.options_of("adamw", learning_rate=1e-3, schedule="cosine"),
    )


@dataclass(frozen=True)
class EraseRun(DiffuseRun, CombineConfig):
    """A concept that is erased from a text-to-image model.

    Args:
        run: the run of train.diffuse whose models are taken; None: they are made here.
    """

    run: Path | None = None
    erase: methods.Erase = chosen(methods.ERASING, methods.UCE())
    unlearn: UnlearnConfig = UnlearnConfig(steps=300, batch_size=16, curve_points=0)
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS, optimizers.options_of("adamw", learning_rate=1e-4, schedule="constant")
    )
    train: SelectConfig = SelectConfig(leaves=("attn2",))

    @property
    def title(self) -> str:
        """The name of its run folder without the seed."""
        return f"{self.preset}-{self.erase.name}-{self.erase.concept.replace(' ', '-')}"


@dataclass(frozen=True)
class AttackRun(ConceptRun):
    """An attack on a model from which a concept was erased.

    Args:
        run: the run of train.erase (or of train.defend) that is attacked.
    """

    run: Path | None = None
    attack: methods.Attack = chosen(methods.ATTACKS, methods.SubAttack())
    optimizer: optimizers.Options = chosen(
        optimizers.ROWS,
        optimizers.options_of(
            "adamw", learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=1e-2
        ),
    )

    @property
    def title(self) -> str:
        """The name of its run folder without the seed."""
        return f"{_without_seed(self.run)}-{self.attack.name}"


@dataclass(frozen=True)
class DefendConfig:
    """Options of SubDefense."""

    where: str = option(
        "lookup",
        "`lookup`: every embedding that enters the text encoder is projected; `table`: only the "
        "vocabulary is, which does not stop an embedding that is no word's.",
        choices=("lookup", "table"),
    )
    tokens: int | None = option(
        None, "K: this many tokens from the start of the attack are used; None: all.", low=1
    )
    skip_special: bool = option(False, "The first, the end and the padding token stay as they are.")


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
        """The name of its run folder without the seed."""
        return f"{_without_seed(self.run)}-defended"


def _without_seed(run: Path | None) -> str:
    """The name of a run folder without its seed.

    Example:
        >>> _without_seed(Path("runs/fashion-uce-sneaker-seed0-smoke"))
        'fashion-uce-sneaker'
    """
    return "run" if run is None else re.sub(r"-seed\d+(-smoke)?$", "", run.resolve().name)
