"""Text-to-image models in folders: read, and written as diffusers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.diffusion.clip_text import ClipText
from models.diffusion.denoiser import TEXT, UNET, Diffusion, DiffusionLearner
from models.diffusion.unet import UNet
from models.diffusion.vae import VAE, VAELearner
from models.files import diffusers_files
from models.files.diffusers_files import Pipeline
from train.engine import exports
from train.jobs.diffusing import held
from train.jobs.diffusing.held import Held, Painter
from train.options.config import replace
from train.runtime import cards, distributed, seal, sharding


def given(path: str | Path, config: Any, mesh: Any) -> Painter:
    """The text-to-image model of a Stable Diffusion folder.

    Raises:
        UserError: it cannot be read, or has changed since it was exported.
    """
    distributed.of_first(lambda: seal.check(Path(path).expanduser()))
    rules = {TEXT: DiffusionLearner.rules, UNET: DiffusionLearner.rules, "vae": VAELearner.rules}

    def where(name: str, shape: tuple[int, ...]) -> Any:
        part = name.partition("/")[0]
        return sharding.sharding_of(name, shape, mesh, rules[part])

    m = config.model
    with distributed.together():
        found = diffusers_files.load(path, dtype="float32", shardings=where)
    configs_ = {name: replace(shape, dtype=m.dtype) for name, shape in found.configs.items()}
    vae = VAELearner(VAE(configs_["vae"], m.remat))
    model = Diffusion(ClipText(configs_[TEXT], m.remat), UNet(configs_[UNET], m.remat))
    params = {TEXT: found.params[TEXT], UNET: found.params[UNET]}
    assert found.tokenizer is not None
    return Painter(
        Held(DiffusionLearner(model), params, held.params_sha256(params)),
        Held(vae, found.params["vae"], held.params_sha256(found.params["vae"])),
        found.scheduler,
        found.tokenizer,
    ).to_host()


def export_painter(painter: Painter, target: Path, dtype: str, what: str) -> None:
    """Write a model as a folder that diffusers reads, unless it is there already.

    Args:
        painter: the model.
        target: the folder.
        dtype: the dtype of its tensors.
        what: a sentence on its origin, for its card.
    """
    text = cards.of_diffusion(what, painter.sha)

    def write() -> None:
        there = painter.to_device()
        model = there.denoiser.model
        parts = {TEXT: model.text.config, UNET: model.unet.config, "vae": there.vae.model.config}
        shapes = {name: replace(shape, dtype="float32") for name, shape in parts.items()}
        weights = {**there.denoiser.params, "vae": there.vae.params}
        whole = Pipeline(shapes, weights, painter.schedule, painter.tokenizer)
        diffusers_files.export(whole, target, dtype=dtype, card=lambda _: text)

    made_from = f"{painter.sha} {painter.vae.sha} {dtype}"
    exports.sealed(target, made_from, [text, painter.identity()["vae"]], write)
