"""Attacks on a model from which a concept was erased: tokens that bring it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.reading import reading
from train.jobs import diffusion, job
from train.jobs.diffusing import attack_files, prompts, stored, token_search
from train.jobs.diffusing.attack_files import (
    check_embeddings,
    check_vocabulary,
    embeddings_sha,
    read_for,
    vocabulary_of,
)
from train.jobs.diffusing.config import AttackRun
from train.jobs.diffusing.judging import Shown, Tokens
from train.jobs.diffusing.stored import Source
from train.jobs.diffusing.token_search import Target
from train.jobs.job import Job, Started
from train.options import checks
from train.options.roles import NONE, Roles
from train.tasks import erasure as methods
from train.tasks.pictures import Pictures


def run(config: AttackRun, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. The model that is attacked, and the original, whose images show the concept.
        aim = started.model

        # 2. Search the tokens with which the model predicts the noise in these images best.
        made = token_search.tokens(started, aim)
        attack_files.write(started, aim.source, aim.original, made)

        # 3. Judge: the same prompts without and with the tokens in the place of the name.
        models = shown(started, aim, made)
        known = [aim.source.folder]
        summary = diffusion.judge(started, aim.judge, models, aim.concept, known)

        # 4. Show.
        return job.end(started.run, summary)


def source_of(config: AttackRun) -> Source:
    """The run that is attacked."""
    return stored.read_run(config.run, "RUN", ("train.erase", "train.defend"))


def check(config: AttackRun, mesh: Any) -> None:
    """Raise `UserError` for a run that cannot be attacked, or an impossible attack."""
    source, attack = source_of(config), config.attack
    width = width_of(source)
    count = getattr(attack, "tokens", 0)
    if count > width - 1:
        raise UserError(
            f"--attack.tokens {count}: token embeddings have {width} entries, so at most "
            f"{width - 1} orthogonal tokens leave anything; give fewer"
        )
    if isinstance(attack, methods.CCE):
        prompts.check_placeholder(attack.prompt, "--attack.prompt")
    if isinstance(attack, methods.CCE | methods.SubAttack):
        row = objectives.resolve("denoise", objectives.DENOISING)
        checks.check_recipe(token_search.recipe_of(config), row, mesh, "attack")
    if isinstance(attack, methods.Given):
        read_for(source, attack.source, "--attack.source")
    if attack.transfer is not None:
        other = stored.read_run(attack.transfer, "--attack.transfer")
        check_vocabulary(vocabulary_of(source), other, "--attack.transfer")


def load(config: AttackRun) -> Pictures:
    """The images, which must contain the erased class."""
    found = diffusion.read(config)
    concept = source_of(config).concept
    assert concept is not None
    found.class_of(concept)
    return found


def width_of(source: Source) -> int:
    """The number of entries of a token embedding in the model of a run."""
    path = source.folder / "export" / "text_encoder" / "config.json"
    with reading(path, "run the command of its run again", "does not read"):
        return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])


def model(config: AttackRun, found: Pictures, mesh: Any) -> Target:
    """The model of the run that is attacked, with its original and its judge."""
    source = source_of(config)
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


JOB = Job("train.attack", Roles("original", NONE, "attacked"), check, load, model, diffusion.fit)


def shown(started: Started, aim: Target, found: Tokens | None) -> dict[str, tuple[Shown, Any]]:
    """The models to judge, and the kinds of prompts for each.

    The attacked model gets the same prompts with each token in the place of the name.
    """
    attack = started.config.attack.name
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
