"""Finding the tokens of an attack: combinations of words, free embeddings, random directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import concepts, objectives
from models.diffusion.denoiser import NETWORK, TEXT, AttackLearner, InversionLearner
from train.data import captions
from train.data.noisy_latents import NoisyLatents
from train.engine.run import phase, seed_of, train
from train.jobs.diffusing import erasing, prompts
from train.jobs.diffusing.attack_files import SHARE, Stored
from train.jobs.diffusing.config import AttackRun
from train.jobs.diffusing.held import Held, Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.diffusing.judging import Shown, Tokens
from train.jobs.diffusing.stored import Source
from train.jobs.job import Started
from train.options.config import SelectConfig, TrainConfig
from train.options.recipe import Recipe
from train.runtime import sharding
from train.runtime.checkpointing import params_sha256
from train.tasks import erasure as methods
from train.tasks.pictures import Pictures

TOP = 20  # the words of a token that are reported


class Target(NamedTuple):
    """The model that is attacked, and the models beside it.

    Args:
        source: the run of the attacked model.
        shown: the model of that run.
        original: the model before the erasure, which draws the concept.
        judge: the classifier.
        concept: the number of the class that was erased.
        given: the tokens of another run that are tried, if any.
        other: another model on which the tokens are tried too, if any.
    """

    source: Source
    shown: Shown
    original: Painter
    judge: Judge
    concept: int
    given: Stored | None = None
    other: Shown | None = None

    def to_host(self) -> Target:
        """The same record with its models in host memory."""
        return self


def recipe_of(config: AttackRun) -> Recipe:
    """The recipe by which a token is learned."""
    attack: Any = config.attack
    stage = TrainConfig(steps=attack.steps, batch_size=attack.batch_size)
    return Recipe(stage, config.optimizer, select=SelectConfig(leaves=(NETWORK,)))


def dictionary(painter: Painter, found: Pictures) -> tuple[str, ...]:
    """The words of which a token may consist, the first rows of the vocabulary.

    They are the words of the captions where these come first, else all before the special tokens.
    """
    t = painter.tokenizer
    words = captions.vocabulary(found.nouns)
    if [t.encode(word) for word in words] == [[i] for i in range(len(words))]:
        return tuple(words)
    first = min(i for i in (t.bos_id, t.eos_id) if i is not None)
    return tuple(t.token(i) or "" for i in range(first))


def tokens(started: Started, aim: Target) -> Tokens | None:
    """The tokens of the attack; None for an attack without tokens."""
    attack: Any = started.config.attack
    painter = aim.shown.painter
    if isinstance(attack, methods.SubAttack):
        return subattack(started, aim)
    if isinstance(attack, methods.CCE):
        return cce(started, aim)
    if isinstance(attack, methods.Random):
        return Tokens(random_tokens(painter, attack.tokens, started.run.seed))
    return None if aim.given is None else aim.given.tokens


def random_tokens(painter: Painter, count: int, seed: int) -> np.ndarray:
    """Orthogonal directions `(K, d)`, as long as the words are on average."""
    table = np.asarray(painter.to_device().params[TEXT]["embed"]["embedding"])
    draw = np.random.default_rng(seed_of(seed, "random")).standard_normal((table.shape[1], count))
    return (np.linalg.qr(draw)[0].T * norm_of(table)).astype(np.float32)


def norm_of(table: np.ndarray) -> float:
    """The mean length of rows."""
    return float(np.mean(np.linalg.norm(table, axis=-1)))


def concept_stream(started: Started, aim: Target) -> NoisyLatents:
    """The images of the concept with the prompt that contains the token."""
    attack: Any = started.config.attack
    noun = started.rows.nouns[aim.concept]
    latents, _ = erasing.concept_latents(
        started.run, started.config, aim.original, noun, attack.images
    )
    painter = aim.shown.painter
    rows = prompts.encode(
        painter.tokenizer, [attack.prompt] * len(latents), painter.length, "--attack.prompt"
    )
    columns = {"tokens": rows.tokens, "place": rows.place}
    return NoisyLatents(latents, columns, painter.schedule, started.run.seed, "attack")


def subattack(started: Started, aim: Target) -> Tokens:
    """The tokens of SubAttack: combinations of words, each orthogonal to those before."""
    here, config = started.run, started.config
    attack: Any = config.attack
    painter = aim.shown.painter
    words = dictionary(painter, started.rows)
    with phase(here, "images"):
        stream = concept_stream(started, aim)
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
        key = jax.random.key(seed_of(here.seed, f"token {k}") % 2**31)
        network = concepts.init_network(key, width, attack.hidden)
        start = learnable(painter, learner, {NETWORK: network, "basis": {"embedding": basis}}, here)
        trained = learned(started, f"token-{k + 1}", start, stream)
        found = jax.jit(learner.token)(trained.params)
        rows.append(np.asarray(found.embedding))
        named.append(tuple(concepts.words_of(found.coefficients, words, TOP)))
        shares.append(float(concepts.share_of_top(found.coefficients, table, basis, SHARE)))
        basis = concepts.extend(basis, found.embedding, k)
    return Tokens(np.stack(rows), tuple(named), tuple(shares))


def cce(started: Started, aim: Target) -> Tokens:
    """The tokens of CCE: embeddings learned freely, each from another random direction.

    Where the model has a defence at the look-up, they are learned behind it. SubAttack's words need
    no such care: the vocabulary of a defended model has no part in the span.
    """
    here, config = started.run, started.config
    attack: Any = config.attack
    painter = aim.shown.painter
    with phase(here, "images"):
        stream = concept_stream(started, aim)
    shield = aim.shown.shield
    basis = np.zeros((painter.denoiser.model.text.config.hidden_size, 0), np.float32)
    basis = basis if shield is None else shield.basis
    learner = InversionLearner(painter.denoiser.model, basis.shape[1])
    starts = random_tokens(painter, attack.tokens, here.seed)
    rows = []
    for k, begun in enumerate(starts):
        more = {NETWORK: {"embedding": begun}, "shield": {"embedding": basis}}
        start = learnable(painter, learner, jax.tree.map(jnp.asarray, more), here)
        trained = learned(started, f"token-{k + 1}", start, stream)
        rows.append(np.asarray(trained.params[NETWORK]["embedding"]))
    return Tokens(np.stack(rows))


def learnable(painter: Painter, learner: Any, more: Mapping[str, Any], run: Any) -> Held:
    """A model with the parameters that an attack learns beside it."""
    parts = sharding.put_params(dict(more), run.mesh, learner.rules)
    params = {**painter.to_device().params, **parts}
    return Held(learner, params, params_sha256(params))


def learned(started: Started, name: str, start: Held, stream: NoisyLatents) -> Held:
    """The model after one token is learned; everything else stays the same."""
    config = started.config
    row = objectives.resolve("denoise", objectives.DENOISING)
    begun: Any = start
    with phase(started.run, name):
        made: Any = train(
            started.run, name, begun, row, {"train": stream}, recipe_of(config), only=(NETWORK,)
        )
    return made
