"""Models with learned positions in the trainer: on a mesh, as programs train them, and their end.

A row that is longer than the positions is refused wherever one could enter: before any compute.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder.model import Decoder
from models.files.families import new_config
from train.data.examples import Example, Group
from train.data.streams import make_stream
from train.data.task import Task
from train.engine import base_models
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.evaluators.evaluation import Model, longest, score_items
from train.jobs import unlearning_stages
from train.options.config import RunConfig, UnlearnConfig
from train.options.optimizers import options_of
from train.runtime import sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.sharding import MeshConfig
from train.runtime.tracking import Tracker

CONTEXT = 48
NAMES = ("gpt2", "opt")
ROWS = [{"question": f"Who is {i}?", "answer": f"Ada {i}."} for i in range(6)]


def make_model(family: str) -> Model:
    tokenizer = base_models.train_tokenizer(Task([], ROWS, {}, [], []), 300)
    config = new_config(
        family, vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, context=CONTEXT
    )
    params = jax.jit(Decoder(config).init)(jax.random.key(0))
    return Model(Decoder(config), params, tokenizer, params_sha256(params))


@pytest.fixture(scope="module")
def gpt2():
    return make_model("gpt2")


@pytest.fixture(scope="module")
def one():
    return sharding.make_mesh(MeshConfig(1, 1, 1))


@pytest.mark.parametrize("family", NAMES)
def test_loss_and_gradient_on_a_mesh_are_those_of_one_device(family):
    model = make_model(family)
    cube = sharding.make_mesh(MeshConfig(2, 2, 2))
    tokens = np.random.default_rng(0).integers(0, 300, (8, 16)).astype(np.int32)

    @jax.jit
    def loss(params, tokens):
        hidden, _ = model.decoder.forward(params, tokens)
        scores = jax.nn.log_softmax(model.decoder.unembed(params, hidden))
        return -jnp.mean(jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], -1))

    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(model.params, tokens)
    placed = sharding.put_params(model.params, cube)
    there, spread = step(placed, sharding.put_batch({"tokens": tokens}, cube)["tokens"])
    assert abs(float(value) - float(there)) < 1e-6 * float(value)
    flat = [jnp.concatenate([x.ravel() for x in map(np.asarray, jax.tree.leaves(g))])
            for g in (gradient, spread)]  # fmt: skip
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-6 * np.linalg.norm(flat[0])
    table = placed["positions"]["embedding"].sharding.spec
    assert table == jax.sharding.PartitionSpec(None, "fsdp")


@pytest.fixture
def run(tmp_path, one):
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run", one, 0, Tracker(tmp_path / "run"))


def stage(run, model, length, optimizer="muon"):
    draw = np.random.default_rng(1)
    rows = [Example(draw.integers(1, 300, size).tolist(), 2) for size in (length, 5, 5, 5)]
    streams = {"train": make_stream(rows, 0)}
    recipe = Recipe(UnlearnConfig(batch_size=2, steps=2), options_of(optimizer, learning_rate=1e-3))
    return runs.train(run, "stage", model, objectives.resolve("nll"), streams, recipe)


def test_a_stage_trains_positions_and_refuses_longer_rows(run, gpt2):
    with pytest.raises(UserError, match="stage, rows of train: 49 tokens, more than the 48 pos"):
        stage(run, gpt2, CONTEXT + 1)
    assert not list(run.folder.glob("stage*"))
    trained = stage(run, gpt2, CONTEXT)
    for old, new in zip(*(jax.tree.leaves(m.params) for m in (gpt2, trained)), strict=True):
        assert (np.asarray(old) != np.asarray(new)).any()
    stage(run, make_rotary(), CONTEXT + 1)


def make_rotary() -> Model:
    config = new_config(
        "llama", vocab_size=320, hidden_size=32, num_layers=1, num_heads=4, context=CONTEXT
    )
    params = jax.jit(Decoder(config).init)(jax.random.key(0))
    return Model(Decoder(config), params, make_model("gpt2").tokenizer, params_sha256(params))


def test_scoring_refuses_longer_rows(gpt2, one, monkeypatch):
    monkeypatch.setattr("train.evaluators.evaluation._score", lambda *args: 1 / 0)
    short = Group([1, 2, 3], [0, 1, CONTEXT - 1], [1, 1, 1], [1], [3], [0])
    for item in (
        Example([1] * (CONTEXT + 1), 1),
        short._replace(positions=[0, 1, CONTEXT]),
    ):
        with pytest.raises(UserError, match="judge, row 1: 49 tokens, more than the 48 positions"):
            score_items(gpt2, [short, item], one, 1000, "judge")
    with pytest.raises(ZeroDivisionError):
        score_items(gpt2, [Example([1, 2], 1), Example([1] * CONTEXT, 1)], one, 1000, "judge")


def test_the_longest_example_is_bounded_by_the_positions(gpt2):
    assert longest(gpt2, CONTEXT) == CONTEXT
    with pytest.raises(UserError, match="max-length: 49 tokens, more than the 48 positions"):
        longest(gpt2, CONTEXT + 1)
    assert longest(make_rotary(), CONTEXT + 1) == CONTEXT


def test_the_finetuning_program_takes_a_family_and_refuses_its_end(gpt2, program, tmp_path):
    """From a folder to a folder, and the error that a user sees before anything is written."""
    loaded = models.Loaded(gpt2.decoder.config, gpt2.params, gpt2.tokenizer)
    folder = models.export(loaded, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    argv = [folder, tmp_path / "rows.json", "--mesh.data", "1"]
    argv += ["--train.steps", "2", "--train.batch-size", "2", "--output", tmp_path / "out"]
    done = program("train.finetune", *argv)  # the default is 512 tokens
    assert done.code == 2 and not (tmp_path / "out").exists()
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert "max-length: 512 tokens, more than the 48 positions that the model has learned" in line
    done = program("train.finetune", *argv, "--max-length", str(CONTEXT))
    assert done.code == 0, done.err
    back = models.load(tmp_path / "out" / "export")
    assert back.config == loaded.config
    moved = back.params["positions"]["embedding"] != loaded.params["positions"]["embedding"]
    assert moved.any(-1).sum() > 4


def test_adapters_of_the_family_are_exported_as_its_own(gpt2, run, tmp_path):
    """`--lora.rank` with the kernels that the family has."""
    targets = ("q", "k", "v", "o", "up", "down")
    config = dataclasses.replace(RunConfig(), lora=dataclasses.replace(
        RunConfig().lora, rank=2, targets=targets))  # fmt: skip
    adapters = models.decoder.lora.init(gpt2.params, 2, targets)
    unlearning_stages.export_adapter(adapters, config.lora, config, run.folder, "gpt2")
    found = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert set(found["target_modules"]) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    assert found["rank_pattern"] == {"c_attn": 6} and found["fan_in_fan_out"]


def test_a_plan_of_more_tokens_than_positions_is_refused(program):
    argv = "quickstart --topology cpu:1 --model.path facebook/opt-1.3b --length 2049".split()
    done = program("train.plan", *argv)
    assert done.code == 2 and "--length or --data.max-length: 2049 tokens" in done.err
