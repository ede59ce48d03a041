"""Weights are read file by file onto the devices: the host holds a few tensors, no whole leaf."""

import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import models
from models.decoder.model import Decoder, DecoderConfig
from models.files import safetensors_files
from models.files.weights import flatten

CONFIG = DecoderConfig(
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
SHARD = 48 * 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 390 MB in 8 files or more."""
    draw = np.random.default_rng(0)

    def leaf(shape):
        # A short period: cheap to draw, and every layer and row differs from its neighbours.
        return np.resize(draw.standard_normal(99_991).astype(np.float32), shape.shape)

    vocab = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    params = jax.tree.map(leaf, Decoder(CONFIG).shapes())
    loaded = models.Loaded(CONFIG, params, models.Tokenizer(backend))
    return models.export(loaded, tmp_path_factory.mktemp("big") / "model", shard_bytes=SHARD)


def whole(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_host_holds_two_files_at_most(folder):
    assert len(list(folder.glob("*.safetensors"))) >= 8
    stacks = flatten(Decoder(CONFIG).shapes())
    # What a loader that assembles a whole leaf would hold.
    assert 4 * stacks["layers/mlp/up/kernel"].size > 2 * SHARD
    gc.collect()
    tracemalloc.start()
    try:
        params = models.load(folder).params
        jax.block_until_ready(params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # On CPU the embedding's device buffer may be the host array itself.
    assert peak <= 2 * SHARD, f"{peak / 1e6:.0f} MB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_the_process_grows_by_the_model_and_two_files(folder, repo):
    """The same as measured by the operating system, in a separate process."""
    program = (
        "import re, sys, jax, models\n"
        "def peak():\n"  # ru_maxrss starts at that of the parent process
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) * 1024\n"
        "jax.jit(lambda: jax.numpy.zeros(3))().block_until_ready()\n"
        "models.Tokenizer.from_folder(sys.argv[1])\n"
        "before = peak()\n"
        "jax.block_until_ready(models.load(sys.argv[1]).params)\n"
        "print(peak() - before)\n"
    )
    # With one heap: those of many threads keep 10 to 60 MB of what was given back.
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=repo,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert 0.9 * whole(folder) <= grown <= whole(folder) + 2 * SHARD, f"{grown / 1e6:.0f} MB"


def test_each_tensor_is_read_once_on_any_mesh(folder, monkeypatch):
    """Several devices that need columns of one tensor share one read of its rows."""
    read = []
    real = safetensors_files.read_rows

    def read_rows(path, kind, shape, offset, first, last):
        found = real(path, kind, shape, offset, first, last)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(safetensors_files, "read_rows", read_rows)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def where(path, shape):
        last = ("fsdp", "tp") if path.endswith(("kernel", "embedding")) else (None,)
        spec = jax.sharding.PartitionSpec(*(None,) * (len(shape) - len(last)), *last)
        return jax.sharding.NamedSharding(mesh, spec)

    params = models.load(folder, shardings=where).params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(read) == size
    plain = flatten(models.load(folder).params)
    for path, leaf in flatten(params).items():
        assert np.array_equal(leaf, plain[path]), path


def test_a_process_reads_the_rows_its_devices_hold(folder):
    """Half of the rows of a tensor are half of its bytes."""
    path = min(folder.glob("model-00001-*"))
    header = safetensors_files.read_header(path)
    name = next(n for n, (_, shape, _) in header.items() if len(shape) == 2)
    kind, shape, offset = header[name]
    everything = safetensors_files.read_rows(path, kind, shape, offset, 0, shape[0])
    half = safetensors_files.read_rows(path, kind, shape, offset, shape[0] // 2, shape[0])
    assert half.nbytes == everything.nbytes // 2
    assert np.array_equal(half, everything[shape[0] // 2 :])
