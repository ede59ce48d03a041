"""End-to-end benchmarks of unlearning against what a user of torch and transformers would run.

    python tests/bench/peers.py [--only npo generate] [--repeats 5] [--data DIR] [--model PATH]
                                [--huge-pages-for-both]

Both sides start from the same weights (SmolLM2, float32, on the CPU) and see the same rows of TOFU.
They alternate in turns of two steps, so both see the same machine; torch runs in a separate process
(`torch_peers.py`), whose threads are idle while JAX computes; like a user's it does not ask for
huge pages (`train.runtime.hugepages`) unless told to. The first step of every shape is not counted;
each number is a median. Ratios are theirs / ours: above 1, ours is faster (or computes fewer token
slots); a goal is a ratio to reach. Every benchmark checks that both sides computed the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from other_side import Turn, asking
from timing import OUT, faster, machine, markdown, publish, shown

import models
from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import likelihood as metrics
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder.generate import SamplingConfig, generate
from train.data.bpe import train_bpe
from train.data.examples import Example, encode_prompt, encode_qa, encode_rows
from train.data.references import with_references
from train.data.stream import Stream
from train.data.streams import Examples, batches_of, make_stream, pack_streams
from train.data.tofu import read_json
from train.data.token_file import Tokens
from train.data.token_rows import TokenRows
from train.engine.base_models import load_model
from train.engine.step import compile_step, init_state, make_step
from train.evaluators import evaluation
from train.evaluators.evaluation import Model, longest, score_items, score_rows
from train.jobs import new_models
from train.options import optimizers
from train.options.config import DataConfig, EvaluateConfig, ModelConfig, replace
from train.options.optimizers import options_of as optimizer_of
from train.presets.pretraining import PRESETS
from train.runtime import hugepages, residency, sharding

HERE = Path(__file__).resolve()
REPO = HERE.parent.parent.parent
SPLITS = ("forget10", "retain90", "forget10_perturbed")
BATCH, SEED = 8, 0
FORGET_ROWS, RETAIN_ROWS, SCORED_ROWS = 80, 400, 40
SAMPLES, NEW_TOKENS = 64, 64
SYSTEM, MAX_LENGTH = "You are a helpful assistant.", 512  # OpenUnlearning's for TOFU
COLD_START = 25.0  # seconds
CLOSE = 1e-4  # nats: float32 sums of two programs; relative to a larger loss
STRIDED = 1e-3  # the same where torch sums a vocabulary in strides (`torch_peers.row_nll`)
TORCH = "torch, transformers"
# How the peer sums a row's NLL (`torch_peers.row_nll`): its name in the table, and NPO's goal.
NPO_FORMS = {
    "transposed": ("OpenUnlearning's way, reference model in the step", 1.5),
    "flat": ("the same with its logits left as they are", None),
}


class Bench(NamedTuple):
    """What every benchmark starts from; `folder` holds the model for transformers."""

    model: Model
    mesh: Any
    rows: dict[str, list[dict[str, Any]]]
    folder: Path
    repeats: int
    options: list[str]  # the command line's model and data, for a separate process
    torch_environment: dict[str, str]


class Result(NamedTuple):
    """The rows of a benchmark, and further notes."""

    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()


def agree(what: str, ours: float, theirs: float, tolerance: float = CLOSE) -> None:
    """Raise `RuntimeError` unless both sides found the same number."""
    if not abs(ours - theirs) <= tolerance:
        raise RuntimeError(f"{what}: ours {ours!r}, theirs {theirs!r}; no common work was timed")


def torch_side(
    bench: Bench, work: str, data: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Callable[[Any], Turn]]:
    """torch's process for a work: a function that sends it a request and returns its turn."""
    first = {"pad": bench.model.tokenizer.pad_id or 0, **data}
    program = HERE.with_name("torch_peers.py")
    return asking(program, work, bench.folder, first, bench.torch_environment)


def take_turns(
    steps: Iterable[tuple[Any, Any, Any]],
    ours: Callable[[Any], Turn],
    theirs: Callable[[Any], Turn],
    check: Callable[[Any, Any], None],
    repeats: int,
) -> tuple[float, float]:
    """Median seconds of both sides over `(shape, our request, their request)`.

    A turn is two steps, of which the second counts. Training steps follow each other; during the
    other side's turn a virtual machine returns memory that a step left free, and the next step
    pays for it (two seconds of seven were seen).
    """
    seen: set[Any] = set()
    counted: list[tuple[float, float]] = []
    steps = iter(steps)
    for turn in zip(steps, steps, strict=True):
        (before, shape), mine, requests = zip(*turn, strict=True)
        found = [ours(one) for one in mine], [theirs(one) for one in requests]
        for a, b in zip(*found, strict=True):
            check(a.value, b.value)
        a, b = (side[1] for side in found)
        seen.add(before)
        kind = "counted" if shape in seen else "first of its shape"
        print(f"ours {a.seconds:.2f} s, theirs {b.seconds:.2f} s ({kind})", file=sys.stderr)
        if shape in seen:
            counted.append((a.seconds, b.seconds))
        seen.add(shape)
        if len(counted) >= repeats:
            break
    mine, other = zip(*counted, strict=True)
    return statistics.median(mine), statistics.median(other)


def encode(bench: Bench, split: str, rows: int) -> list[Example]:
    model = bench.model
    return encode_rows(
        model.tokenizer,
        bench.rows[split][:rows],
        system_prompt=SYSTEM,
        max_length=longest(model, MAX_LENGTH),
    ).examples


def streams_of(bench: Bench, examples: Mapping[str, Sequence[Example]]) -> dict[str, Stream]:
    """The streams of a stage, as `train.engine.run` makes them on one device."""
    pad = bench.model.tokenizer.pad_id or 0
    streams = {name: make_stream(some, pad, batch_size=BATCH) for name, some in examples.items()}
    return pack_streams(streams, BATCH, BATCH, DataConfig().row_tokens)


def batches(
    streams: Mapping[str, Stream], rows: int = BATCH
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """`step -> batches`; the first stream is iterated epoch by epoch."""
    return batches_of(streams, next(iter(streams)), SEED, rows)


def examples_of(stream: Examples, batch: Mapping[str, np.ndarray]) -> list[Any]:
    """The examples in a batch, in the form that the torch side takes."""
    chosen = (stream.examples[i] for i in batch["row_id"].ravel() if i >= 0)
    return [(example.tokens, example.num_prompt) for example in chosen]


def training_steps(streams: Mapping[str, Stream]) -> Iterator[tuple[Any, int, Any]]:
    """For each step: the shapes of its batches, its number, and the same examples for torch."""
    make = batches(streams)
    for step in itertools.count():
        made = make(step)
        shapes = tuple((k, x.shape) for batch in made.values() for k, x in batch.items())
        yield shapes, step, {name: examples_of(streams[name], b) for name, b in made.items()}


def trainer(
    bench: Bench, streams: Mapping[str, Stream], objective: Any, config: Any, rows: int = BATCH
) -> Callable[[int], Turn]:
    """`step -> Turn` as in `train.engine.loop`: rows collated, put on the device, one update."""
    model, mesh = bench.model, bench.mesh
    tx, schedule, needs = optimizers.build(config, 1000)
    params = residency.fresh(model.params, sharding.param_shardings(model.params, mesh))
    state, shardings = init_state(params, tx, mesh)
    method, options = objective
    step = make_step(model.learner, method, options, tx, schedule, 1, needs)
    compiled = compile_step(step, shardings, mesh)
    make, held = batches(streams, rows), [state]
    del params, state

    def run(number: int) -> Turn:
        start = time.perf_counter()
        made = {name: sharding.put_batch(b, mesh) for name, b in make(number).items()}
        held[0], found = compiled(held[0], None, made)
        jax.block_until_ready((held[0], found))
        return Turn(time.perf_counter() - start, {k: float(v) for k, v in found.items()})

    return run


def plain(name: str, learning_rate: float, **options: Any) -> Any:
    """An optimizer at a constant learning rate."""
    return optimizer_of(
        name, learning_rate=learning_rate, schedule="constant", warmup=0.0, **options
    )


ADAMW = plain("adamw", 1e-5, clip_norm=1.0)


def same_loss(ours: Mapping[str, float], theirs: float) -> None:
    agree("loss", ours["loss"], theirs, CLOSE * max(1.0, abs(theirs)))


def npo_side(bench: Bench, forget_rows: int) -> tuple[dict[str, Stream], Any]:
    """The streams of NPO with the reference cached, and the objective with its options."""
    objective, options = objectives.resolve(objective_of("npo", retain="nll"))
    some = {
        "forget": encode(bench, "forget10", forget_rows),
        "retain": encode(bench, "retain90", RETAIN_ROWS),
    }
    streams, m = streams_of(bench, some), bench.model
    with tempfile.TemporaryDirectory() as cache:
        streams = with_references(
            streams, objective, options, m.decoder, m.params, m.sha, bench.mesh, Path(cache)
        )
    return streams, (objective, options)


def npo(bench: Bench) -> Result:
    """One NPO step; the reference is cached on our side and runs in each step of torch's side."""
    streams, chosen = npo_side(bench, FORGET_ROWS)
    work, rows = f"NPO step, {BATCH} forget + {BATCH} retain rows, s", []
    for form, (peer, goal) in NPO_FORMS.items():
        ours = trainer(bench, streams, chosen, ADAMW)
        data = {"form": form, "beta": chosen[1].beta, "learning_rate": ADAMW.learning_rate}
        with torch_side(bench, "npo", data) as theirs:
            seconds = take_turns(training_steps(streams), ours, theirs, same_loss, bench.repeats)
        rows.append(faster(work, peer, *seconds, goal))
    return Result(rows)


def finetune(bench: Bench) -> Result:
    """One fine-tuning step; real tokens are those that are not padding."""
    streams = streams_of(bench, {"train": encode(bench, "retain90", RETAIN_ROWS)})
    ours = trainer(bench, streams, objectives.resolve("nll"), ADAMW)
    with torch_side(bench, "finetune", {"learning_rate": ADAMW.learning_rate}) as theirs:
        seconds = take_turns(training_steps(streams), ours, theirs, same_loss, bench.repeats)
    real = BATCH * statistics.mean(len(e.tokens) for e in streams["train"].examples)
    speeds = " and ".join(f"{real / s:.0f}" for s in seconds)
    note = f"fine-tuning: {real:.0f} real tokens a step on average, {speeds} tokens/s"
    return Result([faster(f"fine-tuning step, {BATCH} rows, s", TORCH, *seconds, 1.1)], [note])


def pretrain(bench: Bench) -> Result:
    """One pre-training step of pretrain-tiny's shape as a GPT-2, on rows of random tokens.

    Every row is a document: transformers' rows see all that comes before in them.
    """
    config = replace(
        PRESETS["pretrain-tiny"].PRESET, **{"model.family": "gpt2", "optimizer": ADAMW}
    )
    decoder, context = new_models.decoder_of(config), config.data.context
    rows = config.train.batch_tokens // context
    tokenizer = train_bpe(
        [row["answer"] for row in bench.rows["retain90"]], config.model.vocab_size
    )
    ids = np.random.default_rng(SEED).integers(0, tokenizer.vocab_size, 64 * rows * context)
    part = Tokens(ids.astype(np.uint16), np.arange(0, len(ids), context), "random")
    streams: dict[str, Stream] = {"train": TokenRows(part, context)}
    params = jax.jit(decoder.init)(jax.random.key(SEED))
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "gpt2"
        models.export(models.Loaded(decoder.config, params, tokenizer), there)
        model = Model(decoder, params, tokenizer, "random")
        here = bench._replace(model=model, folder=there)
        make = batches(streams, rows)
        steps = (
            ("one", step, {"rows": make(step)["train"]["tokens"].tolist()})
            for step in itertools.count()
        )
        ours = trainer(here, streams, objectives.resolve("nll"), ADAMW, rows)
        with torch_side(here, "pretrain", {"learning_rate": ADAMW.learning_rate}) as theirs:
            seconds = take_turns(steps, ours, theirs, same_loss, bench.repeats)
    work = f"pre-training step, GPT-2 of 4 x 192, {rows} rows of {context} tokens, s"
    return Result([faster(work, TORCH, *seconds, 1.0)])


def check_draws(bench: Bench, side: str, prompt: Sequence[int], draws: Sequence[Any]) -> None:
    """Raise `RuntimeError` unless samples are what the model draws at temperature 1.

    At every token log p(y) is a draw with mean mu = sum p log p and variance var; so the sum of
    log p(y) - mu over all tokens lies within three standard errors, sqrt(sum var), of 0.
    """
    if [len(tokens) for tokens in draws] != [NEW_TOKENS] * SAMPLES:
        raise RuntimeError(f"generate: {side} did not return {SAMPLES} samples of {NEW_TOKENS}")
    items = [Example([*prompt, *tokens], len(prompt)) for tokens in draws]
    tokens = EvaluateConfig().score_tokens
    scored = score_items(bench.model, items, bench.mesh, tokens, f"score what {side} drew")
    surplus = float(sum((s["logp"] - s["mu"]).sum() for s in scored))
    spread = math.sqrt(sum(s["var"].sum() for s in scored))
    if not abs(surplus) <= 3 * spread:
        raise RuntimeError(f"generate: {side} is {surplus / spread:.1f} standard errors off")


def samples(bench: Bench) -> Result:
    """Samples of one length for one question, drawn from the whole distribution."""
    model, question = bench.model, bench.rows["forget10"][0]["question"]
    prompt = encode_prompt(model.tokenizer, question, system_prompt=SYSTEM)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=NEW_TOKENS)

    def ours(seed: int) -> Turn:
        start = time.perf_counter()
        (found,) = generate(
            model.decoder,
            model.params,
            [prompt],
            sampling=sampling,
            stop_ids=(),
            pad_id=model.tokenizer.pad_id or 0,
            seed=seed,
            num_samples=SAMPLES,
            batch_size=SAMPLES,
        )
        return Turn(time.perf_counter() - start, found)

    drawn: list[tuple[Any, Any]] = []
    data = {"prompt": prompt, "samples": SAMPLES, "tokens": NEW_TOKENS}
    steps = (("one", seed, None) for seed in itertools.count())
    with torch_side(bench, "generate", data) as theirs:
        seconds = take_turns(steps, ours, theirs, lambda *both: drawn.append(both), bench.repeats)
    for side, draws in zip(("ours", "torch"), drawn[0], strict=True):
        check_draws(bench, side, prompt, draws)
    work = f"{SAMPLES} samples of {NEW_TOKENS} tokens, s"
    return Result([faster(work, "transformers, generate", *seconds, 1.5)])


def summarize(scored: Mapping[str, Any]) -> dict[str, float]:
    """Means over a split of the metrics that OpenUnlearning makes of its likelihoods."""
    answers, wrong = scored["answers"], [s for some in scored["perturbed"] for s in some]
    kinds = {"answers": answers, "paraphrased": scored["paraphrased"], "perturbed": wrong}
    found = {kind: [-metrics.avg_loss(s) for s in some] for kind, some in kinds.items()}
    found["extraction_strength"] = [metrics.extraction_strength(s) for s in answers]
    found["exact_memorization"] = [metrics.exact_memorization(s) for s in answers]
    for attack, score in metrics.ATTACKS.items():
        found[attack] = [score(s) for s in answers]
    return {name: float(np.mean(values)) for name, values in found.items()}


def likelihood(bench: Bench) -> Result:
    """All metrics of a split's likelihoods: one fused pass against one pass per metric.

    The first step, not counted, is exact in torch as well; the others use OpenUnlearning's form.
    """
    model = bench.model
    rows, limit = bench.rows["forget10_perturbed"][:SCORED_ROWS], longest(model, MAX_LENGTH)
    put, slots = sharding.put_batch, []

    def counted(batch: Any, mesh: Any) -> Any:
        slots.append(batch["tokens"].size)
        return put(batch, mesh)

    def ours(_: Any) -> Turn:
        slots.clear()
        tokens, start = EvaluateConfig().score_tokens, time.perf_counter()
        with mock.patch.object(evaluation, "put_batch", counted):
            scored = score_rows(model, rows, SYSTEM, limit, bench.mesh, tokens, "score")
        found = summarize(scored)
        return Turn(time.perf_counter() - start, found | {"slots": sum(slots)})

    def example(asked: Mapping[str, Any], answer: str) -> Any:
        options = {"system_prompt": SYSTEM, "max_length": limit}
        return tuple(encode_qa(model.tokenizer, asked["question"], answer, **options)[:2])

    def check(mine: dict[str, float], other: dict[str, float]) -> None:
        tolerance = CLOSE if not computed else STRIDED
        for name in mine.keys() - {"slots"}:
            agree(f"likelihood, {name}", mine[name], other[name], tolerance)
        computed[:] = mine["slots"], other["slots"]

    computed: list[float] = []
    answers = [example(r, r["answer"]) for r in rows]
    wrong = zip(*([example(r, a) for a in r["perturbed_answer"]] for r in rows), strict=True)
    data = {
        "answers": answers,
        "paraphrased": [example(r, r["paraphrased_answer"]) for r in rows],
        "perturbed": list(wrong),
        "texts": [model.tokenizer.decode(tokens[prompt:]) for tokens, prompt in answers],
    }
    with torch_side(bench, "likelihood", data) as theirs:
        timed = itertools.repeat(("one", None, "transposed"))
        steps = itertools.chain([("one", None, "flat")], timed)
        seconds = take_turns(steps, ours, theirs, check, bench.repeats)
    work, peer = f"likelihood metrics of {len(rows)} rows", "a pass each, as OpenUnlearning"
    counts = faster(f"{work}, token-forwards", peer, computed[0], computed[1], 4.0)
    return Result([counts, faster(f"{work}, s", peer, *seconds, 2.0)])


def zeroth(bench: Bench, config: Any, data: Mapping[str, Any]) -> tuple[float, float]:
    """Steps of a zeroth-order optimizer on one batch.

    The loss at the first point is the same. Later ones depend on the directions drawn: with MeZO
    hardly at all, so they show that torch's side undoes its perturbations. How far a ZO-Muon step
    goes depends little on the draws: all singular values become about 1.
    """
    streams = streams_of(bench, {"train": encode(bench, "forget10", FORGET_ROWS)})
    ours = trainer(bench, streams, objectives.resolve("nll"), config)
    _, _, rows = next(training_steps(streams))
    tolerances = itertools.chain([CLOSE], itertools.repeat(1e-2))

    def check(mine: dict[str, float], other: dict[str, float]) -> None:
        tolerance = next(tolerances)
        if tolerance == CLOSE or config.name == "mezo":
            agree(f"{config.name}, loss", mine["loss"], other["loss"], tolerance)
        if "update_norm" in other:
            ratio = mine["update_norm"] / other["update_norm"]
            agree(f"{config.name}, ratio of a step's lengths", ratio, 1.0, 0.1)

    rest = dict(learning_rate=config.learning_rate, eps=config.perturbation)
    with torch_side(bench, config.name, {**rest, **data, **rows}) as theirs:
        steps = itertools.repeat(("one", 0, None))
        return take_turns(steps, ours, theirs, check, bench.repeats)


def mezo(bench: Bench) -> Result:
    """One MeZO step."""
    seconds = zeroth(bench, plain("mezo", 1e-7), {})
    return Result([faster(f"MeZO step, {BATCH} rows, s", "torch, in place", *seconds, 1.0)])


def zo_muon(bench: Bench) -> Result:
    """One ZO-Muon step of rank 64 and 4 queries."""
    config = plain("zo-muon", 1e-2, rank=64, queries=4)
    more = {"rank": config.rank, "queries": config.queries}
    more |= {"refresh": config.refresh, "vector_rate": config.vector_rate}
    seconds = zeroth(bench, config, more)
    return Result([faster(f"ZO-Muon step, {BATCH} rows, s", "torch, in place", *seconds, 1.0)])


def cold_start(bench: Bench) -> Result:
    """From the start of a process to its first NPO step, with a warm JAX compilation cache."""
    command = [sys.executable, str(HERE), "--first-step", *bench.options]
    found = []
    with tempfile.TemporaryDirectory() as cache:
        more = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for _ in range(2):
            start = time.perf_counter()
            with subprocess.Popen(
                command, env=os.environ | more, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout
                told = process.stdout.readline()
                seconds = time.perf_counter() - start
            if process.returncode or not told:
                raise RuntimeError("cold start: the process failed; its error stands above")
            found.append(Turn(seconds, float(told)))
    cold, warm = found
    agree("cold start, loss", warm.value, cold.value)
    note = f"cold start: {cold.seconds:.1f} s with an empty compilation cache"
    work, peer = "cold start to first step, s", f"{COLD_START:.0f} s"
    return Result([faster(work, peer, warm.seconds, COLD_START, 1.0)], [note])


def first_step(bench: Bench) -> None:
    """What `cold_start` times: the reference of one batch, and an NPO step; prints its loss."""
    ours = trainer(bench, *npo_side(bench, BATCH), ADAMW)
    print(ours(0).value["loss"], flush=True)


WORKS: dict[str, Callable[[Bench], Result]] = {
    "npo": npo,
    "finetune": finetune,
    "pretrain": pretrain,
    "generate": samples,
    "likelihood": likelihood,
    "mezo": mezo,
    "zo-muon": zo_muon,
    "cold-start": cold_start,
}


def read_rows(folder: Path | None) -> dict[str, list[dict[str, Any]]]:
    """TOFU's splits.

    Raises:
        UserError: there is no folder, or a file is missing from it.
    """
    if folder is None:
        shared = Path(os.environ.get("JAXLIB_UNLEARN_SHARED") or REPO.parent / "shared")
        folder = shared / "data" / "tofu"
    missing = [f"{name}.json" for name in SPLITS if not (folder / f"{name}.json").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}; give --data a folder with TOFU's JSON "
            f"files {', '.join(SPLITS)}"
        )
    return {name: read_json(folder / f"{name}.json") for name in SPLITS}


def start(args: argparse.Namespace, folder: Path) -> Bench:
    """Rows and model as the benchmarks take them; the export is for torch's side alone.

    Raises:
        UserError: data, torch, transformers or the model is missing.
    """
    rows = read_rows(args.data)
    if jax.default_backend() != "cpu":
        raise UserError("torch's side computes on the CPU: set JAX_PLATFORMS=cpu")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    if not args.first_step:
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                raise UserError(f"{name} is not installed; run `make bench-peers`")
    model = load_model(args.model, ModelConfig().remat, mesh)
    if not args.first_step:
        config, tokenizer = model.decoder.config, model.tokenizer
        models.export(models.Loaded(config, model.params, tokenizer), folder)
    options = ["--model", args.model, *(["--data", str(args.data)] if args.data else [])]
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    theirs = dict(os.environ) if args.huge_pages_for_both else plain
    return Bench(model, mesh, rows, folder, args.repeats, options, theirs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each work")
    parser.add_argument("--data", type=Path, help="TOFU's folder (../shared/data/tofu)")
    parser.add_argument("--model", default="smollm2", help="a model's folder or file")
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--huge-pages-for-both", action="store_true", help="torch asks, too")
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            bench = start(args, Path(scratch) / "model")
        except UserError as error:
            print(f"peers.py: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if args.first_step:
            first_step(bench)
            return
        found = [WORKS[name](bench) for name in args.only]
    result = {
        "device": machine("torch", "transformers"),
        "rows": [line for one in found for line in one.rows],
    }
    notes = [f"- {note}" for one in found for note in one.notes]
    heading = f"Whole works on {result['device']}"
    text = markdown(heading, result["rows"], notes, lambda line, key: shown(line[key], 6))
    publish("peers", result, text, args.output)


if __name__ == "__main__":
    hugepages.ask()  # as the programs of `train` do
    main()
