"""Runs, checkpoints and weights in a bucket; the bucket is a folder behind `gs://`.

What is simulated is below the libraries: etils' file operations on `gs://`, and the location that
Orbax passes to TensorStore. All of our code and of Orbax runs as it does on a real bucket.
"""

import gc
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

import models
from jaxlib_unlearn.errors import UserError
from train.runtime import checkpointing, remote, sharding
from train.runtime.checkpointing import load_latest, load_tree, save_step, save_tree, steps_in


class Bucket(backend._OsPathBackend):
    """`gs://name/x` is `root/name/x`; without rename, like a real one."""

    def __init__(self, root: Path):
        self.root = root
        self.denied = False

    def local(self, path) -> str:
        if self.denied:
            raise OSError("anonymous caller does not have storage.objects.get access")
        text = os.fspath(path)
        return str(self.root / text.removeprefix("gs://")) if text.startswith("gs://") else text

    def listdir(self, path):
        return sorted(os.listdir(self.local(path)))

    def glob(self, path):
        found = super().glob(self.local(path))
        return [f"gs://{Path(p).relative_to(self.root).as_posix()}" for p in found]

    def rename(self, path, dst):
        raise AssertionError("a bucket knows no rename")

    replace = rename


def _through(name):
    def call(self, path, *args, **options):
        return getattr(backend._OsPathBackend, name)(self, self.local(path), *args, **options)

    return call


for _name in ("open", "exists", "isdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
    setattr(Bucket, _name, _through(_name))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The bucket `gs://ours`."""
    made = Bucket(tmp_path / "buckets")
    (made.root / "ours").mkdir(parents=True)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", made)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(remote, "PACKAGES", {"gs": ()})
    monkeypatch.setattr(remote, "_mirrors", {})
    monkeypatch.setattr(remote, "_sent", {})
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)

    def store(path):
        # TensorStore's file driver wants a slash after a folder; its driver for gs:// does not.
        end = "" if path.endswith("_sharding") else "/"
        return {"driver": "file", "path": made.local(path).rstrip("/") + end}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", store)
    return made


def state(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(draw.normal(size=(2, 8, 4)), jnp.float32),
        "scale": jnp.asarray(draw.normal(size=8), jnp.bfloat16),
        "step": jnp.int32(seed),
    }


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_located():
    for given in ("gs://ours/run", Path("gs://ours/run"), "gs:/ours/run"):
        assert str(remote.located(given)) == "gs://ours/run" and remote.is_remote(given)
    assert remote.located("runs/x") == Path("runs/x") and not remote.is_remote("runs/x")
    assert not remote.is_remote("/a/b") and not remote.is_remote(Path("a"))
    with pytest.raises(UserError, match="ftp://x: runs go to local folders and gs://"):
        remote.located("ftp://x")


def test_checkpoints_in_a_bucket(bucket):
    folder = epath.Path("gs://ours/checkpoints")
    for step in (1, 2, 3):
        save_step(folder, step, state(step), {"note": step})
    assert steps_in(folder) == [2, 3]
    assert not list((bucket.root / "ours" / "checkpoints").glob("1*"))
    said = []
    found = load_latest(folder, state(9), said.append)
    assert found is not None and found[0] == 3 and same(found[1], state(3)) and not said
    # Incomplete: the manifest is written last, and a folder without one does not count.
    (bucket.root / "ours" / "checkpoints" / "3" / "manifest.json").unlink()
    assert steps_in(folder) == [2]
    save_step(folder, 3, state(4), {})
    found = load_latest(folder, state(9), said.append)
    assert found is not None and found[0] == 3 and same(found[1], state(4)) and not said


# Orbax leaves coroutines behind when TensorStore finds a damaged file.
@pytest.mark.filterwarnings("ignore:coroutine 'Store:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_bit_flipped_in_the_arrays_of_a_bucket_is_noticed(bucket):
    folder = epath.Path("gs://ours/tree")
    save_tree(folder, state(), {})
    local = bucket.root / "ours" / "tree" / "arrays"
    rng = np.random.default_rng(0)
    files = [p for p in sorted(local.rglob("*")) if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    whole = victim.read_bytes()
    noticed = 0
    for _ in range(20):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        victim.write_bytes(data)
        try:
            # Files have no checksums here: parts of a file that nothing reads may be damaged.
            assert same(load_tree(folder, state(1)), state())
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error) and str(folder) in str(error)
    gc.collect()
    assert noticed >= 10


def test_weights_from_a_bucket(bucket, tiny):
    there = bucket.root / "ours" / "model"
    there.mkdir()
    for path in tiny.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    ours, theirs = models.load("gs://ours/model"), models.load(tiny)
    assert same(ours.params, theirs.params) and ours.config == theirs.config
    (there / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"gs://ours/model: no tokenizer.json in it"):
        models.load("gs://ours/model")
    with pytest.raises(UserError, match=r"gs://ours/none: cannot be read \(FileNotFoundError"):
        models.load("gs://ours/none")


def test_a_run_in_a_bucket(bucket, program, tiny, tofu_folder, monkeypatch):
    model = bucket.root / "ours" / "model"
    model.mkdir()
    for path in tiny.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    options = (
        "--mesh.data 1 --train.steps 6 --train.batch-size 4 --max-length 96 "
        "--train.checkpoint-seconds 0 --output gs://ours/run"
    ).split()
    argv = ["gs://ours/model", tofu_folder / "retain99.json", *options]
    done = program("train.finetune", *argv)
    assert done.code == 0, done.err
    assert "model: gs://ours/run/export" in done.err
    run = bucket.root / "ours" / "run"
    names = {p.name for p in run.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "summary.json", "export", "stages"}
    assert not [p for p in run.rglob("*") if p.name.endswith(".part")]
    summary = json.loads((run / "summary.json").read_text())
    # Another machine: nothing local remains, the stage is found.
    monkeypatch.setattr(remote, "_mirrors", {})
    monkeypatch.setattr(remote, "_sent", {})
    again = program("train.finetune", *argv)
    assert again.code == 0 and "original: found, made from the same inputs" in again.err
    assert json.loads((run / "summary.json").read_text()) == summary
    other = program("train.finetune", *argv, "--seed", "1")
    assert other.code == 2 and "gs://ours/run holds another run's config (seed: 0" in other.err
    loaded = models.load("gs://ours/run/export")
    assert jax.tree.leaves(loaded.params)


def test_a_killed_run_in_a_bucket_goes_on(bucket, program, tiny, tofu_folder, monkeypatch):
    from train.runtime.tracking import Tracker

    options = (
        "--mesh.data 1 --train.steps 6 --train.batch-size 4 --max-length 96 "
        "--train.checkpoint-seconds 0 --output"
    ).split()
    argv = [tiny, tofu_folder / "retain99.json", *options]
    whole = program("train.finetune", *argv, "gs://ours/whole")
    assert whole.code == 0, whole.err
    real = Tracker.write

    def write(self, stage, at, scalars):
        if at == 4:
            raise KeyboardInterrupt
        real(self, stage, at, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "write", write)
        assert program("train.finetune", *argv, "gs://ours/run").code == 130
    for name in ("_mirrors", "_sent"):
        monkeypatch.setattr(remote, name, {})
    done = program("train.finetune", *argv, "gs://ours/run")
    assert done.code == 0 and "original: continuing at step 4 of 6" in done.err
    ours, theirs = (bucket.root / "ours" / name for name in ("run", "whole"))
    for name in ("metrics.jsonl", "summary.json", "export/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_without_credentials(bucket, program, tiny, tofu_folder):
    bucket.denied = True
    argv = [tiny, tofu_folder / "retain99.json", "--output", "gs://ours/run"]
    done = program("train.finetune", *argv)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "--output gs://ours/run cannot be written (OSError: anonymous caller" in done.err
    done = program("train.unlearn", "quickstart", "--output", "gs://ours/run")
    assert done.code == 2 and "--output gs://ours/run cannot be written" in done.err
    done = program("train.unlearn", "quickstart", "--stage.cache", "gs://ours/cache")
    assert done.code == 2 and "--stage.cache gs://ours/cache cannot be written" in done.err
    assert len(done.err.splitlines()) == 1


def test_without_the_package(program, tiny, tofu_folder, monkeypatch):
    monkeypatch.setattr(remote, "PACKAGES", {"gs": ("no_such_package", "json", "no.such")})
    argv = [tiny, tofu_folder / "retain99.json", "--output", "gs://ours/run"]
    done = program("train.finetune", *argv)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "needs no_such_package and no.such; pip install -e '.[gcs]'" in done.err
    done = program("train.finetune", tiny, tofu_folder / "retain99.json", "--output", "s3://b/run")
    assert done.code == 2 and "runs go to local folders and gs://" in done.err
    done = program("train.finetune", "gs://ours/model", tofu_folder / "retain99.json")
    assert done.code == 2 and "gs://ours/model: cannot be read" in done.err


def test_the_shared_cache_in_a_bucket(bucket, tmp_path):
    from train.runtime.stages import json_stage, params_stage

    computed = []

    def compute(checkpoints):
        computed.append(checkpoints)
        return state(3)

    cache = Path("gs://ours/cache")
    for name in ("one", "two"):
        params, _ = params_stage(tmp_path / name, "oracle", {"a": 1}, state(), compute, cache)
        assert same(params, state(3))
        log = json_stage(tmp_path / name / "evals" / "o.json", {"a": 1}, lambda: {"x": 1}, cache)
        assert log == {"x": 1}
    assert len(computed) == 1 and str(computed[0]).startswith("gs://ours/cache/checkpoints")


def test_whole_arrays_on_a_mesh(bucket):
    """A bucket's checkpoint is read into another layout."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2), jax.devices()[:4])
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tp")
    where = jax.sharding.NamedSharding(mesh, spec)
    save_tree(epath.Path("gs://ours/t"), state(), {})
    like = state(1) | {"kernel": jax.device_put(state(1)["kernel"], where)}
    back = checkpointing.load_tree(epath.Path("gs://ours/t"), like)
    assert same(back, state()) and back["kernel"].sharding == where
