"""Programs of a text-to-image model for train.plan: erasing, attacking, sampling, decoding.

They need only the sizes of the model: Stable Diffusion v1.4's, or those of a folder's `config.json`
files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import DENOISING
from jaxlib_unlearn.objectives.denoising import ESD, OTHER, PROMPT
from jaxlib_unlearn.options import option
from models.decoder.model import REMAT
from models.diffusion import schedulers
from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.diffusion.denoiser import NETWORK, TEXT, AttackLearner, Diffusion, DiffusionLearner
from models.diffusion.schedulers import Schedule
from models.diffusion.text_to_image import draw_images, draw_latents
from models.diffusion.unet import UNet, UNetConfig
from models.diffusion.vae import VAE, VAEConfig, VAELearner
from models.files.diffusers_files import read_configs
from models.files.diffusers_parts import with_dtype
from train.costs import flops
from train.data.noisy_latents import NoisyLatents
from train.engine.trainable import trainable_of
from train.options import checks, cli, optimizers, start
from train.options.config import COMPUTE, LengthConfig, SelectConfig
from train.options.recipe import Recipe
from train.options.rows import Rows, chosen
from train.planning.programs import (
    AbstractProgram,
    param_shapes,
    shapes_of,
    step_program,
    update_of,
)
from train.runtime import sharding, suggest
from train.runtime.sharding import MeshConfig

PROGRAMS = ("train", "attack", "sample", "decode")
SD14 = "sd14"
SPECIAL = 2  # tokens of CLIP that stand for the start and the end of a text
# Multiplications and additions of one image's forward pass, as XLA counts them (those with the
# padding of convolutions left out) in the same network in float32, written without loops.
COUNTED = {"UNet": 790e9, "VAE decoder": 2505e9}

OBJECTIVE = Rows(
    DENOISING,
    lambda name, **given: objectives.options_of(name, DENOISING, **given),
    lambda options, name: objectives.options_of(name, DENOISING),
    lambda row, name, value, prefix: objectives.not_used(row, name),
)


@dataclass(frozen=True)
class SizesConfig:
    """The sizes of the model."""

    path: str = option(
        SD14,
        "a folder as diffusers writes it, of which the `config.json` files are read, or `sd14`: "
        "Stable Diffusion v1.4.",
    )
    dtype: str = option(
        "bfloat16",
        "dtype of the computation, `float32` or `bfloat16`; parameters stay float32.",
        choices=COMPUTE,
    )
    remat: str = option(
        "full",
        "what a backward pass recomputes of each residual block and each transformer: `none`, "
        "`dots`, `full`.",
        choices=tuple(REMAT),
    )


@dataclass(frozen=True)
class StepConfig:
    """A step that erases a concept."""

    batch_size: int = option(8, "global rows of each stream in a step.", low=1)
    accumulate: int = option(1, "micro-batches that a step is split into.", low=1)


@dataclass(frozen=True)
class AttackConfig:
    """A step of an attack, which trains the network of one token."""

    batch_size: int = option(6, "global rows of a step.", low=1)
    accumulate: int = option(1, "micro-batches that a step is split into.", low=1)
    tokens: int = option(5, "K, the most tokens that are learned one after another.", low=1)
    hidden: int = option(100, "units of the network of coefficients.", low=1)


@dataclass(frozen=True)
class SampleConfig:
    """Options of the images that are drawn at once."""

    images: int = option(8, "B, the images of a batch; with guidance the denoiser reads 2B.", low=1)
    steps: int = option(50, "of the sampler.", low=1)
    sampler: str = option(
        "ddim",
        "`ddim`, `pndm` (one call more than there are steps) or `lms`.",
        choices=tuple(schedulers.SAMPLERS),
    )


@dataclass(frozen=True)
class DiffusionPlanConfig:
    """Programs of a text-to-image model, and the devices to plan them for.

    Args:
        preset: the name of the preset that this configuration started from.
        topology: a TPU slice `v5e:2x2`, `cpu:4`, or `gpu:4`.
        json: whether to print one JSON object and nothing else.
    """

    preset: str = ""
    model: SizesConfig = SizesConfig()
    objective: objectives.Options = chosen(OBJECTIVE, ESD())
    optimizer: optimizers.Options = chosen(optimizers.ROWS, optimizers.options_of("adamw"))
    combine: str = option(
        "sum",
        "how the gradients of the forget and the retain side become one: sum, blur, pcgrad.",
        words=tuple(optimizers.COMBINERS),
    )
    train: SelectConfig = SelectConfig(("attn2",))
    erase: StepConfig = StepConfig()
    attack: AttackConfig = AttackConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    topology: str = ""
    programs: tuple[str, ...] = option(
        PROGRAMS, "which programs to compile: train, attack, sample, decode.", words=PROGRAMS
    )
    json: bool = False


class Preset(NamedTuple):
    """A configuration, and a line about it."""

    PRESET: DiffusionPlanConfig
    SUMMARY: str


PRESETS: Mapping[str, Preset] = {
    # Six rows do not divide over four chips: two groups of two chips take three rows each.
    SD14: Preset(
        DiffusionPlanConfig(SD14, mesh=MeshConfig(data=-1, fsdp=1, tp=2)),
        "Stable Diffusion v1.4: an ESD step, an attack step, guided samples, their images",
    )
}


def read_arguments(
    argv: list[str], cls: type[DiffusionPlanConfig] = DiffusionPlanConfig, program: str = ""
) -> DiffusionPlanConfig:
    """The configuration of a command line: a preset, with overrides."""
    preset, default, rest, prog, summary = start.start_of(argv, cls, PRESETS, program)
    default = start.with_optimizer(default, rest, preset)
    return cli.parse(cls, default, rest, prog, summary)


class Models(NamedTuple):
    """A text-to-image model without its weights."""

    denoiser: Diffusion
    vae: VAE

    @property
    def heads(self) -> int:
        """The fewest heads of a layer that `tp` splits."""
        return min(self.denoiser.text.config.num_heads, self.denoiser.unet.config.num_heads)


def models_of(config: DiffusionPlanConfig) -> Models:
    """The models of a configuration, without their weights.

    Raises:
        UserError: a folder that is not there, or whose configurations do not make a model.
    """
    m = config.model
    if m.path == SD14:
        found = {"text_encoder": ClipTextConfig(), "unet": UNetConfig(), "vae": VAEConfig()}
        found = {name: with_dtype(part, m.dtype) for name, part in found.items()}
    else:
        found = read_configs(m.path, dtype=m.dtype)
    text, unet = ClipText(found["text_encoder"], m.remat), UNet(found["unet"], m.remat)
    return Models(Diffusion(text, unet), VAE(found["vae"], m.remat))


def name_of(config: DiffusionPlanConfig) -> str:
    """The model and its dtype, for people."""
    path = "Stable Diffusion v1.4" if config.model.path == SD14 else config.model.path
    return f"{path} in {config.model.dtype}"


def check(config: DiffusionPlanConfig) -> None:
    """Raise `UserError` for options that are wrong on any devices."""
    checks.check_numbers(config)
    for name in config.programs:
        suggest.check_choice("--programs", name, PROGRAMS)
    if not config.programs:
        raise UserError(f"--programs is empty; choose from {', '.join(PROGRAMS)}")
    if config.train.leaves == ():
        raise UserError("--train.leaves is empty; leave it out for the cross-attention alone")
    schedulers.plan(Schedule(), config.sample.steps, config.sample.sampler)
    models = models_of(config)
    width = models.denoiser.text.config.hidden_size
    if config.attack.tokens >= width:
        raise UserError(
            f"--attack.tokens {config.attack.tokens}: tokens are orthogonal, and embeddings of "
            f"width {width} have room for {width - 1} beside the concept; give fewer"
        )


def noisy_rows(models: Models, *columns: str) -> NoisyLatents:
    """A stream of one row, in the shapes that the model reads."""
    unet, length = models.denoiser.unet.config, models.denoiser.text.config.num_positions
    shapes = {PROMPT: (1, length), OTHER: (1, length), "place": (1,)}
    arrays = {name: np.zeros(shapes[name], np.int32) for name in columns}
    return NoisyLatents(np.zeros((1, *unet.latent_shape), np.float32), arrays, Schedule())


def _rows(models: Models, rows: int) -> str:
    side = models.denoiser.unet.config.sample_size
    return f"{rows} rows of {side} x {side} latents"


def erasing_program(config: DiffusionPlanConfig, models: Models, mesh: Mesh) -> AbstractProgram:
    """One step that erases a concept.

    Raises:
        UserError: the batch does not divide over the mesh, or options that do not go together.
    """
    row, options = objectives.resolve(config.objective, DENOISING)
    learner, rows = DiffusionLearner(models.denoiser), config.erase.batch_size
    stage = LengthConfig(batch_size=rows, accumulate=config.erase.accumulate)
    recipe = Recipe(stage, config.optimizer, config.combine, select=config.train)
    checks.check_recipe(recipe, (row, options), mesh, "erasing")
    checks.check_model(recipe, (row, options), learner)
    streams = {
        name: noisy_rows(models, *(c for c in (PROMPT, OTHER) if c in row.columns[name]))
        for name in row.streams
    }
    params = param_shapes(learner, mesh, learner.rules)
    made = trainable_of(params, row, select=config.train, dtype=learner.dtype)
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(made.start)) / 1e6
    return step_program(
        learner,
        (row, options),
        optimizers.over_rows(config.optimizer, rows),
        made,
        {name: shapes_of(stream, rows, mesh) for name, stream in streams.items()},
        mesh,
        f"a step of {row.name} that trains {trained:.1f} M parameters, {len(streams)} x "
        + _rows(models, rows),
        combine=config.combine,
        accumulate=config.erase.accumulate,
    )


def erasing_update(
    config: DiffusionPlanConfig, models: Models, mesh: Mesh
) -> tuple[Any, tuple] | None:
    """The optimizer's update alone and its shapes, as `programs.update_program`."""
    row, _ = objectives.resolve(config.objective, DENOISING)
    learner = DiffusionLearner(models.denoiser)
    params = param_shapes(learner, mesh, learner.rules)
    made = trainable_of(params, row, select=config.train, dtype=learner.dtype)
    optimizer = optimizers.over_rows(config.optimizer, config.erase.batch_size)
    return update_of(optimizer, config.combine, made.start, mesh)


def attack_program(config: DiffusionPlanConfig, models: Models, mesh: Mesh) -> AbstractProgram:
    """One step of the network that makes a token; nothing of the model is trained.

    Raises:
        UserError: the batch does not divide over the mesh.
    """
    attack, row = config.attack, objectives.resolve("denoise", DENOISING)
    sharding.check_batch(mesh, attack.batch_size, attack.accumulate, "attack")
    learner = AttackLearner(
        models.denoiser,
        words=models.denoiser.text.config.vocab_size - SPECIAL,
        hidden=attack.hidden,
        tokens=attack.tokens,
    )
    params = param_shapes(learner, mesh, learner.rules)
    stream = noisy_rows(models, PROMPT, "place")
    program = step_program(
        learner,
        row,
        optimizers.options_of("adamw"),
        trainable_of(params, row[0], select=SelectConfig((NETWORK,)), dtype=learner.dtype),
        {"train": shapes_of(stream, attack.batch_size, mesh)},
        mesh,
        f"a step of the network of a token over {learner.words} words, "
        + _rows(models, attack.batch_size),
        accumulate=attack.accumulate,
    )
    return dataclasses.replace(program, name="attack")


def sample_program(config: DiffusionPlanConfig, models: Models, mesh: Mesh) -> AbstractProgram:
    """Latents of prompts, with guidance.

    Raises:
        UserError: the images do not divide over the mesh.
    """
    s, where, whole = config.sample, sharding.batch_sharding(mesh), NamedSharding(mesh, P())
    sharding.check_batch(mesh, s.images, 1, "sample")
    model = models.denoiser
    steps = schedulers.plan(Schedule(), s.steps, s.sampler)
    length = model.text.config.num_positions

    def draw(params, noise, tokens, empty, guidance):
        given, nothing = (model.text.embed(params[TEXT], ids) for ids in (tokens, empty))
        return draw_latents(model, params, steps, noise, given, nothing, guidance)

    args = (
        param_shapes(model, mesh, DiffusionLearner.rules),
        jax.ShapeDtypeStruct(
            (s.images, *model.unet.config.latent_shape), jnp.float32, sharding=where
        ),
        jax.ShapeDtypeStruct((s.images, length), jnp.int32, sharding=where),
        jax.ShapeDtypeStruct((length,), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    )
    calls = len(steps.times)
    return AbstractProgram(
        "sample",
        jax.jit(draw, out_shardings=where),
        args,
        f"{s.images} samples of {s.steps} steps of {s.sampler}, {calls} passes over "
        + _rows(models, 2 * s.images),
    )


def decode_program(config: DiffusionPlanConfig, models: Models, mesh: Mesh) -> AbstractProgram:
    """Images of latents.

    Raises:
        UserError: the images do not divide over the mesh.
    """
    count, vae = config.sample.images, models.vae
    sharding.check_batch(mesh, count, 1, "sample")
    where = sharding.batch_sharding(mesh)
    params = param_shapes(vae, mesh, VAELearner.rules)
    latent = models.denoiser.unet.config.latent_shape
    side = latent[0] * vae.config.factor
    return AbstractProgram(
        "decode",
        jax.jit(lambda params, latents: draw_images(vae, params, latents), out_shardings=where),
        (
            {name: params[name] for name in ("post_quant_conv", "decoder")},
            jax.ShapeDtypeStruct((count, *latent), jnp.float32, sharding=where),
        ),
        f"{count} images of {side} x {side}",
    )


MAKE = {
    "train": erasing_program,
    "attack": attack_program,
    "sample": sample_program,
    "decode": decode_program,
}


def forward_work(models: Models) -> dict[str, dict[str, Any]]:
    """Operations of one row's forward passes: ours, and for the sizes of v1.4 XLA's count."""
    text, unet, vae = models.denoiser.text, models.denoiser.unet, models.vae
    latents = jax.ShapeDtypeStruct((1, *unet.config.latent_shape), jnp.float32)
    states = jax.ShapeDtypeStruct(
        (1, text.config.num_positions, text.config.hidden_size), jnp.float32
    )
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    done = {
        "UNet": flops.flops(unet.apply, unet.shapes(), latents, time, states),
        "VAE decoder": flops.flops(vae.decode, vae.shapes(), latents),
    }
    same = {
        "UNet": with_dtype(unet.config, "float32") == UNetConfig(),
        "VAE decoder": with_dtype(vae.config, "float32") == VAEConfig(),
    }
    return {
        name: {"flops": work, "counted": COUNTED[name] if same[name] else None}
        for name, work in done.items()
    }
