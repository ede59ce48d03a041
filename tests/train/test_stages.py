"""Results stored under the digest of what they were made from: computed once, redone on damage."""

import errno
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train.runtime.checkpointing import params_sha256, save_step
from train.runtime.stages import digest, folder_of, json_stage, params_stage, write_atomic

INPUTS = {"start": "abc", "steps": 3, "optimizer": {"name": "adamw", "learning_rate": 1e-3}}
LIKE = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}


def made(value=1.0):
    return {"w": jnp.full((3, 4), value), "b": jnp.arange(4.0)}


class Counted:
    """A computation that counts how often it runs and leaves a checkpoint behind."""

    def __init__(self, value=1.0):
        self.value, self.times, self.folders = value, 0, []

    def __call__(self, checkpoints: Path):
        self.times += 1
        self.folders.append(checkpoints)
        save_step(checkpoints, 1, {"x": jnp.ones(3)}, {})
        return made(self.value)


def test_params_are_computed_once(tmp_path, capsys):
    compute = Counted()
    params, sha = params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    again, sha_again = params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    assert compute.times == 1 and sha == sha_again == params_sha256(made())
    np.testing.assert_array_equal(params["w"], again["w"])
    assert capsys.readouterr().err == "original: found, made from the same inputs\n"
    # Its checkpoints hold the optimizer state too: removed once the result is stored.
    assert not compute.folders[0].exists()
    assert compute.folders[0].parent == tmp_path / "checkpoints"
    assert folder_of(tmp_path, "original", INPUTS).is_dir()


def test_other_inputs_or_another_name_are_another_result(tmp_path):
    compute = Counted()
    params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    params_stage(tmp_path, "original", INPUTS | {"steps": 4}, LIKE, compute)
    params_stage(tmp_path, "oracle", INPUTS, LIKE, compute)
    assert compute.times == 3 and len(set(compute.folders)) == 3
    # The order of the entries does not matter.
    params_stage(tmp_path, "original", dict(reversed(INPUTS.items())), LIKE, compute)
    assert compute.times == 3


@pytest.mark.parametrize("damage", ["flip", "manifest", "cut", "gone"])
def test_damage_is_computed_again(tmp_path, capsys, damage):
    compute = Counted()
    _, sha = params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    folder = folder_of(tmp_path, "original", INPUTS)
    files = [p for p in (folder / "arrays").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        victim.write_bytes(bytes(data))
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"stage": "orig')
    elif damage == "cut":
        victim.write_bytes(bytes(data[:-1]))
    else:
        victim.unlink()
    params, sha_again = params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    assert compute.times == 2 and sha_again == sha
    np.testing.assert_array_equal(params["w"], made()["w"])
    said = capsys.readouterr().err
    if damage != "manifest":  # then nothing remains that could be called damaged
        assert said.count("\n") == 1 and str(folder) in said and "computing it again" in said
    params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    assert compute.times == 2


def test_a_stage_that_fails_stores_nothing(tmp_path):
    def broken(checkpoints):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        params_stage(tmp_path, "original", INPUTS, LIKE, broken)
    compute = Counted()
    params_stage(tmp_path, "original", INPUTS, LIKE, compute)
    assert compute.times == 1


class Answer:
    def __init__(self, value):
        self.value, self.times = value, 0

    def __call__(self):
        self.times += 1
        return self.value


def test_json_is_computed_once(tmp_path):
    path = tmp_path / "evals" / "oracle.json"
    compute = Answer({"x": [0.1, None, "é"]})
    assert json_stage(path, INPUTS, compute) == json_stage(path, INPUTS, compute) == compute.value
    assert compute.times == 1
    assert json.loads(path.read_text()) == compute.value


@pytest.mark.parametrize("change", ["edited", "cut", "no file", "no key", "inputs", "bytes"])
def test_stale_json_is_computed_again(tmp_path, change):
    path = tmp_path / "oracle.json"
    first, second = Answer({"x": 1}), Answer({"x": 2})
    json_stage(path, INPUTS, first)
    inputs = INPUTS
    if change == "edited":
        path.write_text('{"x": 7}')
    elif change == "cut":
        path.write_text('{"x"')
    elif change == "no file":
        path.unlink()
    elif change == "no key":
        path.with_suffix(".key").unlink()
    elif change == "inputs":
        inputs = INPUTS | {"seed": 1}
    else:
        path.with_suffix(".key").write_bytes(b"\xff\xfe")
    assert json_stage(path, inputs, second) == {"x": 2} and second.times == 1
    assert json_stage(path, inputs, second) == {"x": 2} and second.times == 1


def test_digests_are_stable():
    # If these change, every stored result is computed again: change them only on purpose.
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({"b": [1, 2.5, None], "a": "é"}) == digest({"a": "é", "b": [1, 2.5, None]})
    values = [{}, [], None, 0, False, "", {"a": 1}, {"a": 1.5}, {"a": [1]}, {"a": [[1]]}]
    assert len({digest(v) for v in values}) == len(values)
    assert digest({"path": Path("x")}) == digest({"path": "x"})


def test_write_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*a.json: No space left on device; free"):
        write_atomic(path, "three")
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError):
        write_atomic(path, "three")
    monkeypatch.undo()
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one: bytes, rename, folder, in this order."""
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix())
        fsync(handle)

    def renamed(source, target):
        done.append("rename " + Path(target).relative_to(tmp_path).as_posix())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomic(tmp_path / "a.json", "one")
    part, *rest = done
    assert part.startswith("a.json.") and part.endswith(".part")
    assert rest == ["rename a.json", "."]
    done.clear()
    save_step(tmp_path, 3, made(), {})
    at = done.index("rename 3")
    before, after = done[:at], done[at + 1 :]
    files = {p.relative_to(tmp_path / "3").as_posix() for p in (tmp_path / "3").rglob("*")}
    assert {"manifest.json", "arrays"} < files
    assert {name.partition(".part")[2].lstrip("/") for name in before} >= files | {""}
    assert after == ["."]
