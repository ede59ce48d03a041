"""An unlearning stage that trains adapters: what moves, what does not, and resuming."""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import REMAT, Decoder, DecoderConfig
from models.files.weights import load
from train.engine import base_models
from train.engine.run import Run
from train.engine.step import compile_step, init_state, make_step
from train.engine.trainable import trainable_of
from train.evaluators import evaluation
from train.evaluators.evaluation import Model
from train.jobs import unlearning_stages
from train.options import checks, cli
from train.options.config import LoraConfig, RunConfig
from train.options.optimizers import OPTIMIZERS, build, over_rows
from train.options.optimizers import options_of as optimizer_of
from train.presets import PRESETS
from train.runtime import checkpointing, sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.sharding import MeshConfig, make_mesh, path_str
from train.runtime.tracking import Tracker
from train.tasks import load_task

STEPS = 4
CONFIG = DecoderConfig(64, 16, 32, 2, 4, 2, 4)
DECODER = Decoder(CONFIG)


def batch(rows=8, length=12, width=5, seed=0):
    """One stream of training batches, all labels real; made-up references."""
    draw = np.random.default_rng(seed)
    index = np.tile(np.arange(length - width, length), (rows, 1))
    return {
        "tokens": draw.integers(2, 64, (rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "label_index": index.astype(np.int32) - 1,
        "targets": draw.integers(2, 64, (rows, width), np.int32),
        "target_mask": np.ones((rows, width), np.float32),
        "row_id": np.arange(rows, dtype=np.int32),
        "ref_log_probs": -draw.random((rows, width), np.float32),
        "ref_hidden": draw.standard_normal((rows, width, 16), np.float32),
    }


class Setting(NamedTuple):
    """Frozen parameters, adapters and their step on a mesh."""

    base: Any
    adapters: Any
    step: Any
    state: Any
    batches: Any


def setting(name="adamw", remat="none", sizes=(1, 1, 1), objective="graddiff", **more):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    decoder = Decoder(CONFIG, remat)
    base = sharding.put_params(decoder.init(jax.random.key(0)), mesh)
    row, options = objectives.resolve(objective_of(objective))
    model = Model(decoder, base, None, "base")
    training = trainable_of(model.params, row, LoraConfig(4, 8.0))
    config = optimizer_of(name, learning_rate=1e-2, schedule="constant", warmup=0.0, **more)
    tx, schedule, needs = build(over_rows(config, 8), STEPS)
    adapters = sharding.put_params(training.start, mesh)
    state, shardings = init_state(adapters, tx, mesh)
    step = make_step(
        DecoderLearner(decoder), row, options, tx, schedule, needs=needs, binding=training.binding
    )
    batches = {n: sharding.put_batch(batch(seed=i), mesh) for i, n in enumerate(row.streams)}
    return Setting(base, adapters, compile_step(step, shardings, mesh), state, batches)


def walk(one, count=STEPS):
    """States and losses of some steps; the initial adapters are kept in host memory."""
    state, losses = one.state, []
    for _ in range(count):
        state, metrics = one.step(state, one.base, one.batches)
        losses.append(float(metrics["loss"]))
    return state, losses


def few(names, quick):
    """Parameters of which only some run by default, since each takes long to compile."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


TRAINS = [name for name in OPTIMIZERS if name != "teon"]


@pytest.mark.parametrize("name", few(TRAINS, ("muon", "hybrid")))
def test_adapters_move_and_the_base_does_not(name):
    one = setting(name, **({"period": 1} if name == "hybrid" else {}))
    before, start = jax.device_get(one.base), jax.device_get(one.adapters)
    state, losses = walk(one)
    assert all(map(math.isfinite, losses)) and len(set(losses)) == STEPS
    for path, leaf in jax.tree_util.tree_leaves_with_path(one.base):
        assert not leaf.is_deleted(), path_str(path)
    jax.tree.map(np.testing.assert_array_equal, one.base, before)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(state.params), strict=True
    ):
        assert np.abs(a - b).max() > 0, path_str(path)
    # What the optimizer keeps has the size of the adapters.
    kept = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert kept < 8 * sum(x.size for x in jax.tree.leaves(start))


@pytest.mark.slow
def test_remat_gives_the_same_adapters():
    found = {remat: walk(setting("sign", remat, b1=0.0), 2) for remat in REMAT}
    state, losses = found["none"]
    for remat in ("dots", "full"):
        np.testing.assert_allclose(found[remat][1], losses, rtol=1e-6)
        same = [
            np.mean(np.equal(a, b))  # steps of sign flip where a gradient is about zero
            for a, b in zip(
                jax.tree.leaves(found[remat][0].params), jax.tree.leaves(state.params), strict=True
            )
        ]
        assert min(same) > 0.98


@pytest.mark.parametrize("objective", few(["asu", "npo", "dpo", "simnpo"], ("asu",)))
def test_objectives_with_and_without_references(objective):
    """Initial adapters give the model the references were made with: KL and margins are zero."""
    one = setting("adamw", objective=objective)
    _, losses = walk(one, 3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", few(["adamw", "muon", "sift"], ("muon",)))
def test_same_numbers_on_a_mesh(name):
    one = setting(name)
    other = setting(name, sizes=(2, 2, 2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(other.state.params):
        kind, which = path_str(path).split("/")[2:4]
        into = "fsdp" if kind not in ("o", "down") else "tp"
        out = "tp" if kind not in ("o", "down") else "fsdp"
        expected = (None, into, None) if which == "lora_a" else (None, None, out)
        assert tuple(leaf.sharding.spec) == expected, path_str(path)
    (a, mine), (b, theirs) = walk(one, 2), walk(other, 2)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        off = np.linalg.norm(np.float64(x) - np.float64(y)) / np.linalg.norm(np.float64(x))
        assert off < 1e-3


@pytest.mark.fused
def test_a_step_donates_the_adapters_and_reads_the_base():
    one = setting("adamw")
    compiled = one.step.lower(one.state, one.base, one.batches).compile()
    memory = compiled.memory_analysis()
    state = sum(x.nbytes for x in jax.tree.leaves(one.state))
    base = sum(x.nbytes for x in jax.tree.leaves(one.base))
    assert memory.alias_size_in_bytes >= state
    assert memory.output_size_in_bytes <= state + 1024
    inputs = state + base + sum(x.nbytes for x in jax.tree.leaves(one.batches))
    assert memory.argument_size_in_bytes <= inputs + 1024


# The program.


@pytest.fixture(scope="module")
def small_config(small):
    def make(*options):
        steps = f"--unlearn.steps {STEPS} --unlearn.curve-points 2".split()
        return cli.parse(
            RunConfig, PRESETS["quickstart"].PRESET, [*small, *steps, *options], "tests", ""
        )

    return make


class Stopped(Exception):
    """Raised to interrupt a stage."""


def test_a_stage_continues_bit_equal(small_config, tmp_path, monkeypatch, capsys):
    """NPO with a cached reference, stopped after its second step."""
    options = "--lora.rank 4 --unlearn.checkpoint-seconds 0".split()
    config = dataclasses.replace(small_config(*options), objective=objective_of("npo"))
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh)
    before = jax.device_get(base.params)

    def run(root):
        root.mkdir(exist_ok=True)
        return unlearning_stages.unlearn(
            Run(root, mesh, config.seed, Tracker(root)), config, base, task
        )

    undisturbed = run(tmp_path / "one")
    real = Tracker.write

    def write(self, stage, at, scalars):
        if at == 2:
            raise Stopped
        real(self, stage, at, scalars)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Tracker, "write", write)
        run(tmp_path / "two")
    (folder,) = (tmp_path / "two" / "checkpoints").iterdir()
    shapes = checkpointing.read_manifest(folder / "2")["shapes"]
    assert not [path for path in shapes if "embed" in path]  # adapters and their moments alone
    capsys.readouterr()
    again = run(tmp_path / "two")
    assert "continuing at step 2 of 4" in capsys.readouterr().err
    assert again.sha == undisturbed.sha == params_sha256(again.params) != base.sha
    jax.tree.map(np.testing.assert_array_equal, base.params, before)
    # Only kernels with an adapter moved; the curve was measured with the adapters.
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(again.params), strict=True
    ):
        assert np.array_equal(a, b) != path_str(path).endswith("kernel"), path_str(path)
    # The adapters are stored beside it in PEFT's format: added to the base they give the model.
    settings = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 4
    assert settings["base_model_name_or_path"] == str(tmp_path / "two" / "original")
    tensors = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    for i in range(config.model.num_layers):
        name = f"base_model.model.model.layers.{i}.mlp.down_proj"
        a, b = (np.float64(tensors[f"{name}.lora_{which}.weight"]) for which in "AB")
        moved = before["layers"]["mlp"]["down"]["kernel"][i] + (b @ a).T
        now = again.params["layers"]["mlp"]["down"]["kernel"][i]
        np.testing.assert_allclose(now, moved, rtol=1e-5, atol=1e-6)
    said = (tmp_path / "two" / "adapter" / "README.md").read_text()
    original = tmp_path / "two" / "original"
    assert "--model original" in said and "merge_and_unload()" in said
    assert f"vllm serve {original} --enable-lora" in said and "--max-lora-rank 8\n" in said
    rows = [json.loads(x) for x in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    looks = [row["forget_probability"] for row in rows if "forget_probability" in row]
    assert len(looks) == 3 and len(set(looks)) == 3
    # The evaluation at the end is of the parameters that are returned.
    seen = evaluation.curve(
        again, task, None, config.data.max_length, mesh, config.evaluate.score_tokens, 40
    )
    assert seen["forget_probability"] == pytest.approx(looks[-1], rel=1e-4)


@pytest.mark.slow
def test_the_whole_run(program, small, tmp_path):
    root = tmp_path / "run"
    steps = "--finetune.steps 12 --unlearn.steps 4 --model.remat dots".split()
    lora_options = "--lora.rank 4 --lora.targets q v down".split()
    argv = ["quickstart", "--smoke", *small, *steps, *lora_options, "--output", root]
    done = program("train.unlearn", *argv)
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    loaded = load(root / "export")
    assert params_sha256(loaded.params) == summary["unlearned"]["params_sha256"]
    assert loaded.config.num_layers == 2
    again = program("train.unlearn", "--config", root / "config.json", "--output", root)
    assert again.code == 0 and again.err.count("found, made from the same inputs") == 3


# Bad input.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lora.rank 0", ["--lora.rank is 0", "at least 1"]),
        ("--lora.rank 4 --lora.alpha 0", ["--lora.alpha", "at least"]),
        ("--lora.alpha 8", ["--lora.alpha 8.0", "--lora.rank"]),
        ("--lora.targets q", ["--lora.targets", "--lora.rank"]),
        ("--lora.rank 4 --lora.targets", ["--lora.targets needs a value"]),
        ("--lora.rank 4 --lora.targets q gat", ["'gat' is unknown", "'gate'", "o, q, v, down"]),
        ("--lora.rank 17 --lora.targets q k", ["--lora.rank 17", "k's matrices", "at most 16"]),
        ("--lora.rank 4 --optimizer.name teon", ["teon", "neighbouring blocks", "muon"]),
        ("--lora.rank 1 --optimizer.name sift", ["sift", "--lora.rank 2"]),
    ],
)
def test_bad_input_is_one_line_before_any_compute(options, words, program, small, tmp_path):
    argv = ["quickstart", *small, *options.split(), "--output", tmp_path / "run"]
    done = program("train.unlearn", *argv)
    assert done.code == 2 and done.out == ""
    (line,) = done.err.strip().splitlines()
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run").exists()


def test_a_model_without_the_target_is_refused():
    """A family whose blocks have no gate."""
    params = jax.tree.map(lambda x: x, DECODER.shapes())
    del params["layers"]["mlp"]["gate"]
    with pytest.raises(UserError, match="--lora.targets 'gate' is unknown.*q, v, down, up"):
        checks.check_lora(LoraConfig(2), optimizer_of("adamw"), params)
    checks.check_lora(LoraConfig(2, targets=("q", "up")), optimizer_of("adamw"), params)


def test_scale():
    assert LoraConfig().scale == LoraConfig(8).scale == 1.0
    assert LoraConfig(8, 32.0).scale == 4.0
