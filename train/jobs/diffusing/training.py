"""Training the parts of a run of train.diffuse: judge, autoencoder, text-to-image model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxlib_unlearn import objectives
from models.diffusion.schedulers import Schedule
from models.diffusion.vae import VAE, VAELearner
from models.files import clip_tokenizer
from models.text.tokenizer import Tokenizer
from train.data import captions
from train.data.images import Pictures as Labelled
from train.data.noisy_latents import NoisyLatents
from train.engine.run import Work, compute, phase, train
from train.jobs.diffusing import drawing, held, judges, judging, prompts
from train.jobs.diffusing.held import Held, Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.streams import Scaled
from train.jobs.job import Started
from train.options.config import replace
from train.options.recipe import recipe_of
from train.runtime.errors import TrainingError
from train.runtime.stages import json_stage
from train.runtime.tracking import say
from train.tasks import pictures
from train.tasks.pictures import Pictures

ORIGINAL = "original"
ENCODED = 64  # images encoded at once


def tokenizer_of(found: Pictures) -> Tokenizer:
    """The tokenizer of the captions: one token a word."""
    return clip_tokenizer.of_words(captions.vocabulary(found.nouns))


def classifier(started: Started) -> Judge:
    """The judge: a classifier trained on the images, or the one at `--judge.path`.

    Raises:
        TrainingError: its accuracy is below `--judge.least`.
    """
    here, config, found, loaded = started.run, started.config, started.rows, started.model
    if loaded.judge is not None:
        return checked(started, loaded.judge)
    assert found.train is not None and found.test is not None
    learner = held.new_judge(config, found.shape, len(found.nouns))
    start: Any = held.random(learner, here.mesh, config.seed).to_host()
    stage = config.classifier
    stream = Labelled(list(found.train.images), found.train.labels, found.shape)
    with phase(here, "classifier"):
        row = objectives.resolve("classes", objectives.LEARNING)
        recipe = recipe_of(stage)
        trained: Any = train(here, "classifier", start, row, {"train": stream}, recipe)
        return checked(started, Judge(trained.to_host()))


def checked(started: Started, judge: Judge) -> Judge:
    """The judge, after a check that it sees the classes of real images.

    Raises:
        TrainingError: its accuracy is below `--judge.least`.
    """
    config, found = started.config, started.rows
    if found.test is None:
        return judge
    right = judge_accuracy(started, judge)
    say(f"classifier: held-out accuracy {right:.3f} on {len(found.test.labels)} images")
    if right < config.judge.least and not config.smoke:
        raise TrainingError(
            f"the judge's held-out accuracy is {right:.3f}, below --judge.least "
            f"{config.judge.least:g}: what it says of images would mean little; raise "
            "--classifier.epochs, or lower the bound"
        )
    return judge


def judge_accuracy(started: Started, judge: Judge) -> float:
    """The share of held-out images whose class the judge sees; it is measured once."""
    here, config, found = started.run, started.config, started.rows
    assert found.test is not None
    inputs = {"judge": judge.identity(), "images": judging.sha_of(found.test.images)}

    def measured() -> float:
        assert found.test is not None
        return judges.accuracy(
            judge, found.test.images, found.test.labels, here.mesh, config.draw.rows
        )

    return json_stage(here.folder / "computed" / "judge.json", inputs, measured)


def autoencoder(started: Started) -> Held:
    """The autoencoder, its latents scaled to unit variance."""
    here, config, found = started.run, started.config, started.rows
    assert found.train is not None
    start: Any = held.random(held.new_vae(config, found.shape), here.mesh, config.seed).to_host()
    stage = config.vae
    stream = Scaled(list(found.train.images), found.train.labels, found.shape)
    with phase(here, "vae"):
        row = objectives.resolve(
            "autoencode", objectives.LEARNING, kl_weight=config.model.kl_weight
        )
        recipe = recipe_of(stage)
        trained: Any = train(here, "vae", start, row, {"train": stream}, recipe)
        few = found.train.images[:2048]
        inputs = {"vae": trained.identity(), "images": judging.sha_of(few)}

        def deviation() -> float:
            latents = drawing.encoded(trained.to_device(), few, ENCODED, here.mesh, "encode images")
            return float(np.std(latents))

        scale = json_stage(here.folder / "computed" / "latents.json", inputs, deviation)
    shape = trained.model.config
    scaled = VAELearner(VAE(replace(shape, scaling_factor=1 / scale), trained.model.remat))
    return trained._replace(learner=scaled).to_host()


def encode_images(work: Work, vae: Any, images: Any) -> dict[str, jax.Array]:
    """The mean latents of all images of a stream."""
    pixels = np.stack(list(images.images))
    found = drawing.encoded(vae.to_device(), pixels, ENCODED, work.mesh, "encode images")
    return {"latents": jax.numpy.asarray(found)}


def original(started: Started, vae: Held) -> Painter:
    """The text encoder and the denoiser, trained together on images and captions."""
    here, config, found = started.run, started.config, started.rows
    assert found.train is not None
    tokenizer = tokenizer_of(found)
    learner = held.new_denoiser(config, vae.model.config, tokenizer.largest_id + 1)
    start: Any = held.random(learner, here.mesh, config.seed).to_host()
    stage, shape = config.original, learner.model.unet.config.latent_shape
    images = Labelled(list(found.train.images), found.train.labels, found.shape)
    with phase(here, "latents"):
        like: Any = held.arrays(latents=(len(images), *shape))
        latents = compute(
            here, "latents", encode_images, kind="encode images", version=1, like=like,
            vae=vae, images=images,
        )  # fmt: skip
    with phase(here, ORIGINAL):
        texts = pictures.captions_of(found, config.seed)
        length = config.model.length
        stream = NoisyLatents(
            np.asarray(latents.params["latents"]),
            {"tokens": prompts.encode(tokenizer, texts, length, "captions").tokens},
            Schedule(),
            config.seed,
            ORIGINAL,
            prompts.encode(tokenizer, [""], length).tokens[0],
            config.model.dropout,
        )
        row = objectives.resolve("denoise", objectives.DENOISING)
        recipe = recipe_of(stage)
        trained: Any = train(here, ORIGINAL, start, row, {"train": stream}, recipe)
    return Painter(trained, vae, Schedule(), tokenizer).to_host()
