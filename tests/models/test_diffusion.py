"""A denoiser with its text encoder, as the trainer sees it; and an attack on it."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import concepts, objectives
from jaxlib_unlearn.objectives import DENOISING, Questions
from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.diffusion.denoiser import AttackLearner, Diffusion, DiffusionLearner
from models.diffusion.schedulers import Schedule
from models.diffusion.unet import UNet, UNetConfig
from models.files.weights import flatten
from models.learner import Frozen, check_questions
from train.data.noisy_latents import NoisyLatents
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.options.config import SelectConfig, TrainConfig
from train.options.optimizers import options_of as optimizer_of
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker

LENGTH, WORDS = 5, 10
TEXT = ClipTextConfig(WORDS + 2, 8, 16, 1, 2, num_positions=LENGTH)
NET = UNetConfig(4, 2, 2, (8,), (True,), 1, num_heads=2, cross_attention_dim=8, norm_groups=4)
MODEL = Diffusion(ClipText(TEXT), UNet(NET))
LEARNER = DiffusionLearner(MODEL)
ATTACK = AttackLearner(MODEL, words=WORDS, hidden=6, tokens=2)
ASKED = Questions({"train": ("noise",)})


def random_params(learner, seed=0):
    """Every leaf matters: the output is not 0, as it is at the start of training."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), jnp.float32), learner.shapes()
    )


PARAMS, START = random_params(LEARNER), random_params(LEARNER, 1)


def stream(seed, rows=12, purpose="noise"):
    draw = np.random.default_rng(seed)
    columns = {
        "tokens": draw.integers(0, WORDS, (rows, LENGTH)).astype(np.int32),
        "other_tokens": np.full((rows, LENGTH), WORDS, np.int32),
        "place": draw.integers(0, LENGTH, rows).astype(np.int32),
    }
    latents = draw.standard_normal((rows, 4, 4, 2)).astype(np.float32)
    return NoisyLatents(latents, columns, Schedule(), purpose=purpose)


BATCH: Any = stream(3).batch(np.arange(4), (), 0)


def asked(learner=LEARNER, params=PARAMS, frozen=START) -> Any:
    return learner.context(params, Frozen(params=frozen), {"train": BATCH}, ASKED)


def test_a_model_of_two_widths_is_refused():
    with pytest.raises(ValueError, match="reads states of width 8, those of a text have 16"):
        Diffusion(ClipText(dataclasses.replace(TEXT, hidden_size=16)), UNet(NET))


def test_answers_are_those_of_the_two_parts():
    context = asked()
    for of, params in ((context.model, PARAMS), (context.reference, START)):
        one, two = of.noise(BATCH, "tokens", "other_tokens")
        for found, column in ((one, "tokens"), (two, "other_tokens")):
            states = MODEL.text.apply(params["text_encoder"], BATCH[column])
            want = MODEL.unet.apply(params["unet"], BATCH["latents"], BATCH["time"], states)
            np.testing.assert_allclose(found, want, atol=1e-5)
        assert np.abs(one - two).max() > 1e-3  # the text matters


def test_what_was_asked_is_not_computed_again():
    model = asked().model
    (one,) = model.noise(BATCH, "tokens")
    both = model.noise(BATCH, "tokens", "other_tokens")
    assert both[0] is one
    assert model.noise(BATCH, "other_tokens", "tokens")[0] is both[1]
    same = model.noise({**BATCH}, "tokens")[0]  # another batch
    assert same is not one
    assert asked(frozen=None).reference is None


@pytest.mark.parametrize("name", DENOISING)
def test_rows_are_answered_in_one_pass(name, monkeypatch):
    row, options = objectives.resolve(name, DENOISING)
    check_questions(LEARNER, row, options)
    # Sides of unequally many rows.
    sides = enumerate(row.streams)
    batches: Any = {side: stream(i).batch(np.arange(2 + i), (), 0) for i, side in sides}
    passes, apply = [], UNet.apply

    def counted(self, params, latents, *given):
        passes.append(len(latents))
        return apply(self, params, latents, *given)

    monkeypatch.setattr(UNet, "apply", counted)

    def loss(params, frozen, fuse):
        asks = row.questions(options)
        context = LEARNER.context(params, Frozen(params=frozen), batches, asks, fuse=fuse)
        terms = row.loss(context, batches, options)
        return objectives.combine(terms, {k: w for k, (_, w) in terms.items()}, options)

    jax.eval_shape(lambda *given: loss(*given, False), PARAMS, START)
    apart = {"denoise": [2], "esd": [4, 2, 3], "redirect": [2, 2, 3]}
    together = {"denoise": [2], "esd": [4, 5], "redirect": [2, 5]}
    assert passes == apart[name]
    passes.clear()
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    value, (mine, frozen) = compiled(PARAMS, START, True)
    assert passes == together[name]
    np.testing.assert_allclose(value, loss(PARAMS, START, False), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mine))
    assert all(np.any(x) for x in jax.tree.leaves(mine["unet"]))
    assert not any(np.any(x) for x in jax.tree.leaves(frozen))


# Training


class Started(NamedTuple):
    """A model as runs hold it."""

    learner: DiffusionLearner
    params: Any
    sha: str = "start"


def train(
    folder, name="adamw", row="esd", *, learner=LEARNER, sizes=(1, 1, 1), leaves=None, **more
):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    run = Run(folder, mesh, 0, Tracker(folder))
    options = optimizer_of(name, learning_rate=1e-2, schedule="constant", warmup=0.0)
    base: Any = Started(learner, random_params(learner))
    found = objectives.resolve(row, DENOISING)
    streams = {side: stream(i, purpose=side) for i, side in enumerate(found[0].streams)}
    stage = TrainConfig(steps=3, batch_size=4, optimizer=options, **more)
    recipe = Recipe(stage, options, select=SelectConfig(leaves))
    trained = runs.train(run, "erased", base, found, streams, recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    return flatten(base.params), flatten(trained.params), lines


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    return train(tmp_path_factory.mktemp("adamw"))


def test_esd_moves_all_of_it(adamw):
    before, after, lines = adamw
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert not [path for path in before if np.array_equal(before[path], after[path])]


@pytest.mark.slow  # a minute of compilation each
@pytest.mark.parametrize("split", [{"sizes": (2, 2, 1)}, {"accumulate": 2}])
def test_devices_and_micro_batches_do_not_matter(adamw, tmp_path, split):
    _, _, lines = train(tmp_path, **split)
    for name in ("forget_loss", "retain_loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(adamw[2][0][name], rel=1e-6)


@pytest.mark.slow  # minutes of compilation; test_toy_denoiser has the same on a small model
@pytest.mark.parametrize("name", ["muon", "sift", "mezo"])
def test_any_optimizer_trains_it(name, tmp_path):
    """Convolutions are matrices, two sides are two gradients, and a forward pass is enough."""
    before, after, _ = train(tmp_path, name)
    path = "unet/down_blocks_0/resnets_0/conv1/kernel"
    change = np.asarray(after[path] - before[path]).reshape(-1, before[path].shape[-1])
    assert np.linalg.matrix_rank(change) == min(change.shape)
    if name == "muon":  # all directions of a convolution move alike
        values = np.linalg.svd(change, compute_uv=False)
        assert values[-1] > 0.3 * values[0]


def test_a_part_is_trained_and_the_rest_stays(tmp_path):
    before, after, _ = train(tmp_path, leaves=("attn2/to_k", "attn2/to_v"))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if "attn2/to_k" in path or "attn2/to_v" in path}


# An attack


def test_the_token_stands_at_its_place():
    params = random_params(ATTACK)
    embeds = ATTACK.embed(params, BATCH, BATCH["tokens"])
    table = params["text_encoder"]["embed"]["embedding"]
    token = concepts.attack_token(params["network"], table[:WORDS], params["basis"]["embedding"])
    want = np.array(table[BATCH["tokens"]])
    want[np.arange(4), BATCH["place"]] = token.embedding
    np.testing.assert_allclose(embeds, want, atol=1e-6)
    np.testing.assert_allclose(ATTACK.token(params).coefficients, token.coefficients, atol=1e-6)


def test_a_token_of_the_span_of_a_defence_is_as_if_nothing_stood_there():
    """Projected at the look-up. A projected table does not stop it."""
    params = random_params(ATTACK)
    embeds = ATTACK.embed(params, BATCH, BATCH["tokens"])
    span = concepts.span(ATTACK.token(params).embedding[None])
    here = (jnp.arange(LENGTH) == BATCH["place"][:, None])[..., None]
    text = params["text_encoder"]
    shut = MODEL.text.apply_embeds(text, concepts.project(embeds, span))
    nothing = jnp.where(here, 0, embeds)
    want = MODEL.text.apply_embeds(text, concepts.project(nothing, span))
    np.testing.assert_allclose(shut, want, atol=1e-6)
    table = concepts.project(text["embed"]["embedding"], span)
    token = ATTACK.token(params).embedding
    through = MODEL.text.apply_embeds(text, jnp.where(here, token, table[BATCH["tokens"]]))
    assert np.abs(through - want).max() > 1e-2


def test_an_attack_trains_its_network_alone(tmp_path):
    before, after, lines = train(tmp_path, row="denoise", learner=ATTACK, leaves=("network",))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith("network/")}
    assert len(lines) == 3


def test_an_attack_has_no_gradient_of_the_model():
    row, options = objectives.resolve("denoise", DENOISING)
    params = random_params(ATTACK)
    rest = {name: part for name, part in params.items() if name != "network"}

    def loss(network):
        whole = {**rest, "network": network}
        context = ATTACK.context(whole, Frozen(), {"train": BATCH}, row.questions(options))
        return row.loss(context, {"train": BATCH}, options)["train"][0]

    found = jax.jit(jax.grad(loss))(params["network"])
    assert all(np.any(x) for x in jax.tree.leaves(found))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params["network"])
    assert len(jaxpr.out_avals) == 4
    shapes = [x.shape for x in jax.tree.leaves(rest["unet"]) if len(x.shape) == 4]
    taken = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    # Gradients of convolutions' kernels would be convolutions whose results have their shapes.
    assert taken
    assert not [e for e in taken if e.outvars[0].aval.shape in shapes]
