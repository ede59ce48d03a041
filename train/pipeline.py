"""The stages of a run as functions: base, original, oracle, unlearned (see `train/unlearn.py`)."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import jax

import models
from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Objective
from models import Decoder, DecoderConfig, Tokenizer, bounds, lora
from models.hub import check_source
from models.policy import head_of
from models.weights import find_smollm2
from train import loop
from train.config import LoraConfig, ModelConfig, RunConfig, TrainConfig, UnlearnConfig
from train.data.examples import Encoded, encode_rows
from train.data.streams import (
    Stream,
    batches_of,
    make_stream,
    needs_head,
    pack_streams,
    with_references,
)
from train.data.tofu import refusal_rows
from train.evaluators.evaluation import Model, curve, longest
from train.optimizers import Options, check_pair, check_steps
from train.runtime import distributed, remote, residency, seal, sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.keys import stage_inputs
from train.runtime.stages import params_stage
from train.runtime.tracking import Tracker, say
from train.step import Trainable, all_of
from train.tasks.task import Row, Task, alternate_rows, texts

CURVE_ROWS = 40


def train_tokenizer(task: Task, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the task's own texts."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    backend = Backend(kinds.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(task), trainer)
    return Tokenizer(
        backend, eos_id=backend.token_to_id("<eos>"), pad_id=backend.token_to_id("<pad>")
    )


def scratch_shape(m: ModelConfig, vocab_size: int, context: int) -> DecoderConfig:
    """The shape of a model that starts from random weights.

    Raises:
        UserError: sizes that do not divide one another.
    """
    if m.hidden_size % m.num_heads or m.num_heads % m.num_kv_heads:
        raise UserError(
            f"--model.hidden-size {m.hidden_size}, --model.num-heads {m.num_heads} and "
            f"--model.num-kv-heads {m.num_kv_heads} must divide one another in this order"
        )
    if m.hidden_size // m.num_heads % 2:
        raise UserError(
            f"--model.hidden-size {m.hidden_size} over --model.num-heads {m.num_heads} gives "
            "an odd head size, which rotary positions cannot split; use an even one"
        )
    return DecoderConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.hidden_size // m.num_heads,
        max_position_embeddings=context,
        dtype=m.dtype,
    )


def base_model(config: RunConfig, task: Task, mesh: Any) -> Model:
    """The model before any fine-tuning: random and tiny (`scratch`), or loaded.

    Raises:
        UserError: nothing is found at the path.
    """
    m = config.model
    if m.path == "scratch":
        tokenizer = train_tokenizer(task, m.vocab_size)
        shape = scratch_shape(m, tokenizer.vocab_size, config.data.max_length)
        sharding.check_heads(mesh, m.num_heads)
        decoder = Decoder(shape, m.remat)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoder.shapes()))
        bounds.check_memory(size, "--model.hidden-size and the other sizes", "make it smaller")
        params = sharding.put_params(jax.jit(decoder.init)(jax.random.key(config.seed)), mesh)
        model = Model(decoder, params, tokenizer, params_sha256(params))
    else:
        model = load_model(m.path, m.remat, mesh, m.dtype, m.revision, task.notes)
    return masking_pad_ids(model) if m.mask_all_pad_id_tokens else model


def masking_pad_ids(model: Model) -> Model:
    """The model with every token that is its padding token left out of attention.

    Raises:
        UserError: the tokenizer has no padding token.
    """
    if model.tokenizer.pad_id is None:
        raise UserError(
            "--model.mask-all-pad-id-tokens: the tokenizer has no padding and no end token; leave "
            "the option out"
        )
    shape = dataclasses.replace(model.decoder.config, unattended=model.tokenizer.pad_id)
    return model._replace(decoder=dataclasses.replace(model.decoder, config=shape))


def model_source(path: str) -> str | Path:
    """What `models.load` takes for a `--model.path`: `smollm2` is the installed package's file.

    Raises:
        UserError: that package is not installed.
    """
    if path != "smollm2":
        return path
    found = find_smollm2()
    if found is None:
        raise UserError(
            "SmolLM2 is not installed; run `make smollm2`, or give --model.path a folder or "
            ".gguf file"
        )
    return found


def check_model(path: str, revision: str | None = None) -> None:
    """Raise `UserError` for a `--model.path` where nothing can be, before anything is read."""
    if path != "scratch":
        check_source(model_source(path), revision)
    elif revision is not None:
        raise UserError("--model.revision does not go with --model.path scratch; leave it out")


def load_model(
    path: str,
    remat: str,
    mesh: Any,
    dtype: str = "float32",
    revision: str | None = None,
    notes: list[str] | None = None,
) -> Model:
    """A model from an HF folder, a `.gguf` file, a Hub id or `smollm2`, to compute in `dtype`.

    Of a Hub id the commit is said, and added to `notes`.

    Raises:
        UserError: nothing is found at the path, an export there is damaged, or the mesh splits more
            heads than there are.
    """
    distributed.of_first(lambda: seal.check(Path(path).expanduser()))
    with distributed.together():
        loaded = models.load(
            model_source(path),
            revision=revision,
            shardings=lambda name, shape: sharding.sharding_of(name, shape, mesh),
        )
        sharding.check_heads(mesh, loaded.decoder.config.num_heads)
    if loaded.commit is not None:
        note = f"model: {path} at commit {loaded.commit}"
        say(note)
        if notes is not None:
            notes.append(note)
    shape = dataclasses.replace(loaded.decoder.config, dtype=dtype)
    decoder = dataclasses.replace(loaded.decoder, config=shape, remat=remat)
    return Model(decoder, loaded.params, loaded.tokenizer, params_sha256(loaded.params))


def encode(model: Model, rows: list[Row], config: RunConfig, what: str) -> Encoded:
    """Tokenise a stream; cut and dropped rows are said."""
    limit = longest(model, config.data.max_length)
    encoded = encode_rows(
        model.tokenizer, rows, system_prompt=config.data.system_prompt, max_length=limit
    )
    if encoded.num_cut or encoded.num_dropped:
        say(
            f"{what}: {encoded.num_cut} example(s) cut at {limit} tokens, {encoded.num_dropped} "
            "left out (prompt too long)"
        )
    return encoded


def stream_of(model: Model, encoded: Encoded, batch_size: int) -> Stream:
    """A training stream of encoded examples."""
    return make_stream(encoded.examples, model.tokenizer.pad_id or 0, batch_size=batch_size)


def num_steps(config: TrainConfig | UnlearnConfig, rows: int, optimizer: Options) -> int:
    """Optimizer steps of a stage.

    Raises:
        UserError: there is none, or the optimizer cannot take that many.
    """
    steps = (
        config.steps
        if config.steps is not None
        else round(config.epochs * rows / config.batch_size)
    )
    if steps < 1:
        raise UserError(f"a stage of {rows} rows has no step; raise its epochs or steps")
    check_steps(optimizer, steps)
    return steps


def finetune(
    config: RunConfig,
    base: Model,
    rows: list[Row],
    name: str,
    root: Path,
    mesh: Any,
    tracker: Tracker,
) -> Model:
    """Plain fine-tuning of `base`: the original (forget + retain) or the oracle (retain alone)."""
    encoded = encode(base, rows, config, name)
    return train_stage(
        base,
        streams={"train": stream_of(base, encoded, config.finetune.batch_size)},
        objective=objectives.resolve("nll"),
        stage=config.finetune,
        optimizer=config.finetune.optimizer,
        row_tokens=config.data.row_tokens,
        name=name,
        seed=config.seed,
        root=root,
        mesh=mesh,
        tracker=tracker,
        cache=config.stage.cache,
    )


def stream_rows(objective: Objective, task: Task, seed: int) -> dict[str, list[Row]]:
    """The rows of every stream that an objective reads.

    Raises:
        UserError: the task has none for a stream.
    """
    rows = {
        "forget": lambda: task.forget,
        "retain": lambda: task.retain,
        "idk": lambda: refusal_rows(task.forget, task.refusals, seed),
        "alternate": lambda: alternate_rows(task.forget),
        "train": lambda: task.forget + task.retain,
    }
    return {name: rows[name]() for name in objective.streams}


def unlearn(
    config: RunConfig, original: Model, task: Task, root: Path, mesh: Any, tracker: Tracker
) -> Model:
    """The unlearning stage: the objective's streams, its caches, its optimizer."""
    objective, options = objectives.resolve(config.objective)
    streams = {
        name: stream_of(original, encode(original, rows, config, name), config.unlearn.batch_size)
        for name, rows in stream_rows(objective, task, config.seed).items()
    }
    return train_stage(
        original,
        streams=streams,
        objective=(objective, options),
        stage=config.unlearn,
        optimizer=config.optimizer,
        row_tokens=config.data.row_tokens,
        name="unlearned",
        seed=config.seed,
        root=root,
        mesh=mesh,
        tracker=tracker,
        watch=(task, config),
        combine=config.combine,
        adapters=config.lora,
        profile=config.profile,
    )


def trainable_of(start: Model, row: Objective, adapters: LoraConfig | None, seed: int) -> Trainable:
    """What a stage trains: the parameters of a model, or adapters beside them.

    Of a parked model only what a step reads is brought to the device: it and its copy that is
    trained never lie there together.
    """
    params = start.params
    if adapters is None or adapters.rank is None:
        head = residency.at_hand(head_of(params)) if needs_head(row) else None
        return all_of(params, head)
    params = residency.at_hand(params)
    options = {"scale": adapters.scale}
    return Trainable(
        lora.init(params, adapters.rank, adapters.targets, seed),
        params,
        functools.partial(lora.bind, **options),
        lambda trainable: lora.view(trainable, params, **options),
        lambda trainable: lora.merge(trainable, params, **options),
    )


def export_adapter(trained: Any, adapters: LoraConfig, config: RunConfig, root: Path) -> None:
    """Write `RUN/adapter`: what was trained beside the original, in PEFT's format.

    It belongs to the original as the run has it: the given one, or that trained in the run, which
    `train.export RUN RUN/original --model original` writes where the adapter looks for it.
    """
    from train.reporting import card

    home = remote.home(root)
    given = config.stage.original
    base, known = str(home / "original"), False
    if given is not None and not given.endswith(".gguf") and given != "smollm2":
        base, known = str(Path(given).absolute()) if Path(given).exists() else given, True
    rank = adapters.rank or 1
    what = f"LoRA adapters of rank {rank} in PEFT's format, trained by jaxlib-unlearn to forget."
    command = f"python -m train.export {home} {home / 'original'} --model original"
    with distributed.together():
        models.export_adapter(
            trained,
            root / "adapter",
            rank=rank,
            alpha=rank if adapters.alpha is None else adapters.alpha,
            base=base,
            card=card.of_adapter(what, base, None if known else command),
        )


def train_stage(
    start: Model,
    *,
    streams: dict[str, Stream],
    objective: tuple[Objective, Any],
    stage: TrainConfig | UnlearnConfig,
    optimizer: Options,
    name: str,
    seed: int,
    root: Path,
    mesh: Any,
    tracker: Tracker,
    row_tokens: int = 0,
    watch: tuple[Task, RunConfig] | None = None,
    cache: Path | None = None,
    combine: str = "sum",
    adapters: LoraConfig | None = None,
    profile: Path | None = None,
) -> Model:
    """One stage of training: found by the digest of what it is made from, or computed."""
    row, options = objective
    objectives.check_accumulation(row, stage.accumulate)
    check_pair(optimizer, combine, row, options)
    sharding.check_batch(mesh, stage.batch_size, stage.accumulate, name)
    divides = stage.batch_size // (sharding.batch_ways(mesh) * stage.accumulate)
    streams = pack_streams(streams, stage.batch_size, divides, row_tokens if row.packable else 0)
    main = row.streams[0]
    steps = num_steps(stage, len(streams[main].examples), optimizer)
    # A stage's purpose keys its randomness: two stages of one seed see different orders.
    stage_seed = seed * 2**32 + zlib.crc32(name.encode())
    inputs = stage_inputs(
        start.sha,
        start.decoder.config,
        streams,
        objective=options,
        optimizer=optimizer,
        combine=combine,
        steps=steps,
        batch_size=stage.batch_size,
        seed=stage_seed,
        adapters=adapters,
        accumulate=stage.accumulate if row.per_micro_batch else None,
    )

    def look(params: Any) -> dict[str, float]:
        assert watch is not None
        task, config = watch
        return curve(
            start._replace(params=params),
            task,
            config.data.system_prompt,
            config.data.max_length,
            mesh,
            config.evaluate.score_tokens,
            CURVE_ROWS,
        )

    computed: list[str] = []

    def compute(checkpoints: Path) -> Any:
        computed.append(name)
        with distributed.interruptible():
            ready = with_references(
                streams, row, options, start.decoder, start.params, start.sha, mesh, root
            )
        training = trainable_of(start, row, adapters, seed)
        plan = loop.Stage(
            name=name,
            steps=steps,
            batches=batches_of(
                ready,
                main,
                stage_seed,
                stage.batch_size,
                sharding.rows_here(mesh, stage.batch_size),
            ),
            batch_size=stage.batch_size,
            objective=row,
            options=options,
            optimizer=optimizer,
            accumulate=stage.accumulate,
            checkpoints=checkpoints,
            checkpoint_seconds=stage.checkpoint_seconds,
            curve=None if watch is None else lambda trainable: look(training.view(trainable)),
            curve_steps=loop.curve_steps(steps, stage.curve_points),
            combine=combine,
            bind=training.bind,
            profile=profile,
        )
        trained = loop.run(plan, start.decoder, training.start, training.frozen, mesh, tracker)
        if adapters is not None and adapters.rank is not None and watch is not None:
            export_adapter(trained, adapters, watch[1], root)
        return training.finish(trained)

    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        start.params,
        sharding.param_shardings(start.params, mesh),
    )
    params, sha = params_stage(root, name, inputs, like, compute, cache)
    if profile is not None and not computed:
        say(f"--profile {profile}: nothing traced, stage {name} was done already")
    return Model(start.decoder, params, start.tokenizer, sha)
