"""Attacks on a model from which a concept was erased: tokens that bring it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import concepts, objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import reading
from models.diffusion.denoiser import NETWORK, TEXT, AttackLearner, InversionLearner
from train.data import captions
from train.data.noisy_latents import NoisyLatents
from train.engine.run import Recipe, phase, seed_of, train
from train.jobs.diffusing import erasing, prompts, stored
from train.jobs.diffusing.attack_files import (
    SHARE,
    Stored,
    check_embeddings,
    check_vocabulary,
    embeddings_sha,
    read_for,
    vocabulary_of,
)
from train.jobs.diffusing.config import AttackRun
from train.jobs.diffusing.held import Held, Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Shown, Tokens
from train.jobs.diffusing.pipeline import Opened
from train.jobs.diffusing.stored import Source
from train.options import checks, optimizers
from train.options.config import SelectConfig, TrainConfig
from train.runtime import sharding
from train.runtime.checkpointing import params_sha256
from train.tasks import erasure as methods
from train.tasks.pictures import Pictures

TOP = 20  # words of a token that are named


class Target(NamedTuple):
    """What is attacked.

    Args:
        source: its run.
        shown: its model.
        original: the model before, which draws what the attack looks for.
        judge: the classifier.
        concept: number of the class that was erased.
        given: tokens that another run found, which are tried.
        other: another model on which the tokens are tried too.
    """

    source: Source
    shown: Shown
    original: Painter
    judge: Judge
    concept: int
    given: Stored | None = None
    other: Shown | None = None


def check(config: AttackRun, mesh: Any, found: Pictures) -> None:
    """Raise `UserError` for a run that cannot be attacked, or an attack that cannot be."""
    source = stored.read_run(config.run, "RUN", ("train.erase", "train.defend"))
    assert source.concept is not None
    found.class_of(source.concept)
    attack: Any = config.attack
    width = width_of(source)
    if hasattr(attack, "tokens") and attack.tokens > width - 1:
        raise UserError(
            f"--attack.tokens {attack.tokens}: token embeddings have {width} entries, so at most "
            f"{width - 1} orthogonal tokens leave anything; give fewer"
        )
    if isinstance(attack, methods.CCE):
        prompts.check_placeholder(attack.prompt, "--attack.prompt")
        row = objectives.resolve("denoise", objectives.DENOISING)
        checks.check_stage(stage_of(config), config.optimizer, mesh, "attack")
        optimizers.check_pair(config.optimizer, "sum", *row)
        optimizers.check_mesh(config.optimizer, mesh, attack.batch_size)
    if isinstance(attack, methods.Given):
        read_for(source, attack.source, "--attack.source")
    if attack.transfer is not None:
        other = stored.read_run(attack.transfer, "--attack.transfer")
        check_vocabulary(vocabulary_of(source), other, "--attack.transfer")


def width_of(source: Source) -> int:
    """Entries of a token embedding of a run's model."""
    path = source.folder / "export" / "text_encoder" / "config.json"
    with reading(path, "run the command of its run again", "does not read"):
        return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])


def load(config: AttackRun, mesh: Any, found: Pictures) -> Target:
    """The model of the run that is attacked, and what belongs to it."""
    source = stored.read_run(config.run, "RUN", ("train.erase", "train.defend"))
    original = stored.original_of(source, mesh)
    assert source.concept is not None
    concept, given, other = found.class_of(source.concept), None, None
    if isinstance(config.attack, methods.Given):
        option = "--attack.source"
        given = read_for(source, config.attack.source, option)
        check_embeddings(given.embeddings, original, f"{option} {given.folder}", str(source.folder))
    if config.attack.transfer is not None:
        option = "--attack.transfer"
        run = stored.read_run(config.attack.transfer, option)
        mine, theirs = embeddings_sha(original), stored.original_of(run, mesh)
        check_embeddings(mine, theirs, f"RUN {source.folder}", f"{option} {run.folder}")
        other = stored.shown_of(run, mesh)
    shown = stored.shown_of(source, mesh)
    judge = stored.judge_of(source, mesh)
    return Target(source, shown, original, judge, concept, given, other)


def stage_of(config: AttackRun) -> TrainConfig:
    """How a token is learned."""
    attack: Any = config.attack
    return TrainConfig(steps=attack.steps, batch_size=attack.batch_size, optimizer=config.optimizer)


def dictionary(painter: Painter, found: Pictures) -> tuple[str, ...]:
    """The words that a token may be made of, the first rows of the vocabulary.

    Those of the captions where they come first in it, else all before the special tokens.
    """
    t = painter.tokenizer
    words = captions.vocabulary(found.nouns)
    if [t.encode(word) for word in words] == [[i] for i in range(len(words))]:
        return tuple(words)
    first = min(i for i in (t.bos_id, t.eos_id) if i is not None)
    return tuple(t.token(i) or "" for i in range(first))


def tokens(opened: Opened, aim: Target) -> Tokens | None:
    """The tokens of the attack; None: it has none."""
    attack: Any = opened.config.attack
    painter = aim.shown.painter
    if isinstance(attack, methods.SubAttack):
        return subattack(opened, aim)
    if isinstance(attack, methods.CCE):
        return cce(opened, aim)
    if isinstance(attack, methods.Random):
        return Tokens(random_tokens(painter, attack.tokens, opened.run.seed))
    return None if aim.given is None else aim.given.tokens


def random_tokens(painter: Painter, count: int, seed: int) -> np.ndarray:
    """Orthogonal directions `(K, d)`, as long as the words are on average."""
    table = np.asarray(painter.to_device().params[TEXT]["embed"]["embedding"])
    draw = np.random.default_rng(seed_of(seed, "random")).standard_normal((table.shape[1], count))
    return (np.linalg.qr(draw)[0].T * norm_of(table)).astype(np.float32)


def norm_of(table: np.ndarray) -> float:
    """The mean length of rows."""
    return float(np.mean(np.linalg.norm(table, axis=-1)))


def concept_stream(opened: Opened, aim: Target) -> NoisyLatents:
    """Images of the concept with the prompt that the token stands in."""
    attack: Any = opened.config.attack
    noun = opened.pictures.nouns[aim.concept]
    latents, _ = erasing.concept_latents(
        opened.run, opened.config, aim.original, noun, attack.images
    )
    painter = aim.shown.painter
    rows = prompts.encode(
        painter.tokenizer, [attack.prompt] * len(latents), painter.length, "--attack.prompt"
    )
    columns = {"tokens": rows.tokens, "place": rows.place}
    return NoisyLatents(latents, columns, painter.schedule, opened.run.seed, "attack")


def subattack(opened: Opened, aim: Target) -> Tokens:
    """Tokens one after another, each a combination of words and orthogonal to those before."""
    run, config = opened.run, opened.config
    attack: Any = config.attack
    painter = aim.shown.painter
    words = dictionary(painter, opened.pictures)
    with phase(run, "images"):
        stream = concept_stream(opened, aim)
    learner = AttackLearner(
        painter.denoiser.model,
        words=len(words),
        hidden=attack.hidden,
        form=attack.form,
        positive=attack.positive,
        tokens=attack.tokens,
    )
    width = painter.denoiser.model.text.config.hidden_size
    basis = jnp.zeros((width, attack.tokens))
    rows, named, shares = [], [], []
    table = painter.to_device().params[TEXT]["embed"]["embedding"][: len(words)]
    for k in range(attack.tokens):
        key = jax.random.key(seed_of(run.seed, f"token {k}") % 2**31)
        network = concepts.init_network(key, width, attack.hidden)
        start = learnable(painter, learner, {NETWORK: network, "basis": {"embedding": basis}}, run)
        trained = learned(opened, f"token-{k + 1}", start, stream)
        found = jax.jit(learner.token)(trained.params)
        rows.append(np.asarray(found.embedding))
        named.append(tuple(concepts.words_of(found.coefficients, words, TOP)))
        shares.append(float(concepts.share_of_top(found.coefficients, table, basis, SHARE)))
        basis = concepts.extend(basis, found.embedding, k)
    return Tokens(np.stack(rows), tuple(named), tuple(shares))


def cce(opened: Opened, aim: Target) -> Tokens:
    """Embeddings that are learned freely, each from another random direction.

    Where the model has a defence at the look-up, they are learned behind it. SubAttack's words need
    no such care: the vocabulary of a defended model has no part in the span.
    """
    run, config = opened.run, opened.config
    attack: Any = config.attack
    painter = aim.shown.painter
    with phase(run, "images"):
        stream = concept_stream(opened, aim)
    shield = aim.shown.shield
    basis = np.zeros((painter.denoiser.model.text.config.hidden_size, 0), np.float32)
    basis = basis if shield is None else shield.basis
    learner = InversionLearner(painter.denoiser.model, basis.shape[1])
    starts = random_tokens(painter, attack.tokens, run.seed)
    rows = []
    for k, begun in enumerate(starts):
        more = {NETWORK: {"embedding": begun}, "shield": {"embedding": basis}}
        start = learnable(painter, learner, jax.tree.map(jnp.asarray, more), run)
        trained = learned(opened, f"token-{k + 1}", start, stream)
        rows.append(np.asarray(trained.params[NETWORK]["embedding"]))
    return Tokens(np.stack(rows))


def learnable(painter: Painter, learner: Any, more: Mapping[str, Any], run: Any) -> Held:
    """A model with what an attack learns beside it."""
    parts = sharding.put_params(dict(more), run.mesh, learner.rules)
    params = {**painter.to_device().params, **parts}
    return Held(learner, params, params_sha256(params))


def learned(opened: Opened, name: str, start: Held, stream: NoisyLatents) -> Held:
    """The model after one token is learned; all else stays."""
    config = opened.config
    recipe = Recipe(stage_of(config), config.optimizer, select=SelectConfig(leaves=(NETWORK,)))
    row = objectives.resolve("denoise", objectives.DENOISING)
    begun: Any = start
    with phase(opened.run, name):
        made: Any = train(opened.run, name, begun, row, {"train": stream}, recipe, only=(NETWORK,))
    return made


def shown(opened: Opened, aim: Target, found: Tokens | None) -> dict[str, tuple[Shown, Any]]:
    """The models to judge, and the kinds of prompts that each is asked.

    The attacked model is asked the same prompts with each token in the place of the name.
    """
    attack = opened.config.attack.name
    kinds = ("explicit", "names", "kept")
    tried = ("explicit", "words" if attack == "words" else "attacked")
    if attack == "none":
        tried = ("explicit",)
    empty = Tokens(np.zeros((0, 1), np.float32)) if found is None else found
    models: dict[str, tuple[Shown, Any]] = {
        "original": (Shown(aim.original), kinds),
        aim.source.name: (aim.shown, kinds),
        "attacked": (aim.shown._replace(tokens=empty), tried),
    }
    if aim.other is not None:
        models["transferred"] = (aim.other._replace(tokens=empty), tried)
    return models
