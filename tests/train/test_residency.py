"""Device memory while a stage takes its steps: it holds one model, and no second one."""

import dataclasses
import gc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import models
from jaxlib_unlearn.objectives import options_of as objective_of
from train.engine import base_models, exports
from train.engine.run import Run
from train.jobs import unlearning_stages
from train.options import cli
from train.options.config import RunConfig
from train.presets import PRESETS
from train.runtime import residency, sharding
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker
from train.tasks import load_task


def pointers(x):
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def test_to_the_host_and_back():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    where = NamedSharding(mesh, P(None, "fsdp", "tp"))
    x = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(4, 4, 4), where)
    tree = {"a": x, "b": np.ones(3)}
    away = residency.to_host(tree)
    assert away["a"].sharding.memory_kind == "pinned_host" and away["b"] is tree["b"]
    assert away["a"].sharding.spec == where.spec and not pointers(away["a"]) & pointers(x)
    assert residency.to_host(away)["a"] is away["a"] and residency.to_device(tree)["a"] is x
    back = residency.to_device(away)["a"]
    assert back.sharding == where and np.array_equal(back, x)
    for source in (x, away["a"]):
        copy = residency.fresh(source, where)
        assert copy.sharding == where and np.array_equal(copy, x)
        assert not pointers(copy) & (pointers(x) | pointers(away["a"]))


def test_a_fresh_copy_on_more_devices_shares_nothing():
    """JAX lends the one device's buffer to its replica, whatever `may_alias` says."""
    where = NamedSharding(make_mesh(MeshConfig(2, 2, 2)), P())
    x = jnp.arange(64.0)
    assert pointers(jax.device_put(x, where, may_alias=False)) & pointers(x)
    copy = residency.fresh({"a": x}, {"a": where})["a"]
    assert copy.sharding == where and np.array_equal(copy, x)
    assert not pointers(copy) & pointers(x)


def test_donating_a_fresh_copy_leaves_what_it_was_made_from():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for x in (jnp.ones((64, 64)), residency.to_host(jnp.ones((64, 64)))):
        copy = residency.fresh(x, where)
        jax.jit(lambda x: 2 * x, donate_argnums=0)(copy)
        assert copy.is_deleted() and np.asarray(x).max() == 1.0


# A stage.


class Seen(NamedTuple):
    """Bytes in device memory during steps, and of parameters and adapters."""

    steps: list
    model: int
    head: int
    result: Any


def on_device():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays() if x.sharding.memory_kind == "device")


def run(small, tmp_path, monkeypatch, objective, *options):
    """Unlearn from a model in host memory; inspect device memory whenever a step is logged."""
    more = (
        "--unlearn.steps 3 --unlearn.curve-points 0 --model.num-layers 12 --model.hidden-size 64 "
        "--model.intermediate-size 512"
    ).split()
    config = cli.parse(
        RunConfig, PRESETS["quickstart"].PRESET, [*small, *more, *options], "tests", ""
    )
    config = dataclasses.replace(config, objective=objective)
    task, mesh = load_task(config), sharding.make_mesh(config.mesh)
    base = base_models.base_model(config, task, mesh).to_host()
    sizes = {n: sum(x.nbytes for x in jax.tree.leaves(t)) for n, t in base.params.items()}
    before, seen, real = on_device(), [], Tracker.write

    def write(self, stage, step, scalars):
        seen.append(on_device() - before)
        real(self, stage, step, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "write", write)
        run = Run(tmp_path, mesh, config.seed, Tracker(tmp_path))
        result = unlearning_stages.unlearn(run, config, base, task)
    assert all(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(base.params))
    assert all(x.sharding.memory_kind == "device" for x in jax.tree.leaves(result.params))
    assert len(seen) == 3
    return Seen(seen, sum(sizes.values()), sizes["embed"], result)


@pytest.mark.parametrize(
    ("objective", "frozen"),
    [
        (objective_of("npo"), 0),  # its reference is a column of the batches
        pytest.param(  # hidden states, which the frozen head unembeds
            objective_of("graddiff", retain="kl"), 1, marks=pytest.mark.slow
        ),
    ],
    ids=["npo", "kl"],
)
def test_one_model_beside_its_optimizer_state(objective, frozen, small, tmp_path, monkeypatch):
    seen = run(small, tmp_path, monkeypatch, objective, "--optimizer.name", "sign")
    wanted = 2 * seen.model + frozen * seen.head  # parameters and one momentum
    for size in seen.steps:
        assert wanted <= size < wanted + 0.5 * seen.model  # batches, but no second model


def test_adapters_beside_one_model(small, tmp_path, monkeypatch):
    seen = run(small, tmp_path, monkeypatch, objective_of("npo"), "--lora.rank", "2")
    for size in seen.steps:
        assert seen.model < size < 1.5 * seen.model


@pytest.mark.parametrize("mesh", ["--mesh.data 1", "--mesh.data 1 --mesh.fsdp 2 --mesh.tp 2"])
def test_a_model_in_host_memory_is_exported(mesh, small, tmp_path):
    """On one device and on several: layers are sliced from host memory."""
    config = cli.parse(
        RunConfig, PRESETS["quickstart"].PRESET, [*small, *mesh.split()], "tests", ""
    )
    base = base_models.base_model(config, load_task(config), sharding.make_mesh(config.mesh))
    exports.export_model(base.to_host(), tmp_path / "export", "float32")
    params = models.load(tmp_path / "export").params
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(base.params), strict=True):
        np.testing.assert_array_equal(a, b)
