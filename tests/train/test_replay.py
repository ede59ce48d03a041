"""A zeroth-order stage in two programs, its coefficients in a file, and the stage replayed."""

import json
import shutil
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim import ZOState
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.examples import Example
from train.data.streams import make_stream
from train.engine.hyper import hyper_of, traced_step
from train.engine.replays import coefficients, recording, replaying, stored
from train.engine.run import Recipe, Run, train
from train.engine.step import init_state, objective_state
from train.evaluators.evaluation import Model
from train.options.config import LoraConfig, SelectConfig, UnlearnConfig
from train.options.optimizers import OPTIMIZERS, build, over_rows
from train.options.optimizers import options_of as optimizer_of
from train.runtime import checkpointing, digests
from train.runtime.checkpointing import params_sha256
from train.runtime.sharding import MeshConfig, make_mesh, put_batch, put_params
from train.runtime.tracking import Tracker

LEARNER = DecoderLearner(Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4)))
REPLAYED = [name for name, row in OPTIMIZERS.items() if row.replays]
STEPS, EVERY, ROWS = 8, 3, 4


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(stored, "EVERY", EVERY)


@pytest.fixture(scope="module")
def start():
    return jax.device_get(LEARNER.decoder.init(jax.random.key(0)))


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def small(name, **more):
    """A row with sizes that fit the model."""
    options = optimizer_of(name, learning_rate=1e-3, weight_decay=0.1, **more)
    sizes = {"rank": 4, "refresh": 3, "vector_rate": 1e-3}
    known = vars(options)
    sizes = {k: v for k, v in sizes.items() if k in known}
    return over_rows(optimizer_of(name, **{**vars(options), **sizes}), ROWS)


def stream(count=12):
    draw = np.random.default_rng(0)
    sizes = [(int(draw.integers(3, 8)), int(draw.integers(1, 9))) for _ in range(count)]
    rows = [Example(draw.integers(2, 64, p + a).tolist(), p) for p, a in sizes]
    return make_stream(rows, 0, buckets=1)


# The format.

HEADER = {
    "base_sha256": "ab" * 32,
    "leaves": {"w": ["float32", 2]},
    "optimizer": {"name": "mezo"},
    "schedule": {"peak": 1e-5, "warm": 0.0, "rest": 7.0},
    "steps": 7,
    "queries": 2,
    "seed": 0,
    "generator": "threefry2x32",
    "jax": "0",
    "platform": "cpu",
}


def state_with(coeffs):
    """An optimizer's state, as far as it is recorded."""
    return ZOState(0, 0, {}, 0.0, np.float32(coeffs), {})


def written(path, steps=7):
    """A file as `Recorder` writes it."""
    record = recording.Recording(path, {k: v for k, v in HEADER.items() if k != "queries"})
    record = record._replace(header=record.header | {"steps": steps})
    made = recording.Recorder(record, 2, 0, 0, None)
    for step in range(steps + 1):
        if step:
            made.mark(step, {"w": np.full(2, step, np.float32)})
        if step < steps:
            made.add(state_with([step, -step]))
    return path


def test_what_is_written_is_read(tmp_path):
    data = written(tmp_path / "a.zo").read_bytes()
    made = stored.read(tmp_path / "a.zo")
    np.testing.assert_array_equal(made.coeffs, [[i, -i] for i in range(7)])
    assert [mark.step for mark in made.milestones] == [3, 6, 7]
    for mark in made.milestones:
        params = {"w": np.full(2, mark.step, np.float32)}
        assert mark.sha256 == params_sha256(params)
        np.testing.assert_array_equal(mark.sketch, digests.sketch(params))
    line, _, rest = data.partition(b"\n")
    assert json.loads(line) == {"format": "replay.zo 1", **made.header}
    assert {k: made.header[k] for k in ("base_sha256", "queries", "optimizer")}.items() <= (
        HEADER.items()
    )
    assert len(rest) == 7 * 2 * 4 + 3 * 52
    assert np.frombuffer(rest[8:16], "<f4").tolist() == [1, -1]


def test_a_milestone_at_the_end_is_written_once(tmp_path):
    made = stored.read(written(tmp_path / "a.zo", steps=6))
    assert [mark.step for mark in made.milestones] == [3, 6]


def test_every_flipped_bit_is_found_where_it_is(tmp_path):
    data = written(tmp_path / "a.zo").read_bytes()
    behind = data.index(b"\n") + 1
    path = tmp_path / "b.zo"

    def complaint(at, mask):
        changed = bytearray(data)
        changed[at] ^= mask
        path.write_bytes(changed)
        with pytest.raises(UserError) as error:
            stored.read(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    for at in range(behind):
        for bit in range(8) if at % 7 == 0 else (at % 8,):
            assert "header" in complaint(at, 1 << bit)
    steps = iter(range(7))
    place = behind
    for end, count in ((3, 3), (6, 3), (7, 1)):
        parts = [(8, f"coefficients of step {next(steps)} has") for _ in range(count)]
        parts += [(48, f"milestone after step {end} has"), (4, f"CRC-32 after step {end} has")]
        for size, words in parts:
            for at in range(place, place + size):
                for bit in range(8):
                    assert words in complaint(at, 1 << bit), (at, bit)
            place += size
    assert place == len(data)
    # Two bits have no place of their own, and are found all the same.
    assert "block of steps 0 to 3 is damaged" in complaint(behind + 5, 0b101)


def test_cut_and_foreign_files(tmp_path):
    data = written(tmp_path / "a.zo").read_bytes()
    path = tmp_path / "b.zo"
    behind = data.index(b"\n") + 1
    block = 3 * 8 + 52
    blocks = [data[behind : behind + block], data[behind + block : behind + 2 * block]]
    for changed, words in {
        data[:-1]: "holds 7 of 7 steps",
        data[: behind + block + 17]: "holds 5 of 7 steps",
        data[:behind]: "holds 0 of 7 steps",
        data + b"\0": "is too long",
        data[: behind - 1]: "header, is damaged",
        b"": "is no replay.zo",
        b"\x80\x04safetensors": "is no replay.zo",
        # Each block is as it was written; their order is not.
        data[:behind] + blocks[1] + blocks[0] + data[behind + 2 * block :]: "steps 0 to 3",
    }.items():
        path.write_bytes(changed)
        with pytest.raises(UserError, match=words):
            stored.read(path)
    with pytest.raises(UserError, match="does not exist"):
        stored.read(tmp_path / "none")
    # A header asks for no memory that the file does not fill.
    path.write_bytes(stored.header_line({**HEADER, "steps": 10**15}) + b"\0" * 100)
    with pytest.raises(UserError, match=f"of {10**15} steps"):
        stored.read(path)
    other = {**json.loads(data[:behind]), "format": "replay.zo 2"}
    del other["crc32"]
    text = json.dumps(other)[:-1]
    path.write_text(f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n')
    with pytest.raises(UserError, match="format 'replay.zo 2'"):
        stored.read(path)


def test_sizes_that_are_promised():
    for steps, queries, kilobytes in ((8000, 4, 128), (20_000, 1, 80)):
        size = steps * queries * stored.FLOATS.itemsize
        assert size == kilobytes * 1000
        assert -(-steps // 500) * stored.TRAILER < 0.03 * size


def noise_like(tree, draw):
    return jax.tree.map(lambda x: draw.standard_normal(x.shape, np.float32), tree)


def test_a_sketch_measures_how_far_trees_are_apart():
    draw = np.random.default_rng(0)
    shapes = {"a": (300, 40), "b": (5000,), "c": (7, 11, 13)}
    tree = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    whole = np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))
    found = []
    for seed in range(40):
        noise = noise_like(tree, np.random.default_rng(seed))
        moved = jax.tree.map(lambda x, n: x + np.float32(1e-3) * n, tree, noise)
        far = np.sqrt(sum(np.sum(np.square(np.float64(n))) for n in jax.tree.leaves(noise)))
        projected = np.linalg.norm(digests.sketch(moved) - digests.sketch(tree)) / 2
        found.append(projected / (1e-3 * far))
    # The square of each is a mean of four squares of standard normal numbers.
    assert abs(np.mean(np.square(found)) - 1) < 4 * np.sqrt(0.5 / 40)
    norm = [np.linalg.norm(digests.sketch(tree)) / 2 / whole]
    assert 0.1 < norm[0] < 3
    # The same digits on any layout: sums of sixteen, of sixteen, ...
    placed = jax.device_put(tree["a"], jax.NamedSharding(mesh_of(1, 4, 1), jax.P("fsdp")))
    apart = digests.apart(digests.sketch({"a": placed}), digests.sketch({"a": tree["a"]}))
    assert apart < 2e-7


# Two programs.


def test_rows_say_whether_they_replay(start):
    """A row of values is two programs where, and only where, coefficients are all it needs."""
    for name, row in OPTIMIZERS.items():
        if row.needs != "value":
            assert not row.replays, name
            continue
        tx, _, _ = build(small(name), STEPS)

        def update(params, tx=tx):
            state = tx.init(params)
            coeffs = coefficients.state_of(state).coeffs
            return tx.update(None, state, params, coeffs=coeffs)

        try:
            jax.eval_shape(update, start)
        except ValueError:
            assert not row.replays, name
        else:
            assert row.replays, name


@pytest.mark.parametrize("name", ["mezo", "zo-muon", "hybrid"])
def test_the_state_is_found_beside_parameters_with_the_names_of_its_fields(name):
    """Bases and moments are trees like the parameters."""
    names = ("value", "seed", "coeffs")
    params = {key: {key: jnp.ones((6, 5)) for key in names} for key in names}
    tx, _, _ = build(optimizer_of(name), 40)
    before = tx.init(params)
    after = coefficients.with_state(before, value=jnp.float32(3), seed=jnp.uint32(7))
    was, found = (coefficients.state_of(state) for state in (before, after))
    assert (float(found.value), int(found.seed)) == (3, 7)
    assert found.coeffs.shape == was.coeffs.shape
    untouched = was._replace(value=found.value, seed=found.seed)
    jax.tree.map(np.testing.assert_array_equal, found, untouched)
    assert jax.tree.structure(before) == jax.tree.structure(after)


def one_step(name, two, start, accumulate=1, objective="graddiff"):
    mesh = mesh_of(1, 1, 1)
    row, settings = objectives.resolve(objective)
    optimizer = small(name, queries=2)
    tx, _, _ = build(optimizer, STEPS)
    params = put_params(start, mesh)
    memory = objective_state(LEARNER, row, settings, 3)
    state, shardings = init_state(params, tx, mesh, memory)
    hyper = jax.tree.map(jnp.asarray, hyper_of(settings, optimizer, STEPS, 3))
    batches = {s: put_batch(stream().batch(range(ROWS)), mesh) for s in row.streams}
    args = (state, hyper, None, batches)
    how = (None, accumulate, coefficients.ALL)
    if two:
        compile_for = coefficients.compiler(
            LEARNER, row, settings, optimizer, *how, shardings, mesh
        )
        step, (evaluate, apply) = compile_for(*args)
        # An evaluation tells a few numbers, and parameters and moments are written in place.
        size = sum(x.nbytes for x in jax.tree.leaves(state.params))
        assert evaluate.memory_analysis().output_size_in_bytes < 1024
        assert apply.memory_analysis().alias_size_in_bytes >= size
    else:
        step = jax.jit(traced_step(LEARNER, row, settings, optimizer, "sum", *how))
    state, metrics = step(*args)
    return step(state, hyper, None, batches), metrics


@pytest.mark.parametrize(
    ("name", "accumulate"), [("mezo", 2), pytest.param("zo-muon", 1, marks=pytest.mark.slow)]
)
def test_two_programs_take_the_step_of_one(name, accumulate, start):
    (got, more), first = one_step(name, True, start, accumulate)
    (want, metrics), before = one_step(name, False, start, accumulate)
    assert more.keys() == metrics.keys()
    for found, wanted in ((first, before), (more, metrics)):
        for key in wanted:
            np.testing.assert_allclose(found[key], wanted[key], rtol=2e-4, err_msg=key)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert int(got.step) == 2 and float(got.opt_state.value) == float(more["loss"])
    coeffs = got.opt_state.coeffs
    np.testing.assert_allclose(coeffs, want.opt_state.coeffs, rtol=2e-3, atol=2e-3)
    moved = optax.tree.norm(optax.tree.sub(want.params, start))
    assert 0 < moved
    assert optax.tree.norm(optax.tree.sub(got.params, want.params)) < 2e-3 * moved


@pytest.fixture(scope="module")
def few(start):
    """Leaves of each kind: a table, matrices split either way, a vector."""
    layers = start["layers"]
    return {
        "embed": start["embed"],
        "layers": {
            "mlp": {name: layers["mlp"][name] for name in ("up", "down")},
            "mlp_norm": layers["mlp_norm"],
        },
    }


@pytest.fixture(scope="module")
def bits(few):
    """The sha256 of parameters after some steps of fixed coefficients, by row and mesh."""
    kept: dict[Any, str] = {}

    def after(name, sizes):
        if (name, sizes) not in kept:
            mesh, optimizer = mesh_of(*sizes), small(name)
            tx, _, _ = build(optimizer, STEPS)
            state, shardings = init_state(put_params(few, mesh), tx, mesh)
            apply = coefficients.compile_apply(optimizer, shardings)
            numbers = hyper_of(objectives.resolve("nll")[1], optimizer, STEPS)["schedule"]
            now = (state.params, state.opt_state)
            count = state.opt_state.coeffs.size
            for step in range(5):  # past a refresh of the bases
                draw = np.random.default_rng(step)
                *now, _ = apply(*now, numbers, np.float32(30 * draw.standard_normal(count)))
            kept[name, sizes] = params_sha256(now[0])
        return kept[name, sizes]

    return after


@pytest.mark.optimised
@pytest.mark.parametrize(
    "sizes", [(1, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((1, 4, 1), (2, 1, 1)))]
)
@pytest.mark.parametrize("name", REPLAYED)
def test_apply_gives_the_same_bits_on_any_mesh(name, sizes, bits, few):
    alone = bits(name, (1, 1, 1))
    assert alone != params_sha256(few)
    assert bits(name, sizes) == alone


# A stage, killed and continued, and replayed.


LATER = b"written after the checkpoint"


class Stopped(Exception):
    """Raised to interrupt a stage."""


def run_stage(
    root,
    start,
    sizes=(1, 1, 1),
    name="mezo",
    seconds=0.0,
    adapters=None,
    select=None,
    record=stored.NAME,
    seed=5,
):
    root.mkdir(exist_ok=True)
    config = UnlearnConfig(batch_size=ROWS, steps=STEPS, checkpoint_seconds=seconds)
    mesh = mesh_of(*sizes)
    base = Model(LEARNER.decoder, put_params(start, mesh), None, params_sha256(start))
    keep = []
    model = train(
        Run(root, mesh, seed, Tracker(root)),
        "tuned",
        base,
        objectives.resolve("nll"),
        {"train": stream()},
        Recipe(config, small(name), adapters=adapters, select=select),
        keep=keep.append,
        record=record,
    )
    return model, keep[0] if keep else None


def replayed(path, start, sizes=(1, 1, 1), **options):
    """The trained tree and the finished parameters, from the file alone."""
    made, mesh = stored.read(path), mesh_of(*sizes)
    base = Model(LEARNER.decoder, put_params(start, mesh), None, params_sha256(start))
    replaying.check_base(made, base, path, "BASE")
    optimizer = replaying.optimizer_of(made, path)
    trained = replaying.trained_of(made, base, mesh)
    rules = LEARNER.rules
    tree, how = replaying.replay(made, optimizer, trained.start, rules, mesh, **options)
    return tree, trained.finish(tree), how


@pytest.fixture(scope="module")
def stage(start, tmp_path_factory):
    """A stage in one go: its model and its folder."""
    root = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "EVERY", EVERY)
        return run_stage(root, start, seconds=1e9)[0], root


def test_a_replay_ends_with_the_bits_of_the_run(stage, start):
    model, root = stage
    tree, params, how = replayed(root / "replay.zo", start)
    assert params_sha256(tree) == params_sha256(params) == model.sha != params_sha256(start)
    assert how == (0.0, 3, True)
    header = stored.read(root / "replay.zo").header
    assert header["base_sha256"] == params_sha256(start)
    assert header["leaves"] == digests.tree_shapes(start)
    assert header["optimizer"]["name"] == "mezo" and header["steps"] == STEPS


def stop_at(patch, step):
    """Let the logging of a step fail once; the file is then ahead of the last checkpoint."""
    real, stopped = Tracker.write, []

    def write(self, name, at, scalars):
        if at == step and not stopped:
            stopped.append(at)
            with (self.folder / "replay.zo").open("ab") as file:
                file.write(LATER)
            raise Stopped
        real(self, name, at, scalars)

    patch.setattr(Tracker, "write", write)


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
    """The folder of a stage that was killed within its second block, with a checkpoint a step."""
    root = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stored, "EVERY", EVERY)
        stop_at(patch, 5)
        run_stage(root, start)
    return root


def test_the_file_is_on_disk_before_the_result_is_stored(stage, start, tmp_path, monkeypatch):
    """The checkpoints go then, and with them what could write its end again.

    The file is named after its stage, and another seed takes other directions.
    """
    order, real = [], recording.Recorder.checkpoint

    def checkpoint(self):
        found = real(self)
        order.append(found["replay"]["bytes"])
        return found

    monkeypatch.setattr(recording.Recorder, "checkpoint", checkpoint)
    run_stage(tmp_path, start, seconds=1e9, record=None, seed=6)
    assert [path.name for path in tmp_path.glob("*.zo")] == ["replay-tuned.zo"]
    file = tmp_path / "replay-tuned.zo"
    assert order == [file.stat().st_size]
    here, there = stored.read(file), stored.read(stage[1] / "replay.zo")
    assert here.header["seed"] != there.header["seed"]
    assert not np.isclose(here.coeffs, there.coeffs).any()


def test_a_killed_run_ends_with_the_same_bytes(stage, killed, start, tmp_path):
    model, root = stage
    again = shutil.copytree(killed, tmp_path / "again")
    assert run_stage(again, start)[0].sha == model.sha
    assert (again / "replay.zo").read_bytes() == (root / "replay.zo").read_bytes()


def test_killed_at_a_milestone(stage, start, tmp_path, monkeypatch):
    model, root = stage
    stop_at(monkeypatch, EVERY)
    with pytest.raises(Stopped):
        run_stage(tmp_path, start)
    assert run_stage(tmp_path, start)[0].sha == model.sha
    assert (tmp_path / "replay.zo").read_bytes() == (root / "replay.zo").read_bytes()


def test_a_file_harmed_between_two_starts_is_given_up(killed, start, tmp_path, capsys):
    """Also in the block that no CRC-32 has closed yet: the checkpoint knows its own."""
    again = shutil.copytree(killed, tmp_path / "again")
    path = again / "replay.zo"
    data = path.read_bytes().removesuffix(LATER)
    state, (folder,) = state_with([0]), (again / "checkpoints").iterdir()
    kept = checkpointing.read_manifest(folder / "5")["replay"]
    assert kept["bytes"] == len(data)
    added = {"format", "queries", "seed", "every", "crc32", *recording.surroundings()}
    whole = json.loads(data[: data.index(b"\n")])
    header = {k: v for k, v in whole.items() if k not in added}
    record = recording.Recording(path, header)
    for harmed in (data, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], data[:-1], b"", None):
        path.unlink(missing_ok=True)
        if harmed is not None:
            path.write_bytes(harmed)
        made = recording.Recorder(record, 1, whole["seed"], 5, kept)
        assert made.open == path.exists() == (harmed == data), harmed
        made.add(state)  # does nothing where the file was given up
        assert path.exists() == made.open
        said = capsys.readouterr().err
        assert ("none is written for this stage" in said) != made.open
    assert run_stage(again, start)[0].sha  # and the stage goes on without
    assert not path.exists()


def test_a_replay_continues_where_it_was_stopped(stage, start, tmp_path, monkeypatch):
    model, root = stage
    real = replaying.compiled

    def failing(lowered):
        apply, calls = real(lowered), []

        def call(*rest):
            calls.append(None)
            if len(calls) == 6:
                raise Stopped
            return apply(*rest)

        return call

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(replaying, "compiled", failing)
        replayed(root / "replay.zo", start, checkpoints=tmp_path / "c", seconds=-1.0)
    stopped = shutil.copytree(tmp_path / "c", tmp_path / "other")
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(
            replaying,
            "compiled",
            lambda lowered: lambda *rest: calls.append(None) or real(lowered)(*rest),
        )
        tree, *_ = replayed(root / "replay.zo", start, checkpoints=tmp_path / "c", seconds=1e9)
    assert len(calls) == STEPS - 5 and params_sha256(tree) == model.sha
    # What the steps before showed is kept.
    for manifest in stopped.glob("*/manifest.json"):
        told = json.loads(manifest.read_text())
        assert told["checked"] == [0.0, True]
        del told["crc"]
        manifest.write_text(json.dumps(told | {"checked": [1e-7, False]}))
    *_, how = replayed(root / "replay.zo", start, checkpoints=stopped, seconds=1e9)
    assert how == (1e-7, 3, False)


def test_the_model_on_the_way_is_that_of_a_longer_replay(stage, start):
    """Up to a milestone, and between two."""
    _, root = stage
    path = root / "replay.zo"
    made = stored.read(path)
    found = [replayed(path, start, steps=steps)[0] for steps in (1, 2, EVERY)]
    shas = [params_sha256(tree) for tree in found]
    assert shas[-1] == made.milestones[0].sha256 and len({*shas, params_sha256(start)}) == 4


def test_a_sketch_of_equal_digits_is_not_bitwise_equality(stage, start, monkeypatch):
    """One last bit is another sha256 and, in float32 sums, the same sketch."""
    _, root = stage
    monkeypatch.setattr(digests, "params_sha256", lambda tree: "00" * 32)
    *_, how = replayed(root / "replay.zo", start, tolerance=1e-6)
    assert how == (0.0, 3, False)
    with pytest.raises(UserError, match="differ from the run's by less than a sketch .* shows"):
        replayed(root / "replay.zo", start)


def test_the_first_step_that_differs_is_named(stage, start, tmp_path):
    """Coefficients that were changed together with their CRC-32, as no accident does."""
    _, root = stage
    path = tmp_path / "forged.zo"
    data = bytearray((root / "replay.zo").read_bytes())
    behind = data.index(b"\n") + 1
    ends, crc = [(3 * 4, 48), (3 * 4, 48), (2 * 4, 48)], zlib.crc32(data[:behind])
    place = behind
    for block, (size, more) in enumerate(ends):
        if block == 1:
            data[place : place + 4] = np.float32(1e-2).tobytes()
        crc = zlib.crc32(data[place : place + size + more], crc)
        data[place + size + more : place + size + more + 4] = crc.to_bytes(4, "little")
        place += size + more + 4
    path.write_bytes(data)
    differ = "parameters after step 6 differ from the run's by .* of their norm"
    with pytest.raises(UserError, match=f"{differ} .*after step 3 were the same, between .*none"):
        replayed(path, start)
    with pytest.raises(UserError, match=f"{differ}, more than --tolerance 1e-09 ") as error:
        replayed(path, start, tolerance=1e-9)
    assert "give --tolerance" not in str(error.value)
    _, _, how = replayed(path, start, tolerance=0.5)
    assert 1e-9 < how.apart < 0.5 and not how.bitwise


def test_another_base_is_refused(stage, start):
    _, root = stage
    other = jax.tree.map(lambda x: x + np.float32(1e-6), start)
    with pytest.raises(UserError, match="is not the model that .* starts from"):
        replayed(root / "replay.zo", other)


@pytest.mark.parametrize("how", [pytest.param("adapters", marks=pytest.mark.slow), "leaves"])
def test_what_is_trained_beside_the_model_is_replayed(how, start, tmp_path):
    parts = {
        "adapters": {"adapters": LoraConfig(rank=2)},
        "leaves": {"select": SelectConfig(leaves=("mlp/down",), blocks=(1,))},
    }[how]
    model, trained = run_stage(tmp_path, start, **parts)
    tree, params, _ = replayed(tmp_path / "replay.zo", start)
    assert params_sha256(tree) == params_sha256(trained)
    assert params_sha256(params) == model.sha != params_sha256(start)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", REPLAYED)
def test_four_devices_train_and_one_replays(name, start, tmp_path):
    # Rows that are evaluated on their own are not split.
    mesh = (1, 1, 1, 4) if OPTIMIZERS[name].parts else (1, 4, 1)
    model, _ = run_stage(tmp_path, start, mesh, name, seconds=1e9)
    tree, *_ = replayed(tmp_path / "replay.zo", start)
    assert params_sha256(tree) == model.sha
    tree, *_ = replayed(tmp_path / "replay.zo", start, (2, 1, 2))
    assert params_sha256(tree) == model.sha


def test_other_optimizers_write_none_and_are_refused_by_name(start, tmp_path):
    run_stage(tmp_path, start, name="adamw", seconds=1e9)
    assert (tmp_path / "metrics.jsonl").exists() and not list(tmp_path.glob("*.zo"))
    for name in set(OPTIMIZERS) - set(REPLAYED):
        with pytest.raises(UserError, match=f"optimizer {name} needs more than the coefficients"):
            replaying.refuse(name, "RUN")
