"""Checkpoints: saved values come back bit for bit, and damage of any kind is detected."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train.runtime import checkpointing
from train.runtime.checkpointing import (
    MANIFEST,
    load_latest,
    load_tree,
    params_sha256,
    read_manifest,
    save_step,
    save_tree,
    steps_in,
    tree_digests,
)


class Moments(NamedTuple):
    """A stand-in for an optimizer state."""

    count: jax.Array
    mu: dict


class State(NamedTuple):
    """A stand-in for a training state."""

    params: dict
    moments: tuple
    step: jax.Array


def make_state(seed=0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"embedding": jnp.asarray(rng.normal(size=(40, 16)), jnp.float32)},
        "layers": {
            "mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 16, 24)), jnp.float32)}}
        },
        "final_norm": {"scale": jnp.asarray(rng.normal(size=16), jnp.bfloat16)},
    }
    # Every bit pattern counts: signed zeros, subnormals and NaN payloads too.
    params["embed"]["embedding"] = (
        params["embed"]["embedding"].at[0, :3].set(jnp.array([-0.0, 1e-42, jnp.nan]))
    )
    moments = Moments(jnp.int32(7), jax.tree.map(lambda x: x * 0.5, params))
    return State(params, (moments, ()), jnp.int32(7))


def same_bits(a, b) -> bool:
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(left, right, strict=True)
    )


def array_files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "arrays").rglob("*") if p.is_file() and p.stat().st_size)


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def fails(call, *parts) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tree"
    save_tree(folder, make_state(), {"stage": "original"})
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tree"))


def test_round_trip_keeps_structure_and_every_bit(saved):
    state = make_state()
    back = load_tree(saved, make_state(1))
    assert isinstance(back, State) and isinstance(back.moments[0], Moments)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert same_bits(back, state)
    manifest = read_manifest(saved)
    assert manifest is not None and manifest["stage"] == "original"
    assert len(manifest["digests"]) == len(jax.tree.leaves(state))
    assert not list(saved.parent.glob("*.part"))


def test_layout_of_the_asker_is_kept(saved):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.device_put(x, rows if x.ndim and x.shape[0] % 2 == 0 else whole),
        make_state(1),
    )
    back = load_tree(saved, like)
    assert back.params["embed"]["embedding"].sharding == rows
    assert same_bits(back, make_state())


def test_params_sha256_sees_values_names_shapes_and_dtypes():
    params = {"a": jnp.arange(4.0), "b": jnp.zeros((2, 2))}
    known = params_sha256(params)
    assert known == params_sha256({"b": jnp.zeros((2, 2)), "a": jnp.arange(4.0)})
    others = [
        {"a": jnp.arange(4.0), "c": jnp.zeros((2, 2))},
        {"a": jnp.arange(4.0), "b": jnp.zeros((4,))},
        {"a": jnp.arange(4.0), "b": jnp.zeros((2, 2), jnp.int32)},
        {"a": jnp.arange(4.0), "b": -jnp.zeros((2, 2))},
        {"a": jnp.arange(4.0).at[3].add(2**-21), "b": jnp.zeros((2, 2))},
    ]
    assert len({known, *map(params_sha256, others)}) == 1 + len(others)
    assert len(params_sha256({"a": jnp.zeros((0, 3))})) == 64


def flipped(saved, tmp_path, trials, seed):
    """Copies of a checkpoint, each with one bit flipped at a seeded position in a seeded file."""
    rng = random.Random(seed)
    files = array_files(saved)
    for trial in range(trials):
        folder = Path(shutil.copytree(saved, tmp_path / str(trial)))
        victim = folder / rng.choice(files).relative_to(saved)
        flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
        yield folder, victim
        shutil.rmtree(folder)


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    like = make_state(1)
    for folder, victim in flipped(saved, tmp_path, 30, 0):
        name = victim.relative_to(folder / "arrays").as_posix()
        fails(lambda folder=folder: load_tree(folder, like), str(folder), "damaged", name)


def test_twenty_flipped_bits_cost_a_step_each(tmp_path):
    """Any bit of a checkpoint's arrays: found, reported in one line, the step before is used."""
    for step in (1, 2):
        save_step(tmp_path / "whole", step, make_state(step), {})
    rng = random.Random(4)
    for trial in range(20):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(trial)))
        victim = rng.choice(array_files(folder / "2"))
        flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
        said: list[str] = []
        found = load_latest(folder, make_state(9), said.append)
        assert found is not None and found[0] == 1 and same_bits(found[1], make_state(1))
        assert len(said) == 1 and "\n" not in said[0], said
        assert str(folder / "2") in said[0] and "damaged" in said[0] and "using step 1" in said[0]
        shutil.rmtree(folder)


def test_digests_do_not_depend_on_the_mesh_and_see_every_bit():
    state = make_state()
    known = tree_digests(state)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    name = "params/layers/mlp/up/kernel"
    for spec in ((None, "a", "b"), (None, ("a", "b"), None), ("b", None, "a"), (None, "b", None)):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert tree_digests({name: jax.device_put(kernel, where)})[name] == known[name], spec
    rng = np.random.default_rng(0)
    host = np.asarray(kernel)
    seen = {known[name]}
    for _ in range(200):
        bits = host.copy().reshape(-1).view(np.uint32)
        bits[rng.integers(bits.size)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        seen.add(tree_digests({name: bits.view(np.float32).reshape(host.shape)})[name])
    rows = host[:, ::-1], host.swapaxes(0, 1).reshape(host.shape), host[::-1]
    seen |= {tree_digests({name: np.ascontiguousarray(x)})[name] for x in rows}
    assert len(seen) == 204
    names = ("int8", "uint8", "float16", "int32", "float32", "bool")
    kinds = [np.arange(6).astype(name) for name in names]
    assert len({tree_digests({"x": x})["x"] for x in kinds}) == 6


def test_sound_files_of_other_numbers(saved, tmp_path):
    manifest = json.loads((saved / MANIFEST).read_text())
    state = make_state()
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].add(1)
    save_tree(tmp_path / "other", state, {})
    theirs = json.loads((tmp_path / "other" / MANIFEST).read_text())
    del theirs["crc"]
    theirs["digests"] = manifest["digests"]
    (tmp_path / "other" / MANIFEST).write_text(json.dumps(theirs))
    fails(lambda: load_tree(tmp_path / "other", make_state(1)), "1 array(s)", "final_norm/scale")


@pytest.mark.parametrize("position", range(0, 100, 7))
def test_a_flip_in_the_manifest_never_gives_other_numbers(copy, position):
    path = copy / MANIFEST
    flip(path, path.stat().st_size * position // 100, position % 8)
    try:
        assert same_bits(load_tree(copy, make_state(1)), make_state())
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_files(copy, keep):
    victim = max(array_files(copy), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: int(victim.stat().st_size * keep)])
    fails(lambda: load_tree(copy, make_state(1)), str(copy), "delete that folder")


def test_missing_array_file(copy):
    max(array_files(copy), key=lambda p: p.stat().st_size).unlink()
    fails(lambda: load_tree(copy, make_state(1)), str(copy))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"digests": []}', '{"digestz": {}}', "\ud800"],
)
def test_manifest_damage(copy, text):
    (copy / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_manifest(copy) is None
    fails(lambda: load_tree(copy, make_state(1)), str(copy), "no checkpoint")


def test_wrong_digest_in_the_manifest(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["crc"]
    name = next(iter(manifest["digests"]))
    manifest["digests"][name] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    fails(lambda: load_tree(copy, make_state(1)), "damaged (1 array(s)", name)


def test_a_name_of_a_file_with_control_characters_is_printed_without_them(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["crc"]
    manifest["files"] = {"a\x1b[2J\x91.ocdbt": 1} | manifest["files"]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged .1 file") as error:
        load_tree(copy, make_state(1))
    assert str(error.value).isprintable()


def test_another_models_checkpoint(saved):
    state = make_state()
    more = state._replace(params=state.params | {"lm_head": {"kernel": jnp.zeros((16, 40))}})
    fails(lambda: load_tree(saved, more), str(saved), "another model")
    wider = state.params | {"final_norm": {"scale": jnp.zeros(24, jnp.bfloat16)}}
    fails(lambda: load_tree(saved, state._replace(params=wider)), str(saved), "another model")
    other = state.params | {"final_norm": {"scale": jnp.zeros(16, jnp.float32)}}
    fails(lambda: load_tree(saved, state._replace(params=other)), "another model")


def test_what_a_crash_left_is_ignored_and_cleaned(tmp_path):
    state = make_state()
    save_step(tmp_path, 3, state, {})
    crashed = Path(shutil.copytree(tmp_path / "3", tmp_path / "5.part"))
    (tmp_path / "7").mkdir()  # no manifest: incomplete as well
    assert steps_in(tmp_path) == [3]
    said = []
    found = load_latest(tmp_path, make_state(1), said.append)
    assert found is not None and found[0] == 3 and same_bits(found[1], state) and said == []
    save_step(tmp_path, 6, state, {})
    assert steps_in(tmp_path) == [3, 6] and not crashed.exists()
    # Leftovers of a crashed save of the same step do no harm.
    (tmp_path / "8.part" / "arrays").mkdir(parents=True)
    save_step(tmp_path, 8, state, {})
    assert steps_in(tmp_path) == [6, 8] and not list(tmp_path.glob("*.part"))


def test_keeps_the_last_two(tmp_path):
    for step in (2, 4, 10):
        save_step(tmp_path, step, make_state(step), {"note": step})
    assert steps_in(tmp_path) == [4, 10]
    manifest = read_manifest(tmp_path / "10")
    assert manifest is not None and (manifest["step"], manifest["note"]) == (10, 10)
    assert steps_in(tmp_path / "nowhere") == []
    assert load_latest(tmp_path / "nowhere", make_state(), print) is None


def test_the_step_before_a_damaged_one_is_used_and_said(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step, make_state(step), {})
    victim = max(array_files(tmp_path / "2"), key=lambda p: p.stat().st_size)
    flip(victim, victim.stat().st_size // 2, 3)
    said = []
    found = load_latest(tmp_path, make_state(9), said.append)
    assert found is not None and found[0] == 1 and same_bits(found[1], make_state(1))
    assert len(said) == 1 and str(tmp_path / "2") in said[0] and "using step 1" in said[0]
    # The last one damaged too: start over, and report it.
    (tmp_path / "1" / MANIFEST).write_text("{}")
    said.clear()
    assert load_latest(tmp_path, make_state(9), said.append) is None
    assert len(said) == 1 and "starting over" in said[0]


@pytest.mark.parametrize("where", ["arrays", "manifest", "rename"])
def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, where):
    save_step(tmp_path, 1, make_state(), {})

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "arrays":
        monkeypatch.setattr(checkpointing._orbax(), "save", full)
    elif where == "manifest":
        real = Path.write_text
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda p, *a, **k: full() if p.name == MANIFEST else real(p, *a, **k),
        )
    else:
        monkeypatch.setattr(os, "replace", full)
    fails(
        lambda: save_step(tmp_path, 2, make_state(), {}),
        "No space left on device",
        str(tmp_path / "2"),
        "--output",
    )
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    found = load_latest(tmp_path, make_state(9), print)
    assert found is not None and found[0] == 1


def test_what_orbax_still_writes_after_an_error_is_removed_too(tmp_path, monkeypatch):
    """Its threads finish later than its error and make the removed folder anew."""
    parts, waits = [], []

    def save(folder, tree):
        parts.append(Path(folder).parent)
        raise OSError(errno.ENOSPC, "No space left on device")

    def late(seconds):
        waits.append(seconds)
        if len(waits) in (2, 3):
            (parts[0] / "arrays").mkdir(parents=True)

    monkeypatch.setattr(checkpointing, "_save", save)
    monkeypatch.setattr(checkpointing.time, "sleep", late)
    fails(lambda: save_step(tmp_path, 2, make_state(), {}), "No space left")
    assert len(waits) == 4 and not list(tmp_path.iterdir())


def test_a_machine_that_was_suspended_while_it_saved(tmp_path, monkeypatch):
    """Orbax gives up after 20 minutes of the wall's clock; what to do then is another thing."""

    def save(folder, tree):
        raise TimeoutError("ChainedFuture completed 0/2 futures but timed out after 1250 seconds.")

    monkeypatch.setattr(checkpointing, "_save", save)
    with pytest.raises(UserError, match="suspended.*the same command continues") as error:
        checkpointing.save_tree(tmp_path / "1", {"x": jnp.ones(2)}, {})
    assert "free space" not in str(error.value) and not list(tmp_path.iterdir())
