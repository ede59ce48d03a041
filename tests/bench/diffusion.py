"""A text-to-image model against torch and diffusers: `python tests/bench/diffusion.py` (minutes).

    python tests/bench/diffusion.py [--only train sample attack] [--repeats 5] [--output runs/bench]

The model is that of the preset `fashion` with random weights, float32, on the CPU; no data is
needed. torch's side loads our export in a separate process (`torch_diffusion.py`), whose threads
are idle while JAX computes. Sides take turns, the first of which is not counted; each number is a
median. Before anything is counted both sides must find the same loss, or draw the same images.
Ratio: ours / the other's; the bound is what the project promises.

- train: images a second of a step of the stage `original` (text encoder and denoiser, AdamW).
- sample: images a second of guided DDIM, from prompts to pixels.
- attack: seconds of a step of SubAttack, which needs no gradient of the denoiser's weights, against
  those of a step of `original`, both on as many rows; needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from other_side import Turn, asking
from timing import OUT, machine, markdown, publish, within

from jaxlib_unlearn import concepts, objectives
from jaxlib_unlearn.errors import UserError
from models.diffusion.denoiser import NETWORK, AttackLearner
from models.diffusion.schedulers import Schedule
from models.files import clip_tokenizer
from train.costs.flops import count_jaxpr
from train.data import captions
from train.data.noisy_latents import NoisyLatents
from train.data.streams import batches_of
from train.engine.hyper import hyper_of, traced_step
from train.engine.step import compile_step, init_state
from train.engine.trainable import trainable_of
from train.jobs.diffusing import drawing, held, painters, prompts
from train.jobs.diffusing.config import AttackRun
from train.jobs.diffusing.held import Painter
from train.options import optimizers
from train.options.config import SelectConfig
from train.presets import fashion
from train.runtime import hugepages, residency, sharding

HERE = Path(__file__).resolve()
SHAPE, SEED = (32, 32, 1), 0  # images of Fashion-MNIST with their border
BOUNDS = {"train": ">= 1", "sample": ">= 1.2", "attack": "<= 0.75"}
CLOSE = 1e-4  # of a loss at the same weights, and of pixels from 0 to 1
LATER = 1e-2  # of losses after steps, whose updates AdamW makes of rounded gradients
PEERS = ("torch", "diffusers", "transformers")


Side = Callable[[int], Turn]  # of the number of a step


class Bench(NamedTuple):
    """What every benchmark starts from; `folder` holds the model as diffusers loads it."""

    painter: Painter
    mesh: Any
    folder: Path
    repeats: int


def random_painter(mesh: Any) -> Painter:
    """The model of the preset with every parameter random: none of its branches gives 0."""
    config = fashion.PRESET
    tokenizer = clip_tokenizer.of_words(captions.vocabulary(captions.CLOTHES))
    vae = held.new_vae(config, SHAPE)
    denoiser = held.new_denoiser(config, vae.model.config, tokenizer.largest_id + 1)
    draw = np.random.default_rng(SEED)

    def leaf(path: Any, shape: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        spread = 0.1 if len(shape.shape) == 1 else np.prod(shape.shape[:-1]) ** -0.5
        value = spread * draw.standard_normal(shape.shape) + (name == "scale")
        return jnp.asarray(value, shape.dtype)

    def filled(learner: Any) -> held.Held:
        params = jax.tree_util.tree_map_with_path(leaf, learner.model.shapes())
        return held.placed(learner, params, mesh)

    return Painter(filled(denoiser), filled(vae), Schedule(), tokenizer)


def texts_of(count: int) -> list[str]:
    """Prompts about the classes in turn."""
    nouns = itertools.cycle(captions.CLOTHES)
    return [f"a photo of a {next(nouns).names[0]}" for _ in range(count)]


def noisy(painter: Painter, rows: int, text: str | None = None) -> NoisyLatents:
    """Random latents with prompts, of which some are dropped; with `text` it is that of all."""
    shape, count = painter.denoiser.model.unet.config.latent_shape, 4 * rows
    latents = np.random.default_rng(SEED).standard_normal((count, *shape)).astype(np.float32)
    texts = texts_of(count) if text is None else [text] * count
    found = prompts.encode(painter.tokenizer, texts, painter.length)
    empty = prompts.encode(painter.tokenizer, [""], painter.length).tokens[0]
    columns = {"tokens": found.tokens} | ({} if text is None else {"place": found.place})
    dropout = fashion.PRESET.model.dropout if text is None else 0.0
    return NoisyLatents(latents, columns, painter.schedule, SEED, "original", empty, dropout)


class Trainer(NamedTuple):
    """The steps of a stage as `train.engine.loop` takes them.

    Args:
        step: batch made and put on the device, one update; its loss.
        batch: what the stream gives at a step.
        rate: the learning rate there.
        flops: of the compiled program.
    """

    step: Side
    batch: Callable[[int], Mapping[str, np.ndarray]]
    rate: Callable[[int], float]
    flops: int


def trainer(
    learner: Any, params: Any, stream: NoisyLatents, rows: int, stage: Any, optimizer: Any,
    mesh: Any, select: SelectConfig | None = None,
) -> Trainer:  # fmt: skip
    """A stage with objective `denoise` that trains all parameters, or those selected."""
    row, options = objectives.resolve("denoise", objectives.DENOISING)
    made = trainable_of(params, row, select=select, dtype=learner.dtype, mesh=mesh)
    tx, schedule, _ = optimizers.build(optimizer, stage.steps)
    start = residency.fresh(made.start, sharding.param_shardings(made.start, mesh, learner.rules))
    state, shardings = init_state(start, tx, mesh)
    hyper = jax.device_put(hyper_of(options, optimizer, stage.steps, SEED), shardings.step)
    program = traced_step(learner, row, options, optimizer, binding=made.binding)
    compiled = compile_step(program, shardings, mesh)
    batches = batches_of({"train": stream}, "train", SEED, rows)

    def put(number: int) -> Any:
        return {name: sharding.put_batch(x, mesh, rows) for name, x in batches(number).items()}

    traced = jax.make_jaxpr(program)(state, hyper, made.frozen, put(0))
    held_ = [state]

    def step(number: int) -> Turn:
        since = time.perf_counter()
        held_[0], found = compiled(held_[0], hyper, made.frozen, put(number))
        jax.block_until_ready((held_[0], found))
        return Turn(time.perf_counter() - since, float(found["loss"]))

    return Trainer(
        step,
        lambda number: batches(number)["train"],
        lambda number: float(schedule(number)),
        count_jaxpr(traced).flops,
    )


def original(bench: Bench, rows: int) -> Trainer:
    """Steps of the stage `original`."""
    painter, stage = bench.painter.to_device(), fashion.PRESET.original
    return trainer(
        painter.learner, painter.params, noisy(painter, rows), rows, stage, stage.optimizer,
        bench.mesh,
    )  # fmt: skip


def attacking(bench: Bench, rows: int) -> Trainer:
    """Steps of SubAttack's first token."""
    painter, attack = bench.painter.to_device(), AttackRun().attack
    assert painter.tokenizer.bos_id is not None
    model = painter.denoiser.model
    learner = AttackLearner(
        model,
        words=len(captions.vocabulary(captions.CLOTHES)),
        hidden=attack.hidden,
        form=attack.form,
        positive=attack.positive,
        tokens=attack.tokens,
    )
    width = model.text.config.hidden_size
    more = {
        NETWORK: concepts.init_network(jax.random.key(SEED), width, attack.hidden),
        "basis": {"embedding": jnp.zeros((width, attack.tokens))},
    }
    params = painter.params | sharding.put_params(more, bench.mesh, learner.rules)
    return trainer(
        learner, params, noisy(painter, rows, attack.prompt), rows, attack, AttackRun().optimizer,
        bench.mesh, SelectConfig(leaves=(NETWORK,)),
    )  # fmt: skip


def torch_side(
    work: str, folder: Path, data: Any
) -> contextlib.AbstractContextManager[Callable[[Any], Turn]]:
    """torch's process for a work: a function that sends it a request and returns its turn."""
    # Like a user's it does not ask for huge pages.
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    program = HERE.with_name("torch_diffusion.py")
    return asking(program, work, folder, data, plain | {"HF_HUB_OFFLINE": "1"})


def in_turns(
    ours: Side,
    theirs: Side,
    repeats: int,
    check: Callable[[int, Any, Any], None] | None = None,
    each: int = 2,
) -> tuple[float, float]:
    """Median seconds of both sides.

    A turn is `each` steps, of which the last counts. Of short steps it is two: during the other
    side's turn a virtual machine returns memory that a step left free, and the next step pays for
    it. The sides' order turns round, and the first turn is not counted.
    """
    counted: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        numbers, found = range(turn * each, (turn + 1) * each), {}
        for side in (ours, theirs)[:: 1 if turn % 2 else -1]:
            found[side] = [side(number) for number in numbers]
        if check is not None:
            for number, a, b in zip(numbers, found[ours], found[theirs], strict=True):
                check(number, a.value, b.value)
        a, b = (found[side][-1].seconds for side in (ours, theirs))
        kind = "counted" if turn else "first, not counted"
        print(f"ours {a:.3f} s, theirs {b:.3f} s ({kind})", file=sys.stderr)
        if turn:
            counted.append((a, b))
    mine, other = zip(*counted, strict=True)
    return statistics.median(mine), statistics.median(other)


def agree(what: str, apart: float, tolerance: float) -> None:
    """Raise `RuntimeError` unless both sides found the same."""
    if not apart <= tolerance:
        raise RuntimeError(f"{what} are {apart:.3g} apart; no common work was timed")


def first_axes(x: np.ndarray) -> list[Any]:
    """`(B, H, W, C)` as torch takes it, `(B, C, H, W)`."""
    return np.asarray(x).transpose(0, 3, 1, 2).tolist()


def train(bench: Bench) -> Iterator[dict[str, Any]]:
    """A step of the stage `original`."""
    rows, adam = fashion.PRESET.original.batch_size, fashion.PRESET.original.optimizer
    assert adam.name == "adamw" and adam.clip_norm is None and not adam.weight_decay
    ours = original(bench, rows)
    clean = noisy(bench.painter, rows).latents

    def request(number: int) -> dict[str, Any]:
        batch = ours.batch(number)
        return {
            "latents": first_axes(clean[batch["row_id"]]),
            "noise": first_axes(batch["noise"]),
            "time": batch["time"].tolist(),
            "tokens": batch["tokens"].tolist(),
            "learning_rate": ours.rate(number),
        }

    def check(number: int, mine: float, other: float) -> None:
        agree(f"losses of step {number}", abs(mine - other) / other, LATER if number else CLOSE)

    more = {"betas": (adam.b1, adam.b2), "eps": adam.eps, "weight_decay": 0.0}
    with torch_side("train", bench.folder, {"adamw": more}) as ask:
        seconds = in_turns(ours.step, lambda n: ask(request(n)), bench.repeats, check)
    speeds = (rows / s for s in seconds)
    work = f"train: a step of {rows} images, images a second"
    yield within(work, "torch, diffusers", *speeds, BOUNDS["train"])


def sample(bench: Bench) -> Iterator[dict[str, Any]]:
    """Guided images."""
    how, painter = fashion.PRESET.draw, bench.painter
    assert how.sampler == "ddim"
    texts, shape = texts_of(how.rows), painter.denoiser.model.unet.config.latent_shape

    def ours(number: int) -> Turn:
        wanted = drawing.Wanted(texts, range(how.rows))
        since = time.perf_counter()
        found = drawing.drawn(painter, wanted, how, bench.mesh, seed=number, label="draw")
        return Turn(time.perf_counter() - since, found)

    def request(number: int) -> dict[str, Any]:
        latents = [
            jax.random.normal(jax.random.fold_in(jax.random.key(number), image), shape)
            for image in range(how.rows)
        ]
        return {"latents": first_axes(np.stack(latents))}

    def check(number: int, mine: np.ndarray, other: list[Any]) -> None:
        # Ours are rounded to 255 steps.
        apart = np.max(np.abs(mine / 255 - np.asarray(other))) - 0.5 / 255
        agree(f"images of draw {number}", apart, CLOSE)

    options = {"num_inference_steps": how.steps, "guidance_scale": how.guidance}
    with torch_side("sample", bench.folder, {"texts": texts, "how": options}) as ask:
        seconds = in_turns(ours, lambda n: ask(request(n)), bench.repeats, check, each=1)
    speeds = (how.rows / s for s in seconds)
    work = (
        f"sample: {how.rows} guided images of {how.steps} steps of {how.sampler}, images a second"
    )
    yield within(work, "StableDiffusionPipeline", *speeds, BOUNDS["sample"])


def attack(bench: Bench) -> Iterator[dict[str, Any]]:
    """A step of SubAttack, of as many rows as it takes and of as many as training takes."""
    sizes = AttackRun().attack.batch_size, fashion.PRESET.original.batch_size
    for rows in dict.fromkeys(sizes):
        ours, theirs = attacking(bench, rows), original(bench, rows)
        seconds = in_turns(ours.step, theirs.step, bench.repeats)
        share = f"{ours.flops / theirs.flops:.2f} of its FLOPs"
        work = f"attack: a step of {rows} images ({share}), s"
        yield within(work, "a training step", *seconds, BOUNDS["attack"])


WORKS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "train": train,
    "sample": sample,
    "attack": attack,
}


def check(works: list[str]) -> None:
    """Raise `UserError` for what is missing."""
    if jax.default_backend() != "cpu":
        raise UserError("torch's side computes on the CPU: set JAX_PLATFORMS=cpu")
    for name in PEERS:
        if set(works) - {"attack"} and importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; run `make bench`, or give --only attack")


def main(argv: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each work")
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        check(args.only)
    except UserError as error:
        print(f"diffusion.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(random_painter(mesh), mesh, Path(scratch) / "model", args.repeats)
        painters.export_painter(bench.painter, bench.folder, "float32", "Random weights.")
        rows = [found for name in args.only for found in WORKS[name](bench)]
    result = {"device": f"{machine(*PEERS)}, seed {SEED}", "rows": rows}
    text = markdown(f"A text-to-image model on {result['device']}", rows)
    publish("diffusion", result, text, args.output)


if __name__ == "__main__":
    hugepages.ask()  # as the programs of `train` do
    main()
