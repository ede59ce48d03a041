"""Two processes with two devices each, over loopback, against one process with four.

This file is also the program that the processes run: `test_multiprocess.py SET PROCESS PORT FILE`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import OBJECTIVES
from jaxlib_unlearn.objectives import options_of as objective_of
from models import arrays
from models.decoder.generate import SamplingConfig, generate
from models.decoder.labels import head_of
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.examples import Example
from train.data.references import with_references
from train.data.streams import batches_of, make_stream
from train.engine.step import Losses, init_state
from train.options.optimizers import OPTIMIZERS, build
from train.options.optimizers import options_of as optimizer_of
from train.runtime import checkpointing, distributed, sharding
from train.runtime.digests import params_sha256
from train.runtime.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.multiprocess

DECODER = Decoder(DecoderConfig(64, 16, 32, 2, 4, 2, 4))
LEARNER = DecoderLearner(DECODER)
MESH = MeshConfig(2, 2, 1)
ROWS, SEED = 16, 3
# The sets that the default run compares, and those of the slow one.
SETS = {
    "some": (("npo", "asu"), ("adamw", "muon")),
    "all": (
        tuple(
            name
            for name, row in OBJECTIVES.items()
            if name != "nll" and "fork" not in row.reference.values()
        ),
        tuple(name for name, row in OPTIMIZERS.items() if row.needs in ("joint", "split")),
    ),
}


# The numbers that both sides compute.


def start_params() -> Any:
    draw = np.random.default_rng(0)

    def one(path, leaf):
        noise = draw.standard_normal(leaf.shape, np.float32)
        if sharding.path_str(path).endswith("scale"):
            return 1 + 0.1 * noise
        return noise * np.float32(0.4 if leaf.shape[0] == 64 else leaf.shape[-2] ** -0.5)

    return jax.tree_util.tree_map_with_path(one, DECODER.shapes())


def streams_of(names) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    found = {}
    for name in ("forget", "retain", "idk", "train"):
        count = 30 if name == "retain" else 20
        sizes = [(int(draw.integers(3, 8)), int(draw.integers(1, 9))) for _ in range(count)]
        rows = [Example(draw.integers(2, 64, p + a).tolist(), p) for p, a in sizes]
        found[name] = make_stream(rows, 0, buckets=1, follows="forget" if name == "idk" else None)
    return {name: found[name] for name in names}


def flat(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    return {
        f"{prefix}/{sharding.path_str(path)}": arrays.host(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def numbers(which: str, folder: Path) -> dict[str, np.ndarray]:
    """Sample indices, losses, gradients, updates, answers, digests: all of them whole."""
    mesh = make_mesh(MESH, jax.devices()[:4])
    params = sharding.put_params(start_params(), mesh)
    here = sharding.rows_here(mesh, ROWS)
    found: dict[str, np.ndarray] = {"digest": np.array(params_sha256(params))}
    names, optimizers = SETS[which]
    for name in names:
        row, options = objectives.resolve(objective_of(name))
        ready = with_references(
            streams_of(row.streams), row, options, DECODER, params, "start", mesh, folder
        )
        batches = batches_of(ready, row.streams[0], SEED, ROWS, here)

        @jax.jit
        def run(params, frozen, batch, row=row, options=options):
            losses = Losses(LEARNER, row, options, params, frozen, batch, 1)
            return losses.gradients(params)

        for step in range(2):
            batch = {k: sharding.put_batch(b, mesh, ROWS) for k, b in batches(step).items()}
            for stream, columns in batch.items():
                found[f"{name}/rows/{stream}/{step}"] = arrays.host(columns["row_id"])
        metrics, (grads,) = run(params, head_of(params), batch)
        found[f"{name}/loss"] = arrays.host(metrics["loss"])
        terms = [x for n, x in sorted(metrics.items()) if n.endswith("_loss")]
        found[f"{name}/terms"] = np.array([arrays.host(x) for x in terms])
        found |= flat(f"{name}/gradient", grads)
    for name in optimizers:
        draw = np.random.default_rng(1)
        shapes = DECODER.shapes()

        def fixed(shapes=shapes, draw=draw):
            made = jax.tree.map(lambda x: 0.01 * draw.standard_normal(x.shape, np.float32), shapes)
            return sharding.put_params(made, mesh)

        tx = build(optimizer_of(name, learning_rate=1e-2), 3)[0]
        state, shardings = init_state(params, tx, mesh)
        update = jax.jit(tx.update, out_shardings=(shardings.params, shardings.opt_state))
        split = OPTIMIZERS[name].needs == "split"
        opt_state = state.opt_state
        for _ in range(2):
            extra = {"constraint_grads": fixed()} if split else {}
            updates, opt_state = update(fixed(), opt_state, params, **extra)
        found |= flat(f"{name}/update", updates)
    answers = generate(
        DECODER,
        params,
        [[3, 4, 5], [6, 7], [8], [9, 10, 11, 12], [13, 14]],
        sampling=SamplingConfig(max_new_tokens=6),
        stop_ids=(1,),
        pad_id=0,
        num_samples=2,
        batch_size=4,
        sharding=sharding.batch_sharding(mesh),
    )
    padded = [[one + [-1] * (6 - len(one)) for one in mine] for mine in answers]
    return found | {"answers": np.array(padded)}


def main(which: str, process: str, port: str, file: str) -> None:
    distributed.start(distributed.DistributedConfig(False, f"127.0.0.1:{port}", 2, int(process)))
    folder = Path(file).with_suffix("")
    found = numbers(which, folder)
    # A value of the first process, broadcast to all.
    told = distributed.of_first(lambda: {"by": jax.process_index()})
    assert told == {"by": 0} and distributed.gather(jax.process_index()) == [0, 1]
    block = np.arange(5, dtype=np.float32) if distributed.is_first() else None
    assert distributed.array_of_first(block).tolist() == [0, 1, 2, 3, 4]
    # An error on one process is raised on all, however deep it was.
    try:
        with distributed.together():
            with distributed.together():
                if jax.process_index() == 1:
                    raise distributed.UserError("only here")
            distributed.gather("others come so far")
    except distributed.Agreed as error:
        assert str(error) == "process 1: only here"
    else:
        raise AssertionError("nothing was raised")
    state = {"params": sharding.put_params(start_params(), make_mesh(MESH)), "step": jnp.int32(7)}
    state["step"] = arrays.put(
        np.int32(7), jax.sharding.NamedSharding(make_mesh(MESH), jax.sharding.PartitionSpec())
    )
    checkpointing.save_step(folder / "steps", 7, state, {})
    if distributed.is_first():
        np.savez(file, **found)
    distributed.check_shared(folder)


# Processes.


class Ended(NamedTuple):
    """The output and exit code of a process."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(devices: int, quick: dict[str, str]) -> dict[str, str]:
    # No compilation cache: programs from it run their collectives in any order (conftest).
    mine = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    mine |= {k: quick[k] for k in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
    return mine | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONWARNINGS": "ignore",
    }


class Started:
    """Running processes; their output goes to files, so that none waits for a reader."""

    def __init__(
        self,
        commands: list[list[Any]],
        devices: int,
        repo: Path,
        folder: Path,
        quick: dict[str, str],
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(commands))]
        self.processes = []
        for command, (out, err) in zip(commands, self.files, strict=True):
            with out.open("w") as one, err.open("w") as two:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        cwd=repo,
                        env=environment(devices, quick) | {"PYTHONPATH": str(repo)},
                        stdout=one,
                        stderr=two,
                    )
                )

    def when(self, ready, seconds: float = 500) -> None:
        """Wait until `ready()`, while all processes run."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [p.poll() for p in self.processes]
            assert ended == [None] * len(ended), (ended, self.said())
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def said(self) -> list[str]:
        return [err.read_text() for _, err in self.files]

    def end(self, seconds: float = 500) -> list[Ended]:
        """Wait for all; kill those that do not end in time."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
                process.wait()
            raise AssertionError(f"did not end: {self.said()}") from None
        return [
            Ended(p.returncode, out.read_text(), err.read_text())
            for p, (out, err) in zip(self.processes, self.files, strict=True)
        ]


@pytest.fixture
def launch(repo, tmp_path, quick_environment):
    """`launch(command, processes, devices) -> Started`; all of one run get one coordinator."""
    runs = []

    def start(commands, devices=2):
        """Start a command per process; with several, the options of `--distributed` are added."""
        port = free_port()
        if len(commands) > 1:
            commands = [
                [*command, "--distributed.coordinator", f"127.0.0.1:{port}",
                 "--distributed.processes", len(commands), "--distributed.process", i]
                for i, command in enumerate(commands)
            ]  # fmt: skip
        folder = tmp_path / f"processes{len(runs)}"
        runs.append(Started(commands, devices, repo, folder, quick_environment))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def lines_of(root: Path, stage: str) -> list[dict[str, Any]]:
    path = root / "metrics.jsonl"
    rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["stage"] == stage]


# Numbers.


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_two_processes_give_the_numbers_of_one(which, repo, tmp_path, quick_environment):
    port, file = free_port(), tmp_path / "two.npz"
    command = [Path(__file__), which]
    commands = [[*command, i, port, file] for i in range(2)]
    run = Started(commands, 2, repo, tmp_path / "run", quick_environment)
    mine = numbers(which, tmp_path / "one")
    for done in run.end():
        assert done.code == 0, done.err
    theirs = dict(np.load(file))
    assert mine.keys() == theirs.keys()
    gradients: dict[str, list[float]] = {}
    for name, value in mine.items():
        other = theirs[name]
        assert other.shape == value.shape and other.dtype == value.dtype, name
        kind = name.split("/")[1] if "/" in name else name
        if kind in ("rows", "digest", "answers"):
            assert np.array_equal(other, value), name
        elif kind == "loss":
            # A difference of terms of a few nats has their rounding error.
            terms = np.abs(mine[name.replace("/loss", "/terms")])
            spare = 1e-6 if terms.max(initial=0.0) > 1.0001 * abs(value) else 0.0
            assert float(other) == pytest.approx(float(value), rel=1e-6, abs=spare), name
        elif kind == "terms":
            np.testing.assert_allclose(other, value, rtol=1e-6, err_msg=name)
        elif kind == "update":
            np.testing.assert_allclose(other, value, rtol=1e-4, atol=1e-4 * np.abs(value).max())
        else:
            assert kind == "gradient"
            both = gradients.setdefault(name.split("/")[0], [0.0, 0.0])
            both[0] += np.sum(np.square(np.float64(other) - np.float64(value)))
            both[1] += np.sum(np.square(np.float64(value)))
    assert gradients.keys() == set(SETS[which][0])
    for name, (off, whole) in gradients.items():
        assert whole > 0 and np.sqrt(off / whole) <= 1e-6, name
    rows = {n.split("/")[0]: 0 for n in mine if "/rows/" in n}
    assert rows.keys() == set(SETS[which][0])
    # The checkpoint that both wrote is read by one process, on other meshes.
    folder = file.with_suffix("") / "steps"
    for sizes in ((4, 1, 1), (1, 2, 1), (1, 1, 1)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        like = {"params": sharding.put_params(start_params(), mesh), "step": jnp.int32(0)}
        said: list[str] = []
        back = checkpointing.load_latest(folder, like, said.append)
        assert back is not None and back[0] == 7 and not said
        for a, b in zip(
            jax.tree.leaves(back[1]["params"]), jax.tree.leaves(start_params()), strict=True
        ):
            assert np.array_equal(a, b)


# Programs.


def finetuning(tiny, tofu_folder, root, *more) -> list[Any]:
    options = (
        "--train.steps 24 --train.batch-size 4 --max-length 96 --train.optimizer.learning-rate 1e-3"
    ).split()
    rows = tofu_folder / "retain99.json"
    return ["-m", "train.finetune", tiny, rows, *options, "--output", root, *more]


def test_processes_with_different_options_end_alike(launch, tiny, tofu_folder, tmp_path):
    command = finetuning(tiny, tofu_folder, tmp_path / "run")
    done = launch([command, [*command, "--train.optimizer.weight-decay", "0.5"]]).end()
    for one in done:
        errors = [line for line in one.err.splitlines() if line.startswith("error:")]
        assert one.code == 2 and len(errors) == 1, one.err
        assert "processes 0 and 1 have different configurations" in errors[0]
        assert "train.optimizer.weight_decay: 0" in errors[0]
        assert "0.5 on process 1" in errors[0] and "Traceback" not in one.err
    assert not (tmp_path / "run").exists()


def test_stopped_on_two_processes_and_resumed_on_one(launch, tiny, tofu_folder, tmp_path):
    """SIGTERM to either process stops both at one step; one process resumes with other devices."""
    whole, root = tmp_path / "whole", tmp_path / "run"
    (alone,) = launch([finetuning(tiny, tofu_folder, whole)], devices=4).end()
    assert alone.code == 0, alone.err
    run = launch([finetuning(tiny, tofu_folder, root, "--mesh.fsdp", "2")] * 2)
    run.when(lambda: len(lines_of(root, "original")) >= 4)
    run.processes[1].send_signal(signal.SIGTERM)
    done = run.end()
    assert [one.code for one in done] == [0, 0], done
    assert "resume with: python -m train.finetune" in done[0].err and str(root) in done[0].err
    assert "original: stopped before step" in done[0].err
    assert "stopped" not in done[1].err  # the first one prints
    reached = len(lines_of(root, "original"))
    assert 4 <= reached < 24
    (saved,) = (root / "checkpoints").glob("*")
    assert checkpointing.steps_in(saved) == [reached]
    (last,) = launch([finetuning(tiny, tofu_folder, root)]).end()
    assert last.code == 0, last.err
    assert f"original: continuing at step {reached} of 24" in last.err
    ours, theirs = (lines_of(r, "original") for r in (root, whole))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(24))
    np.testing.assert_allclose(
        [row["loss"] for row in ours], [row["loss"] for row in theirs], rtol=1e-5
    )


@pytest.mark.slow
def test_one_of_two_processes_is_lost(launch, tiny, tofu_folder, tmp_path):
    """`kill -9` of either: the other ends by itself; the same command resumes bit for bit."""
    whole, root = tmp_path / "whole", tmp_path / "run"
    more = ("--train.checkpoint-seconds", "0")
    done = launch([finetuning(tiny, tofu_folder, whole, *more)] * 2).end()
    assert [one.code for one in done] == [0, 0], done
    for lost, step in ((1, 5), (0, 12)):
        run = launch([finetuning(tiny, tofu_folder, root, *more)] * 2)
        run.when(lambda step=step: len(lines_of(root, "original")) >= step)
        run.processes[lost].kill()
        ended = run.end(seconds=200)
        assert ended[lost].code == -signal.SIGKILL and ended[1 - lost].code != 0
    done = launch([finetuning(tiny, tofu_folder, root, *more)] * 2).end()
    assert [one.code for one in done] == [0, 0], done
    assert "original: continuing at step" in done[0].err
    assert (root / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for name in ("summary.json", "export/model.safetensors"):
        assert (root / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_stopped_on_one_process_and_resumed_on_two(launch, tiny, tofu_folder, tmp_path):
    root = tmp_path / "run"
    run = launch([finetuning(tiny, tofu_folder, root)], devices=1)
    run.when(lambda: len(lines_of(root, "original")) >= 4)
    run.processes[0].send_signal(signal.SIGTERM)
    (done,) = run.end()
    assert done.code == 0 and "resume with: python -m train.finetune" in done.err
    reached = len(lines_of(root, "original"))
    for one in launch([finetuning(tiny, tofu_folder, root)] * 2).end():
        assert one.code == 0, one.err
    rows = lines_of(root, "original")
    assert [row["step"] for row in rows] == list(range(24)) and reached < 24


@pytest.mark.slow
def test_the_quickstart_on_two_processes(launch, small, tmp_path):
    """Every stage, evaluation and the export; the second process leaves no trace of its own."""
    command = ["-m", "train.unlearn", "quickstart", "--smoke", *small[2:], "--mesh.fsdp", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = launch([[*command, "--output", one]], devices=4).end()
    assert alone.code == 0, alone.err
    done = launch([[*command, "--output", two]] * 2).end()
    assert [d.code for d in done] == [0, 0], done
    said = done[1].out + done[1].err
    assert not [line for line in said.splitlines() if not line.startswith("[Gloo]")], said
    names = [{p.relative_to(r).as_posix().split("-")[0] for p in r.rglob("*")} for r in (one, two)]
    assert names[0] == names[1]
    for stage in ("original", "oracle", "unlearned"):
        ours, theirs = lines_of(two, stage), lines_of(one, stage)
        assert [x["step"] for x in ours] == [x["step"] for x in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (two, one))
    for name, values in theirs.items():
        for key, value in values.items():
            if key.endswith("probability"):
                assert ours[name][key] == pytest.approx(value, rel=1e-3), (name, key)
    # All results are stored: run again, nothing is computed.
    for d in launch([[*command, "--output", two]] * 2).end():
        assert d.code == 0, d.err


@pytest.mark.slow
def test_pretraining_on_two_processes(launch, tmp_path):
    """The corpus is tokenised once; the same rows give the same losses and perplexities."""
    texts = tmp_path / "texts.jsonl"
    rows = [f"document {i} counts to {i * 7} and back to {i % 5}" * 3 for i in range(90)]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    command = (
        "-m train.pretrain pretrain-tiny --smoke --model.hidden-size 32 --model.num-layers 2 "
        "--model.intermediate-size 64 --model.num-heads 2 --model.num-kv-heads 2 --data.context 32 "
        "--train.tokens 2048 --train.batch-tokens 256 --mesh.fsdp 2 --data.source text"
    ).split()
    command += ["--data.path", texts]
    one, two = tmp_path / "a" / "one", tmp_path / "b" / "two"
    (alone,) = launch([[*command, "--output", one]], devices=4).end()
    assert alone.code == 0, alone.err
    done = launch([[*command, "--output", two]] * 2).end()
    assert [d.code for d in done] == [0, 0], done
    said = done[1].out + done[1].err
    assert not [line for line in said.splitlines() if not line.startswith("[Gloo]")], said
    ours, theirs = (lines_of(root, "pretrained") for root in (two, one))
    assert [x["step"] for x in ours] == [x["step"] for x in theirs] == list(range(9))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    flats = [json.loads((root / "summary.json").read_text())["pretrained"] for root in (two, one)]
    for key in ("val_perplexity", "train_perplexity"):
        assert flats[0][key] == pytest.approx(flats[1][key], rel=1e-4)
    configs = [json.loads((root / "config.json").read_text()) for root in (two, one)]
    assert configs[0] == configs[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
