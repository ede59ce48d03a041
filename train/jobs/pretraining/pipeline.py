"""The parts of a pre-training run, in the order in which `train/pretrain.py` calls them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models import Decoder, Tokenizer, bounds
from models.files import hub
from models.files.families import FAMILIES, new_config
from train.costs.utilisation import utilisation
from train.data import corpus, token_file
from train.data.token_rows import TokenRows
from train.engine import base_models
from train.engine.exports import export_model
from train.engine.replays import stored
from train.engine.run import Recipe, Run, Watch, phase, seed_of, started
from train.engine.run import train as train_stage
from train.evaluators.base import means
from train.evaluators.evaluation import Model, num_parameters
from train.evaluators.perplexity import METRICS
from train.evaluators.token_loss import mean_loss, row_losses
from train.jobs.pretraining.config import PretrainConfig, batch_rows, num_steps, stage_of
from train.options import checks, optimizers
from train.options import config as configs
from train.options.config import replace, run_folder
from train.options.roles import NONE, Roles
from train.reporting import ending
from train.runtime import cards, distributed, folder, remote, reporters, sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.stages import json_stage
from train.runtime.tracking import Timed, say

STAGE = "pretrained"
ABOUT = {
    "roles": Roles("random", NONE, STAGE)._asdict(),
    "evaluators": ["perplexity"],
    "program": "train.pretrain",
}


class Opened(NamedTuple):
    """A pre-training run at its start.

    Args:
        run: its folder, which is held.
        config: with the digest of the corpus.
        train: the rows to train on.
        validation: the rows that are held out.
        base: the model with random weights.
    """

    run: Run
    config: PretrainConfig
    train: TokenRows
    validation: TokenRows
    base: Model


@contextlib.contextmanager
def opened(config: PretrainConfig) -> Iterator[Opened]:
    """Find everything that can be wrong, tokenise, then make or enter the run folder, and hold it.

    Raises:
        UserError: anything about the configuration, the corpus, the model or the folder.
    """
    since = time.monotonic()
    with contextlib.ExitStack() as held:
        distributed.start(config.distributed)
        distributed.check_same(identity(config))
        with distributed.together():
            mesh = check(config)
            given = tokenizer_of(config)
            known = corpus.identify(config.data)
            check_size(config, known)
            config = replace(config, data=known.config)
            place = folder.run_place(run_folder(config), identity(config))
            folder.claim(place, held)
            cache = cache_of(config)
            checks.check_writable("--data.cache", cache)
        distributed.check_same({"corpus": config.data.digest})
        if known.counts is not None:
            say(f"corpus: {known.counts.words()}, sha256 {str(config.data.digest)[:16]}")
        streamed = int(config.train.tokens) if known.counts is None else None
        data = token_file.tokenised(known, config.model.vocab_size, cache, given, streamed)
        train, validation = (
            TokenRows(part, config.data.context) for part in (data.train, data.validation)
        )
        with distributed.together():
            check_rows(config, train, mesh)
        base = base_model(config, data.tokenizer, mesh)
        root = folder.enter(place, held)
        tracker = Timed(root, reporters.chosen(config.report_to, False), identity(config))
        run = Run(root, mesh, config.seed, tracker, notes=[f"Corpus: {data.words}."], about=ABOUT)
        size, where = num_parameters(base.params) / 1e6, remote.home(root)
        tokens = f"{len(train.part.tokens):,} tokens, {len(validation.part.tokens):,} held out"
        say(f"{config.preset}: {size:.1f} M parameters, {tokens}, run folder {where}")
        yield Opened(started(run, since), config, train, validation, base.to_host())


def check(config: PretrainConfig) -> Any:
    """Everything that is known before the corpus is read; returns the mesh.

    Raises:
        UserError: a number out of range, an unknown name, a mesh or a budget that does not fit.
    """
    checks.check_numbers(config)
    optimizers.check(config.optimizer)
    optimizers.check_pair(config.optimizer, "sum", *objectives.resolve("nll"))
    checks.check_blocks(config.optimizer, config.model.num_layers)
    corpus.check(config.data)
    reporters.check(reporters.chosen(config.report_to, False))
    if config.profile is not None:
        checks.check_writable("--profile", config.profile)
    remote.check(config.output, "--output")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_heads(mesh, config.model.num_heads)
    decoder_of(config)
    rows, _ = batch_rows(config, sharding.batch_ways(mesh))
    optimizers.check_mesh(config.optimizer, mesh, rows)
    optimizers.check_steps(config.optimizer, num_steps(config))
    return mesh


def decoder_of(config: PretrainConfig) -> Decoder:
    """The decoder, without its weights.

    Raises:
        UserError: sizes that do not go together.
    """
    m = config.model
    kv_heads = m.num_heads if m.num_kv_heads is None else m.num_kv_heads
    rotary = "positions" not in FAMILIES[m.family].fields
    base_models.check_sizes(m.hidden_size, m.num_heads, kv_heads, rotary)
    shape = new_config(
        m.family,
        vocab_size=-(-m.vocab_size // 64) * 64,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=kv_heads,
        context=config.data.context,
        tie_embeddings=m.tie_embeddings,
        dtype=m.dtype,
    )
    return Decoder(shape, m.remat)


def tokenizer_of(config: PretrainConfig) -> Tokenizer | None:
    """The tokenizer that is given; None: one is trained.

    Raises:
        UserError: it is not found, or has more ids than the model.
    """
    name = config.data.tokenizer
    if name == "train":
        return None
    try:
        here = hub.local(name) if hub.is_here(name) else hub.download(name, weights=False)
        found = Tokenizer.from_folder(here)
    except UserError as error:
        raise UserError(f"--data.tokenizer {error}; or use --data.tokenizer train") from None
    if found.largest_id >= config.model.vocab_size:
        raise UserError(
            f"--data.tokenizer {name} has ids up to {found.largest_id}, the model "
            f"{config.model.vocab_size} (--model.vocab-size); give at least {found.largest_id + 1}"
        )
    return found


def check_size(config: PretrainConfig, known: corpus.Known) -> None:
    """Raise `UserError` for a corpus that cannot fill a batch, whatever the tokenizer."""
    batch = config.train.batch_tokens
    if known.counts is not None and known.counts.num_bytes + 2 * known.counts.documents < batch:
        raise UserError(
            f"the corpus ({known.counts.words()}) has fewer than the {batch} tokens of a step; "
            "give more text, or lower --train.batch-tokens"
        )


def check_rows(config: PretrainConfig, rows: TokenRows, mesh: Any) -> None:
    """Raise `UserError` for fewer rows than a batch has."""
    batch, _ = batch_rows(config, sharding.batch_ways(mesh))
    if len(rows) < batch:
        raise UserError(
            f"the corpus has {len(rows.part.tokens)} training tokens, {len(rows)} row(s) of "
            f"--data.context {rows.context}, fewer than the {batch} of a step; give more text, or "
            "lower --train.batch-tokens"
        )


def base_model(config: PretrainConfig, tokenizer: Tokenizer, mesh: Any) -> Model:
    """The model with random weights, laid out on the mesh where it is drawn.

    Raises:
        UserError: it does not fit in memory.
    """
    decoder = decoder_of(config)
    shapes = decoder.shapes()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    bounds.check_memory(size, "--model.hidden-size and the other sizes", "make it smaller")
    where = sharding.param_shardings(shapes, mesh)
    params = jax.jit(decoder.init, out_shardings=where)(jax.random.key(config.seed))
    return Model(decoder, params, tokenizer, params_sha256(params))


def cache_of(config: PretrainConfig) -> Path:
    """The folder of tokenised corpora, on this machine."""
    if config.data.cache is not None:
        return config.data.cache
    output = run_folder(config)
    return (Path("runs") if remote.is_remote(output) else output.parent) / "corpora"


def identity(config: PretrainConfig) -> dict[str, Any]:
    """What `config.json` holds."""
    return configs.identity(config, "data.cache")


def train(opened: Opened) -> Model:
    """The training stage: the rows of the corpus, epoch by epoch, evaluated on held-out ones."""
    run, config, base = opened.run, opened.config, opened.base
    held_out = first_rows(opened.validation, config.evaluate.curve_tokens)

    def look(model: Model) -> dict[str, float]:
        at_once = config.train.micro_tokens
        timed = (
            run.tracker.looking() if isinstance(run.tracker, Timed) else contextlib.nullcontext()
        )
        with timed:
            found = row_losses(model, opened.validation, held_out, run.mesh, at_once)
        return {"validation_loss": mean_loss(found)}

    stage = stage_of(config, sharding.batch_ways(run.mesh))
    recipe = Recipe(stage, config.optimizer, profile=config.profile)
    with phase(run, STAGE):
        return train_stage(
            run,
            STAGE,
            base,
            objectives.resolve("nll"),
            {"train": opened.train},
            recipe,
            record=stored.NAME,
            watch=(Watch(look, config.train.curve_points),),
        )


def first_rows(rows: TokenRows, tokens: int | None) -> np.ndarray:
    """The first rows, of about that many tokens; None: all."""
    count = len(rows) if tokens is None else min(len(rows), -(-tokens // rows.context))
    return np.arange(count)


def seen_rows(opened: Opened, count: int) -> np.ndarray:
    """The first `count` of the rows that were trained on."""
    rows, config = opened.train, opened.config
    batch, _ = batch_rows(config, sharding.batch_ways(opened.run.mesh))
    order = rows.epoch_order(seed_of(config.seed, STAGE), "train", 0)
    return order[np.arange(min(count, batch * num_steps(config), len(rows)))]


def judge(opened: Opened, trained: Model) -> dict[str, Any]:
    """The numbers of `summary.json`: perplexities, speed, and what was trained."""
    run, config = opened.run, opened.config
    held_out = first_rows(opened.validation, config.evaluate.tokens)
    seen = seen_rows(opened, len(held_out))

    def compute() -> Any:
        model, at_once = trained.to_device(), config.train.micro_tokens
        log = {}
        for name, rows, which in (
            ("val_perplexity", opened.validation, held_out),
            ("train_perplexity", opened.train, seen),
        ):
            found = row_losses(model, rows, which, run.mesh, at_once, name.replace("_", " "))
            items = {
                str(row): {"nll": nats, "labels": int(labels)}
                for row, (nats, labels) in zip(which.tolist(), found.tolist(), strict=True)
            }
            perplexity = math.exp(min(mean_loss(found), 700.0))
            log[name] = {"agg_value": perplexity, "value_by_index": items}
        return log

    def speed() -> float | None:
        seconds = run.tracker.seconds() if isinstance(run.tracker, Timed) else None
        return None if seconds is None else config.train.batch_tokens / seconds

    inputs = {
        **trained.identity(),
        "train": opened.train.identity(),
        "validation": opened.validation.identity(),
        "rows": [len(held_out), seen.tolist()],
        "version": 1,
    }
    with phase(run, f"evaluate {STAGE}"):
        log = json_stage(run.folder / "evals" / f"{STAGE}.json", inputs, compute)
        pace = json_stage(run.folder / "computed" / "speed.json", {"params": trained.sha}, speed)
    flat = {
        **means(log, METRICS),
        "tokens": num_steps(config) * config.train.batch_tokens,
        "tokens_per_second": pace,
        "mfu": utilisation(trained.decoder, config.data.context, pace, run.mesh),
        "num_parameters": num_parameters(trained.params),
        "params_sha256": trained.sha,
    }
    return {STAGE: flat}


def export(opened: Opened, trained: Model, summary: dict[str, Any]) -> None:
    """`RUN/export`: the model as an HF folder, with a card."""
    run, config = opened.run, opened.config
    found = summary[STAGE]
    text = cards.plain(
        f"A language model trained from random weights on {found['tokens']:,} tokens "
        f"({config.preset}, seed {config.seed}) with jaxlib-unlearn. Validation perplexity "
        f"{found['val_perplexity']:.4g}. It continues texts, and answers no questions.",
        trained.sha,
        chat=False,
        **({"prompt": "import numpy as"} if config.data.source == "packages" else {}),
    )
    with phase(run, "export"):
        export_model(trained, run.folder / "export", config.export_dtype, text, speaks=False)


def report(opened: Opened, summary: dict[str, Any]) -> None:
    """`summary.json`, the page and its pictures, and the table on the terminal."""
    ending.publish(opened.run, summary)
