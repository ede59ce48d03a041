"""The pre-training job: a corpus is tokenised, a model learns it from random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlib_unlearn import objectives
from models import Tokenizer
from train.costs.utilisation import utilisation
from train.data import corpus, token_file
from train.data.token_rows import TokenRows
from train.engine.exports import export_model
from train.engine.replays import stored
from train.engine.run import Watch, phase, seed_of
from train.engine.run import train as train_stage
from train.evaluators.evaluation import Model, num_parameters
from train.evaluators.token_loss import mean_loss, row_losses
from train.jobs import job
from train.jobs.job import Fitted, Job, Judged, Started
from train.jobs.new_models import base_model, decoder_of, tokenizer_of
from train.jobs.pretraining_options import (
    PretrainConfig,
    batch_rows,
    cache_of,
    check_rows,
    check_size,
    num_steps,
    recipe_of,
)
from train.options import checks, optimizers
from train.options.config import replace
from train.options.roles import NONE, Roles
from train.runtime import cards, sharding
from train.runtime.stages import json_stage
from train.runtime.tracking import Timed, say

STAGE = "pretrained"


def run(config: PretrainConfig, command: str = "") -> Path:
    """Run all stages of a configuration and return the run folder, which is held meanwhile.

    Args:
        config: the configuration.
        command: the command line that repeats the run, for its page.
    """
    with job.start(JOB, config, command) as started:
        # 1. Train: the corpus was tokenised, the model has random weights.
        trained = train(started)

        # 2. Judge, hand it back, and show.
        judged = judge(started, trained)
        found = judged.summary[STAGE] | cost(started, trained)
        job.export(started.run, lambda folder: export(started.config, trained, found, folder))
        return job.end(started.run, {STAGE: found})


@dataclasses.dataclass
class Corpus:
    """The corpus of a run.

    Args:
        known: the part that is known before it is tokenised.
        given: the given tokenizer; None: one is trained.
        train: the rows to train on, once it is tokenised.
        validation: the rows that are held out.
        words: a description of it, in words.
    """

    known: corpus.Known
    given: Tokenizer | None
    train: Any = None
    validation: Any = None
    words: str = ""

    def digest(self) -> str | None:
        """sha256 of its documents."""
        return self.known.config.digest


def check(config: PretrainConfig, mesh: Any) -> None:
    """Raise `UserError` for errors that are known before the corpus is read."""
    sharding.check_heads(mesh, config.model.num_heads)
    corpus.check(config.data)
    decoder_of(config)
    checks.check_blocks(config.optimizer, config.model.num_layers)
    recipe = recipe_of(config, sharding.batch_ways(mesh))
    checks.check_recipe(recipe, objectives.resolve("nll"), mesh, "training")
    optimizers.check_steps(config.optimizer, num_steps(config))
    checks.check_writable("--data.cache", cache_of(config))


def settle(config: PretrainConfig) -> tuple[PretrainConfig, Corpus]:
    """The configuration with the digest of the corpus, and the corpus as far as it is known."""
    given = tokenizer_of(config)
    known = corpus.identify(config.data)
    check_size(config, known)
    return replace(config, data=known.config), Corpus(known, given)


def model(config: PretrainConfig, rows: Corpus, mesh: Any) -> Model:
    """The model with random weights, for the tokens of the corpus, which is tokenised."""
    known, digest = rows.known, str(config.data.digest)
    if known.counts is not None:
        say(f"corpus: {known.counts.words()}, sha256 {digest[:16]}")
    streamed = int(config.train.tokens) if known.counts is None else None
    made = token_file.tokenised(
        known, config.model.vocab_size, cache_of(config), rows.given, streamed
    )
    rows.train, rows.validation = (
        TokenRows(part, config.data.context) for part in (made.train, made.validation)
    )
    rows.words = f"Corpus: {made.words}."
    return base_model(config, made.tokenizer, mesh)


def fit(config: PretrainConfig, rows: Corpus, base: Model, mesh: Any) -> Fitted:
    """The size of the run in words; checks that there are enough rows."""
    check_rows(config, rows.train, mesh)
    words = (
        f"{num_parameters(base.params) / 1e6:.1f} M parameters, "
        f"{len(rows.train.part.tokens):,} tokens, {len(rows.validation.part.tokens):,} held out"
    )
    return Fitted(rows, words, [rows.words], ["perplexity"])


JOB = Job("train.pretrain", Roles("random", NONE, STAGE), check, None, model, fit, settle)


def train(started: Started) -> Model:
    """The training stage: the rows of the corpus, epoch by epoch, evaluated on held-out ones."""
    here, config, rows = started.run, started.config, started.parts
    held_out = first_rows(rows.validation, config.evaluate.curve_tokens)

    def look(trained: Model) -> dict[str, float]:
        at_once = config.train.micro_tokens
        timed = (
            here.tracker.looking() if isinstance(here.tracker, Timed) else contextlib.nullcontext()
        )
        with timed:
            losses = row_losses(trained, rows.validation, held_out, here.mesh, at_once)
        return {"validation_loss": mean_loss(losses)}

    with phase(here, STAGE):
        return train_stage(
            here,
            STAGE,
            started.model,
            objectives.resolve("nll"),
            {"train": rows.train},
            recipe_of(config, sharding.batch_ways(here.mesh)),
            record=stored.NAME,
            watch=(Watch(look, config.train.curve_points),),
        )


def first_rows(rows: TokenRows, tokens: int | None) -> np.ndarray:
    """The first rows with about so many tokens; None: all."""
    count = len(rows) if tokens is None else min(len(rows), -(-tokens // rows.context))
    return np.arange(count)


def seen_rows(started: Started, count: int) -> np.ndarray:
    """The first `count` of the rows that were trained on."""
    rows, config = started.parts.train, started.config
    batch, _ = batch_rows(config, sharding.batch_ways(started.run.mesh))
    order = rows.epoch_order(seed_of(config.seed, STAGE), "train", 0)
    return order[np.arange(min(count, batch * num_steps(config), len(rows)))]


def judge(started: Started, trained: Model) -> Judged:
    """Judge the model by its perplexity on rows held out, and on rows that it has seen."""
    here, config, rows = started.run, started.config, started.parts
    held_out = first_rows(rows.validation, config.evaluate.tokens)
    seen = seen_rows(started, len(held_out))

    def log(trained: Model, name: str) -> Mapping[str, Any]:
        trained, at_once, entries = trained.to_device(), config.train.micro_tokens, {}
        for entry, part, which in (
            ("val_perplexity", rows.validation, held_out),
            ("train_perplexity", rows.train, seen),
        ):
            label = entry.replace("_", " ")
            losses = row_losses(trained, part, which, here.mesh, at_once, label)
            items = {
                str(row): {"nll": nats, "labels": int(labels)}
                for row, (nats, labels) in zip(which.tolist(), losses.tolist(), strict=True)
            }
            perplexity = math.exp(min(mean_loss(losses), 700.0))
            entries[entry] = {"agg_value": perplexity, "value_by_index": items}
        return entries

    inputs = {
        "train": rows.train.identity(),
        "validation": rows.validation.identity(),
        "rows": [len(held_out), seen.tolist()],
        "version": 1,
    }
    return job.judge(here, {STAGE: trained}, lambda trained, name: trained.identity() | inputs, log)


def cost(started: Started, trained: Model) -> dict[str, Any]:
    """The amount and the speed of the training; the speed is measured once, and kept."""
    here, config = started.run, started.config

    def speed() -> float | None:
        seconds = here.tracker.seconds() if isinstance(here.tracker, Timed) else None
        return None if seconds is None else config.train.batch_tokens / seconds

    path = here.folder / "computed" / "speed.json"
    pace = json_stage(path, {"params": trained.sha}, speed, here.cache)
    return {
        "tokens": num_steps(config) * config.train.batch_tokens,
        "tokens_per_second": pace,
        "mfu": utilisation(trained.decoder, config.data.context, pace, here.mesh),
    }


def export(config: PretrainConfig, trained: Model, found: Mapping[str, Any], folder: Path) -> None:
    """The model as an HF folder, with a card."""
    text = cards.plain(
        f"A language model trained from random weights on {found['tokens']:,} tokens "
        f"({config.preset}, seed {config.seed}) with jaxlib-unlearn. Validation perplexity "
        f"{found['val_perplexity']:.4g}. It continues texts, and answers no questions.",
        trained.sha,
        chat=False,
        **({"prompt": "import numpy as"} if config.data.source == "packages" else {}),
    )
    export_model(trained, folder, config.export_dtype, text, speaks=False)
