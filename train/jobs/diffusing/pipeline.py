"""The parts of a run of train.diffuse, in the order in which it calls them; the other programs
about text-to-image models begin and end with the same ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.diffusion.clip_text import ClipText
from models.diffusion.denoiser import TEXT, UNET, Diffusion, DiffusionLearner
from models.diffusion.schedulers import Schedule
from models.diffusion.unet import UNet
from models.diffusion.vae import VAE, VAELearner
from models.files import clip_tokenizer, diffusers_files
from models.files.diffusers_files import Pipeline
from models.text.tokenizer import Tokenizer
from train.data import captions
from train.data.images import Pictures as Labelled
from train.data.noisy_latents import NoisyLatents
from train.engine import exports
from train.engine.run import Recipe, Run, Work, compute, num_steps, phase, started, train
from train.evaluators import evaluation
from train.jobs.diffusing import drawing, held, judges, judging, prompts
from train.jobs.diffusing.config import ConceptRun, DiffuseRun
from train.jobs.diffusing.held import Held, Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Asked, Shown
from train.jobs.diffusing.streams import Scaled
from train.options import checks, optimizers
from train.options import config as configs
from train.options.config import TrainConfig, run_folder
from train.options.roles import Roles
from train.reporting import ending
from train.runtime import cards, distributed, folder, remote, reporters, seal, sharding
from train.runtime.errors import TrainingError
from train.runtime.stages import json_stage
from train.runtime.tracking import Tracker, say
from train.tasks import pictures
from train.tasks.pictures import Pictures

ORIGINAL = "original"
ENCODED = 64  # images encoded at once


class Opened(NamedTuple):
    """A run at its start.

    Args:
        run: its folder, which is held.
        config: its configuration.
        pictures: the images, and the classes in words.
        loaded: the models that it takes from elsewhere.
    """

    run: Run
    config: Any
    pictures: Pictures
    loaded: Any = None


@contextlib.contextmanager
def opened(
    config: ConceptRun,
    program: str,
    roles: Roles,
    check: Callable[[Any, Any, Pictures], None],
    load: Callable[[Any, Any, Pictures], Any],
) -> Iterator[Opened]:
    """Find everything that can be wrong, then make or enter the run folder, and hold it.

    Args:
        config: the configuration.
        program: its name, for the report.
        roles: of the models.
        check: `check(config, mesh, pictures)`: what the program checks of its own.
        load: `load(config, mesh, pictures)`: the models that it takes from elsewhere.

    Raises:
        UserError: anything about the configuration, the data or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as entered:
        distributed.start(config.distributed)
        distributed.check_same(identity(config))
        with distributed.together():
            checks.check_numbers(config)
            reporters.check(reporters.chosen(config.report_to))
            checks.check_places(config)
            mesh = sharding.make_mesh(config.mesh)
            place = folder.run_place(run_folder(config), identity(config))
            folder.claim(place, entered)
            found = pictures.load(config.data, multiple_of(config))
            check(config, mesh, found)
        loaded = load(config, mesh, found)
        root = folder.enter(place, entered)
        tracker = Tracker(root, reporters.chosen(config.report_to), identity(config))
        about = {"roles": roles._asdict(), "evaluators": ["concept"], "program": program}
        notes = [f"Images: {found.place}."]
        run = Run(root, mesh, config.seed, tracker, config.stage.cache, notes, about)
        say(f"{config.preset}: {found.place}, seed {config.seed}, run folder {remote.home(root)}")
        yield Opened(started(run, since), config, found, loaded)


def identity(config: Any) -> dict[str, Any]:
    """What `config.json` holds."""
    return configs.identity(config, "stage.cache")


def multiple_of(config: Any) -> int:
    """What divides the side of an image that all levels can halve."""
    m = config.model
    if m.path != "scratch":
        return 1
    return 2 ** max(len(m.vae_channels) + len(m.unet_channels) - 2, len(config.judge.channels))


def check(config: DiffuseRun, mesh: Any, found: Pictures) -> None:
    """Raise `UserError` for stages that cannot be, or sizes that do not go together."""
    rows = []
    if config.judge.path == "scratch":
        rows += [("classifier", "classes", objectives.LEARNING)]
    if config.model.path == "scratch":
        rows += [("vae", "autoencode", objectives.LEARNING)]
        rows += [(ORIGINAL, "denoise", objectives.DENOISING)]
    if found.train is None:
        if rows:
            raise UserError(
                f"--data.source {config.data.source} has no images of its own, which the "
                f"{rows[0][0]} would be trained on; give --data.path with a folder of images for "
                f"each class ({', '.join(found.names)}), or --model.path and --judge.path"
            )
        return
    for name, row, table in rows:
        stage: TrainConfig = getattr(config, name)
        checks.check_stage(stage, stage.optimizer, mesh, name)
        optimizers.check_pair(stage.optimizer, "sum", *objectives.resolve(row, table))
        num_steps(stage, len(found.train.labels), stage.optimizer)
    with models_fit():
        held.new_judge(config, found.shape, len(found.nouns))
        if config.model.path == "scratch":
            vae = held.new_vae(config, found.shape)
            held.new_denoiser(config, vae.model.config, tokenizer_of(found).largest_id + 1)
    if config.model.path != "scratch":
        return
    # A template, three attributes, a quality, an article, a name of two words, a place of three.
    longest = max(len(t.format("").split()) for t in captions.TEMPLATES) + 10
    if config.model.length < longest + 2:
        raise UserError(
            f"--model.length {config.model.length}: captions have up to {longest} words; give at "
            f"least {longest + 2}"
        )


@contextlib.contextmanager
def models_fit() -> Iterator[None]:
    """Sizes that do not go together are a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--model.* and --judge.*: {error}; choose other sizes") from None


def tokenizer_of(found: Pictures) -> Tokenizer:
    """The tokenizer of the captions: one token a word."""
    return clip_tokenizer.of_words(captions.vocabulary(found.nouns))


def classifier(opened: Opened) -> Judge:
    """The judge: a classifier trained on the images, or the one at `--judge.path`.

    Raises:
        TrainingError: it is not as good as `--judge.least` asks.
    """
    run, config, found, loaded = opened
    if loaded.judge is not None:
        return checked(opened, loaded.judge)
    assert found.train is not None and found.test is not None
    learner = held.new_judge(config, found.shape, len(found.nouns))
    start: Any = held.random(learner, run.mesh, config.seed).to_host()
    stage = config.classifier
    stream = Labelled(list(found.train.images), found.train.labels, found.shape)
    with phase(run, "classifier"):
        row = objectives.resolve("classes", objectives.LEARNING)
        recipe = Recipe(stage, stage.optimizer)
        trained: Any = train(run, "classifier", start, row, {"train": stream}, recipe, shared=True)
        return checked(opened, Judge(trained.to_host()))


def checked(opened: Opened, judge: Judge) -> Judge:
    """The judge, which sees the classes of real images.

    Raises:
        TrainingError: not as often as `--judge.least` asks.
    """
    config, found = opened.config, opened.pictures
    if found.test is None:
        return judge
    right = judge_accuracy(opened, judge)
    say(f"classifier: held-out accuracy {right:.3f} on {len(found.test.labels)} images")
    if right < config.judge.least and not config.smoke:
        raise TrainingError(
            f"the judge's held-out accuracy is {right:.3f}, below --judge.least "
            f"{config.judge.least:g}: what it says of images would mean little; raise "
            "--classifier.epochs, or lower the bound"
        )
    return judge


def judge_accuracy(opened: Opened, judge: Judge) -> float:
    """Share of the held-out images whose class the judge sees; measured once."""
    run, config, found, _ = opened
    assert found.test is not None
    inputs = {"judge": judge.identity(), "images": judging.sha_of(found.test.images)}

    def measured() -> float:
        assert found.test is not None
        return judges.accuracy(judge, *found.test, run.mesh, config.draw.rows)

    return json_stage(run.folder / "computed" / "judge.json", inputs, measured)


def autoencoder(opened: Opened) -> Held:
    """The autoencoder, its latents scaled to unit variance."""
    run, config, found, _ = opened
    assert found.train is not None
    start: Any = held.random(held.new_vae(config, found.shape), run.mesh, config.seed).to_host()
    stage = config.vae
    stream = Scaled(list(found.train.images), found.train.labels, found.shape)
    with phase(run, "vae"):
        row = objectives.resolve(
            "autoencode", objectives.LEARNING, kl_weight=config.model.kl_weight
        )
        recipe = Recipe(stage, stage.optimizer)
        trained: Any = train(run, "vae", start, row, {"train": stream}, recipe, shared=True)
        few = found.train.images[:2048]
        inputs = {"vae": trained.identity(), "images": judging.sha_of(few)}

        def deviation() -> float:
            latents = drawing.encoded(trained.to_device(), few, ENCODED, run.mesh, "encode images")
            return float(np.std(latents))

        scale = json_stage(run.folder / "computed" / "latents.json", inputs, deviation)
    shape = trained.model.config
    scaled = VAELearner(VAE(_with(shape, scaling_factor=1 / scale), trained.model.remat))
    return trained._replace(learner=scaled).to_host()


def _with(config: Any, **changes: Any) -> Any:
    return configs.replace(config, **changes)


def encode_images(work: Work, vae: Any, images: Any) -> dict[str, jax.Array]:
    """The mean latents of all images of a stream."""
    pixels = np.stack(list(images.images))
    found = drawing.encoded(vae.to_device(), pixels, ENCODED, work.mesh, "encode images")
    return {"latents": jax.numpy.asarray(found)}


def original(opened: Opened, vae: Held) -> Painter:
    """Text encoder and denoiser, trained together on the images and their captions."""
    run, config, found, _ = opened
    assert found.train is not None
    tokenizer = tokenizer_of(found)
    learner = held.new_denoiser(config, vae.model.config, tokenizer.largest_id + 1)
    start: Any = held.random(learner, run.mesh, config.seed).to_host()
    stage, shape = config.original, learner.model.unet.config.latent_shape
    images = Labelled(list(found.train.images), found.train.labels, found.shape)
    with phase(run, "latents"):
        like: Any = held.arrays(latents=(len(images), *shape))
        latents = compute(
            run, "latents", encode_images, kind="encode images", version=1, like=like, shared=True,
            vae=vae, images=images,
        )  # fmt: skip
    with phase(run, ORIGINAL):
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
        recipe = Recipe(stage, stage.optimizer)
        trained: Any = train(run, ORIGINAL, start, row, {"train": stream}, recipe, shared=True)
    return Painter(trained, vae, Schedule(), tokenizer).to_host()


def given(path: str | Path, config: Any, mesh: Any) -> Painter:
    """The text-to-image model of a Stable Diffusion folder.

    Raises:
        UserError: it cannot be read, or is not what was exported.
    """
    distributed.of_first(lambda: seal.check(Path(path).expanduser()))
    rules = {TEXT: DiffusionLearner.rules, UNET: DiffusionLearner.rules, "vae": VAELearner.rules}

    def where(name: str, shape: tuple[int, ...]) -> Any:
        part = name.partition("/")[0]
        return sharding.sharding_of(name, shape, mesh, rules[part])

    m = config.model
    with distributed.together():
        found = diffusers_files.load(path, dtype="float32", shardings=where)
    configs_ = {name: _with(shape, dtype=m.dtype) for name, shape in found.configs.items()}
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


class Loaded(NamedTuple):
    """The models that are not trained in the run; None for those that are."""

    judge: Judge | None
    painter: Painter | None


def load(config: ConceptRun, mesh: Any, found: Pictures) -> Loaded:
    """The models at `--judge.path` and `--model.path`.

    Raises:
        UserError: they cannot be read, or are for other images than those of the data.
    """
    judge = None
    if config.judge.path != "scratch":
        judge = judges.given(config.judge.path, found.names, mesh)
    path = config.model.path
    if path == "scratch":
        return Loaded(judge, None)
    painter = given(path, config, mesh)
    shape = painter.vae.model.config.image_shape
    if found.train is not None and found.shape != shape:
        raise UserError(
            f"--model.path {path} draws images of {shape[0]} x {shape[1]} x {shape[2]}, those of "
            f"{found.place} are {' x '.join(map(str, found.shape))}; bring them to that size"
        )
    return Loaded(judge, painter)


def models(opened: Opened) -> tuple[Judge, Painter]:
    """The judge and the original: trained, or given."""
    judge = classifier(opened)
    if opened.loaded.painter is not None:
        return judge, opened.loaded.painter
    return judge, original(opened, autoencoder(opened))


def judge(
    opened: Opened,
    judge: Judge,
    found: Mapping[str, tuple[Shown, Sequence[str]]],
    concept: int | None,
    known: Sequence[Path] = (),
) -> dict[str, Any]:
    """The metrics of every model, by its name; per-image logs go to `evals/`.

    Args:
        opened: the run.
        judge: the classifier.
        found: models, and the kinds of prompts that each is asked.
        concept: number of the class that was erased.
        known: other run folders that may hold the same images.
    """
    run, config = opened.run, opened.config
    asked = Asked(run, judge, opened.pictures, concept, config.draw, config.seed, tuple(known))
    summary = {}
    for name, (model, kinds) in found.items():
        with phase(run, f"evaluate {name}"):
            log = judging.log_of(asked, model, kinds, name)
        summary[name] = evaluation.summarize(log, None, _counted(model))
        if opened.pictures.test is not None:
            summary[name]["judge_accuracy"] = judge_accuracy(opened, judge)
    return summary


def _counted(model: Shown) -> Any:
    return model.painter.denoiser


def export_painter(painter: Painter, target: Path, dtype: str, what: str) -> None:
    """A model as a folder that diffusers reads, unless it is there already.

    Args:
        painter: the model.
        target: the folder.
        dtype: of its tensors.
        what: a sentence on where it comes from, for its card.
    """
    text = cards.of_diffusion(what, painter.sha)

    def write() -> None:
        there = painter.to_device()
        model = there.denoiser.model
        parts = {TEXT: model.text.config, UNET: model.unet.config, "vae": there.vae.model.config}
        shapes = {name: _with(shape, dtype="float32") for name, shape in parts.items()}
        weights = {**there.denoiser.params, "vae": there.vae.params}
        whole = Pipeline(shapes, weights, painter.schedule, painter.tokenizer)
        diffusers_files.export(whole, target, dtype=dtype, card=lambda _: text)

    made_from = f"{painter.sha} {painter.vae.sha} {dtype}"
    exports.sealed(target, made_from, [text, painter.identity()["vae"]], write)


def export(opened: Opened, painter: Painter, judge: Judge, what: str) -> None:
    """`RUN/export`, the model, and `RUN/judge`, the classifier that judged it."""
    with phase(opened.run, "export"):
        target = opened.run.folder / "export"
        export_painter(painter, target, opened.config.export_dtype, what)
        if opened.config.judge.path == "scratch":
            judges.store(judge, opened.run.folder / "judge")


def report(opened: Opened, summary: Mapping[str, Any]) -> None:
    """`summary.json`, the page and its pictures, and the table on the terminal."""
    ending.publish(opened.run, summary)
