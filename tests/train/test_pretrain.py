"""`python -m train.pretrain`: what a run leaves behind, refusals, resuming, reports."""

import itertools
import json
import math
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import models
from jaxlib_unlearn.errors import UserError
from train import plan
from train.costs.flops import count
from train.costs.utilisation import flops_per_token, utilisation
from train.data import corpus
from train.data.token_file import Tokens
from train.data.token_rows import TokenRows
from train.evaluators.curves import VALIDATION_LOSSES
from train.evaluators.evaluation import Model
from train.evaluators.token_loss import mean_loss, row_losses, row_sums
from train.jobs import job, pretraining
from train.jobs.pretraining_options import PretrainConfig, batch_rows, num_steps
from train.options.config import identity, replace
from train.options.config_files import read_config
from train.presets import arguments
from train.presets.pretraining import PRESETS
from train.reporting import compare, tables
from train.reporting.page import steps_of
from train.runtime import distributed, sharding

KEYS = (
    "val_perplexity train_perplexity num_parameters params_sha256 tokens tokens_per_second mfu"
).split()
TINY = (
    "--mesh.data 1 --model.hidden-size 32 --model.num-layers 2 --model.intermediate-size 64 "
    "--model.num-heads 2 --model.num-kv-heads 2"
).split()


class Done(NamedTuple):
    argv: list
    root: object
    done: object
    summary: dict


def read(root):
    return json.loads((root / "summary.json").read_text())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with 80 documents in one file."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    words = "red green blue one two three four cat dog and or not".split()
    rows = [" ".join(draw.choice(words, 40)) for _ in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def own(program, texts, tmp_path_factory):
    """A run on a folder of texts, with a tokenizer trained on it."""
    root = tmp_path_factory.mktemp("own") / "run"
    argv = ["pretrain-tiny", "--smoke", *TINY, "--data.source", "text", "--data.path", texts]
    argv += ["--data.context", "32", "--train.batch-tokens", "256", "--train.tokens", "1600"]
    done = program("train.pretrain", *argv, "--output", root)
    assert done.code == 0, done.err
    return Done(argv, root, done, read(root))


def test_the_local_preset_runs(program, tmp_path):
    """pretrain-tiny --smoke, on the packages that are installed."""
    done = program("train.pretrain", "pretrain-tiny", "--smoke", "--mesh.data", "1",
                   "--output", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    assert read(tmp_path / "run")["pretrained"]["tokens"] == 2048
    assert "corpus: 60 documents" in done.err and "SMOKE run:" in done.out
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]


def test_files_of_the_run_folder(own):
    assert list(own.summary) == ["pretrained"] and list(own.summary["pretrained"]) == KEYS
    flat = own.summary["pretrained"]
    assert flat["tokens"] == 6 * 256  # a last incomplete batch is not trained on
    assert 1 < flat["val_perplexity"] < 384 and 1 < flat["train_perplexity"] < 384
    assert flat["tokens_per_second"] > 0 and flat["mfu"] is None
    config = json.loads((own.root / "config.json").read_text())
    assert len(config["data"]["digest"]) == 64 and config["output"] is None
    lines = [json.loads(x) for x in (own.root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    looks = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(looks) == [0, 3, 6] and looks[6] < looks[0] < math.log(400)
    page = (own.root / "report.html").read_text()
    assert "raining report" in page and "held-out text" in page and "oracle" not in page
    assert "python -m train.pretrain pretrain-tiny" in page and "sha256" in page
    assert (own.root / "curves.png").is_file()
    assert not list((own.root / "checkpoints").glob("*"))


def test_the_export_has_the_perplexity_of_the_summary(own, texts):
    loaded = models.load(own.root / "export")
    assert loaded.tokenizer.chat_template is None
    given = [*own.argv[:1], *map(str, own.argv[1:]), "--output", str(own.root)]
    prepared = job.prepare(pretraining.JOB, arguments.read_arguments(arguments.PRETRAIN, given))
    rows, mesh = prepared.fitted.parts.validation, prepared.mesh
    model = Model(loaded.decoder, loaded.params, loaded.tokenizer, "")
    found = row_losses(model, rows, np.arange(len(rows)), mesh, 4096)
    want = own.summary["pretrained"]["val_perplexity"]
    assert math.exp(mean_loss(found)) == pytest.approx(want, rel=1e-6)


def test_it_is_exported_again_without_a_card_of_unlearning(own, program, tmp_path):
    done = program("train.export", own.root, tmp_path / "out", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The model 'pretrained' of a run" in text and 'tokenizer("PROMPT"' in text
    assert "unlearned" not in text and "chat" not in text


def test_a_second_start_computes_nothing(own, program, monkeypatch):
    def never(*args, **more):
        raise AssertionError("computed again")

    monkeypatch.setattr("train.engine.loop.run", never)
    monkeypatch.setattr("train.jobs.pretraining.row_losses", never)
    monkeypatch.setattr("train.data.token_file.write", never)
    done = program("train.pretrain", *own.argv, "--output", own.root)
    assert done.code == 0, done.err
    assert read(own.root) == own.summary
    # As its stored configuration, whose digest is that of the corpus.
    file = own.root / "config.json"
    done = program("train.pretrain", "--config", file, "--output", own.root)
    assert done.code == 0, done.err
    assert read(own.root) == own.summary


@pytest.mark.slow
def test_a_stopped_run_continues(own, program, tmp_path, monkeypatch):
    root = tmp_path / "run"
    argv = [*own.argv, "--data.cache", own.root.parent / "corpora", "--output", root]
    asked = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "asked_to_stop", lambda: next(asked) == 3)
        done = program("train.pretrain", *argv)
    assert "stopped before step 3 of 6" in done.err and not (root / "summary.json").exists()
    done = program("train.pretrain", *argv)
    assert done.code == 0 and "continuing at step 3 of 6" in done.err
    again, flat = read(root)["pretrained"], own.summary["pretrained"]
    same = ("params_sha256", "val_perplexity", "train_perplexity", "tokens")
    assert {k: again[k] for k in same} == {k: flat[k] for k in same}


def test_runs_side_by_side(own, program, tmp_path):
    """Validation loss over tokens, seeds as a band."""
    other, page = tmp_path / "other", tmp_path / "both.html"
    more = ["--seed", "1", "--data.cache", own.root.parent / "corpora", "--output", other]
    done = program("train.pretrain", *own.argv, *more)
    assert done.code == 0, done.err
    done = program("train.report", own.root, other, "--html", page, "--csv", tmp_path / "both.csv")
    assert done.code == 0, done.err
    text = page.read_text()
    assert "Validation loss over tokens" in text and "Training comparison" in text
    assert "While they train" in text and "(n=2)" in done.out
    assert "val_perplexity,2," in (tmp_path / "both.csv").read_text()
    # The band is that of the two runs, at the looks that both took.
    found = tables.groups([tables.load_run(root) for root in (own.root, other)])
    ((_, members),) = found
    band = compare._band(VALIDATION_LOSSES, "runs", members, [steps_of(run) for run in members])
    assert band is not None and band.places.tolist() == [0, 3 * 256, 6 * 256]
    lines = [json.loads(x) for x in (other / "metrics.jsonl").read_text().splitlines()]
    looks = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert band.values.shape == (2, 3) and looks in band.values.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.tokens", "200"], "--train.tokens 200 are fewer than the 256 of a step"),
        (["--train.batch-tokens", "250"], "250 is no multiple of rows of --data.context 32"),
        (["--train.batch-tokens", "65536", "--train.tokens", "65536"], "(60 documents"),
        (["--data.context", "4096", "--train.batch-tokens", "8192", "--train.tokens", "9000"],
         "fewer than the 2 of a step"),
        (["--optimizer.name", "sift"], "needs the gradients of forget and retain"),
        (["--optimizer.group-size", "3"], "the model has 2 block"),
        (["--optimizer.orthogonalize", "svdd"], "did you mean 'svd'"),
        (["--optimizer.learning-rat", "1"], "did you mean --optimizer.learning-rate?"),
        (["--model.num-heads", "3"], "must divide one another"),
        (["--model.vocab-size", "100"], "--model.vocab-size is 100; it must be from 259"),
        (["--data.tokenizer", "nowhere"], "nowhere: no such file or folder"),
        (["--data.source", "book"], "--data.source 'book' is unknown; did you mean"),
        (["--data.path", "nowhere"], "--data.path nowhere does not exist"),
        (["--data.digest", "0" * 64], "not --data.digest 0000"),
        (["--data.validation", "0"], "above 0 and below 1"),
        (["--mesh.data", "99"], "99 devices"),
        (["--report-to", "nothing"], "nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_compute(own, program, tmp_path, options, message):
    root = tmp_path / "run"
    given = [*own.argv, "--data.cache", tmp_path / "cache", *options, "--output", root]
    done = program("train.pretrain", *given)
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and last.startswith("error: ") and message in last, done.err
    assert not root.exists()


def test_a_tokenizer_with_more_ids_than_the_model(own, program, tmp_path):
    options = ["--data.tokenizer", own.root / "export", "--model.vocab-size", "260"]
    done = program("train.pretrain", *own.argv, *options, "--output", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert "the model 260 (--model.vocab-size); give at least" in done.err


def test_another_runs_folder(own, program):
    done = program("train.pretrain", *own.argv, "--seed", "5", "--output", own.root)
    assert done.code == 2 and "holds another run's config (" in done.err


def test_help_and_typos(program):
    shown = program("train.pretrain", "--help").out
    assert all(name in shown for name in PRESETS)
    assert "--data.packages" in program("train.pretrain", "pretrain-tiny", "--help").out
    for argv, message in (
        (["pretrain-tny"], "did you mean 'pretrain-tiny'"),
        (["--seed", "1"], "the first argument is a preset"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ):
        done = program("train.pretrain", *argv)
        assert done.code == 2 and message in done.err, done.err


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], True),
        (["--data.context", "16"], True),
        (["--data.documents", "70"], False),
        (["--data.source=packages"], False),
        (["--smoke"], False),
    ],
)
def test_another_corpus_than_the_stored_one_has_no_digest_yet(own, options, kept):
    stored = arguments.read_arguments(
        arguments.PRETRAIN, ["--config", str(own.root / "config.json")]
    ).data
    data = arguments.read_arguments(
        arguments.PRETRAIN, ["--config", str(own.root / "config.json"), *options]
    ).data
    assert stored.digest and data.digest == (stored.digest if kept else None)
    corpus.check(data)  # the stored path is not one of the packages


def test_a_published_preset_takes_other_texts():
    data = arguments.read_arguments(
        arguments.PRETRAIN, ["llama-1b", "--data.source", "text", "--data.path", "x.txt"]
    ).data
    assert PRESETS["llama-1b"].PRESET.data.subset != data.subset
    corpus.check(data)
    given = ["llama-1b", "--data.source", "text", "--data.revision", "v1"]
    with pytest.raises(UserError, match="--data.revision is of --data.source hub"):
        corpus.check(arguments.read_arguments(arguments.PRETRAIN, given).data)


# Presets.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name):
    preset = PRESETS[name]
    config = preset.PRESET
    assert arguments.read_arguments(arguments.PRETRAIN, [name]) == config and config.preset == name
    assert num_steps(config) > 100 and config.optimizer == preset.OPTIMIZERS["teon"][0]
    for optimizer in preset.OPTIMIZERS:
        assert (
            arguments.read_arguments(
                arguments.PRETRAIN, [name, "--optimizer.name", optimizer]
            ).optimizer.name
            == optimizer
        )
        pretraining.optimizers.check(preset.OPTIMIZERS[optimizer][0])
    smoke = arguments.read_arguments(arguments.PRETRAIN, [name, "--smoke"])
    assert smoke.smoke and 2 <= num_steps(smoke) <= 8
    assert batch_rows(smoke, 8)  # the devices of a host
    shapes = pretraining.decoder_of(config).shapes()
    count = pretraining.num_parameters(shapes) / 1e6
    said = {
        "pretrain-tiny": 2.2, "gpt-small": 124, "gpt-base": 362, "gpt-large": 774,
        "llama-60m": 58, "llama-130m": 134, "llama-350m": 368, "llama-1b": 1339,
    }  # fmt: skip
    assert count == pytest.approx(said[name], rel=0.02)
    teon: Any = config.optimizer
    assert (teon.group_size, teon.groups, teon.shape_scale) == (2, "qkv", "spectral")
    assert teon.orthogonalize == "polar_express" and not teon.nesterov


def test_a_batch_that_does_not_fit_is_accumulated():
    config = PRESETS["llama-1b"].PRESET
    rows, parts = batch_rows(config, 16)
    assert rows == 512 and rows // 16 // parts * 4096 <= config.train.micro_tokens < 2**17
    one = replace(config, **{"train.batch_tokens": 6 * 4096, "train.micro_tokens": 4 * 4096})
    assert batch_rows(one, 1) == (6, 2) and batch_rows(one, 6) == (6, 1)
    with pytest.raises(UserError, match="4 devices that split a batch"):
        batch_rows(one, 4)


def test_configurations_read_as_they_are_written(own):
    config = read_config(PretrainConfig, own.root / "config.json")
    assert identity(config) == json.loads((own.root / "config.json").read_text())
    assert sharding.MeshConfig(data=1) == config.mesh


# Costs.


@pytest.mark.slow
def test_the_step_is_planned():
    options = "--smoke --topology cpu:4 --train.batch-tokens 1024 --train.micro-tokens 128".split()
    argv = ["pretrain-tiny", *TINY[2:], *options, "--mesh.data", "1", "--mesh.fsdp", "4"]
    config = arguments.read_arguments(arguments.PRETRAIN, argv, plan.PretrainPlanConfig, "tests")
    plan.check(config)
    found = plan.plan(config)
    assert found["fits"] and found["model"] == "llama from random weights"
    assert found["unit"] == "a step of 16 rows of 64 tokens (1024 tokens) in 2 micro-batches"
    # Forward and backward; the recomputation of a block and the update come on top.
    least = 1024 / 4 * flops_per_token(pretraining.decoder_of(config), 0)
    update = found["asked_optimizer_flops_per_chip"]
    assert least < found["asked_flops_per_chip"] - update < 1.5 * least
    assert found["collectives"] and "a step of 16 rows" in plan.table(found)


def test_the_flops_of_a_token_are_those_of_its_products():
    """Against the products of the gradient, counted one by one."""
    shape = models.DecoderConfig(64, 32, 80, 3, 4, 2, 8, tie_embeddings=False)
    decoder, context = models.Decoder(shape), 16  # short: attention skips nothing
    part = Tokens(np.arange(32, dtype=np.uint16), np.zeros(1, "<i8"), "")
    batch = TokenRows(part, context).batch(np.arange(2), (), 0)
    grad = jax.grad(lambda params: row_sums(decoder, params, batch)[0].sum())
    counted = count(grad, decoder.shapes()).flops
    assert counted == pytest.approx(2 * context * flops_per_token(decoder, context), rel=1e-9)


@pytest.mark.parametrize(("kind", "speed", "want"), [
    ("NVIDIA H100 80GB HBM3", 1e5, 1e5 * 9216 / 989e12), ("cpu", 1e5, None), ("TPU v4", None, None),
])  # fmt: skip
def test_utilisation_is_null_where_no_peak_is_known(kind, speed, want):
    decoder = models.Decoder(models.DecoderConfig(16, 8, 16, 2, 2, 2, 4))
    device = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(devices=np.array([device]), size=1)
    assert utilisation(decoder, 4, speed, mesh) == (want and pytest.approx(want))
