"""Another kind of model through the same trainer: a class-conditional denoiser of small arrays.

What it takes stands below: a learner, a stream, an objective row and an evaluator row.
"""

import dataclasses
import hashlib
import json
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Context, Objective
from jaxlib_unlearn.objectives.base import Options, named, weight
from jaxlib_unlearn.optim.zeroth_order.perturbations import matmul
from models.learner import check_questions
from train.costs.topology import find_topology
from train.data.batches import shuffled
from train.engine import run as runs
from train.engine.run import Recipe, Run
from train.engine.step import shaped
from train.engine.trainable import trainable_of
from train.evaluators import EVALUATORS
from train.evaluators.base import Evaluator, Finding, Metric, Verdict
from train.options.config import TrainConfig
from train.options.optimizers import options_of as optimizer_of
from train.plan import account
from train.planning.programs import step_program
from train.reporting import page, tables
from train.runtime import distributed
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from train.runtime.tracking import Tracker

CLASSES, SIZE, WIDTH, BLOCKS = 4, 12, 8, 2


# The kind of model.


class Asked(NamedTuple):
    """The denoiser, as objectives ask it."""

    params: Any
    layer_map: Any

    def noise(self, batch, noise, level):
        """The noise in `cos(level) image + sin(level) noise`, given the class."""
        params = self.params
        seen = jnp.cos(level) * batch["image"] + jnp.sin(level) * noise
        x = seen @ params["inlet"]["kernel"] + params["classes"]["embedding"][batch["label"]]

        def block(x, inputs):
            layer, index = inputs
            layer = layer if self.layer_map is None else self.layer_map(layer, index)
            up, down = layer["mlp"]["up"]["kernel"], layer["mlp"]["down"]["kernel"]
            return x + matmul(jnp.tanh(matmul(x, up)), down), None

        x, _ = jax.lax.scan(block, x, (params["layers"], jnp.arange(BLOCKS)))
        return x @ params["outlet"]["kernel"]


@dataclasses.dataclass(frozen=True)
class ToyLearner:
    answers = frozenset(("noise",))
    rules = ((r"/(up|inlet)/kernel$", ("fsdp", "tp")), (r".", ()))
    layered, dtype = True, "float32"
    sizes = types.MappingProxyType({"blocks": BLOCKS})

    def identity(self):
        return "toy denoiser"

    def shapes(self):
        def leaf(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        return {
            "inlet": {"kernel": leaf(SIZE, WIDTH)},
            "classes": {"embedding": leaf(CLASSES, WIDTH)},
            "layers": {
                "mlp": {
                    "up": {"kernel": leaf(BLOCKS, WIDTH, 16)},
                    "down": {"kernel": leaf(BLOCKS, 16, WIDTH)},
                }
            },
            "outlet": {"kernel": leaf(WIDTH, SIZE)},
        }

    def context(
        self, params, frozen, batches, questions, *, layer_map=None, fuse=True, train_from=0
    ):
        return Context(Asked(params, layer_map))


class ToyModel(NamedTuple):
    learner: ToyLearner
    params: Any
    sha: str


LEARNER = ToyLearner()


def model(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    params = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape) / math.sqrt(x.shape[-2]), LEARNER.shapes()
    )
    return ToyModel(LEARNER, params, f"toy {seed}")


# A stream of arrays.


@dataclasses.dataclass(frozen=True)
class Images:
    images: np.ndarray
    labels: np.ndarray
    follows: str | None = None

    def __len__(self):
        return len(self.labels)

    def identity(self):
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def epoch_order(self, seed, name, epoch):
        return shuffled(seed, name, epoch, len(self))

    def shape(self, rows):
        return ()

    def batch(self, rows, shape, step):
        rows = np.asarray(rows)
        return {
            "image": self.images[rows],
            "label": self.labels[rows],
            "row_id": rows.astype(np.int32),
        }


def images(seed, count, labels):
    draw = np.random.default_rng(seed)
    means = np.random.default_rng(99).standard_normal((CLASSES, SIZE))
    chosen = np.asarray(labels, np.int32)[np.arange(count) % len(labels)]
    noise = 0.1 * draw.standard_normal((count, SIZE))
    return Images((means[chosen] + noise).astype(np.float32), chosen)


STREAMS = {"erase": images(1, 16, [3]), "keep": images(2, 24, [0, 1, 2])}


# An objective with words of its own for its sides, which draws noise by row.


@dataclasses.dataclass(frozen=True)
class Erase(Options):
    name: str = named("erase")
    erase_weight: float = weight("erase", 0.2)
    keep_weight: float = weight("keep", 1.0)


def erase(context, batches, options):
    """``L = -e E |noise - predicted|^2 (erase) + k E |noise - predicted|^2 (keep)``."""
    del options
    terms = {}
    for side, sign in (("erase", -1.0), ("keep", 1.0)):
        batch = batches[side]
        keys = context.row_keys(batch, side)
        noise = jax.vmap(lambda key: jax.random.normal(key, (SIZE,)))(keys)
        level = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (1,)))(keys)
        error = jnp.mean((context.model.noise(batch, noise, 1.5 * level) - noise) ** 2, -1)
        terms[side] = sign * jnp.sum(error), jnp.asarray(len(error), jnp.float32)
    return terms


ROW = Objective(
    name="erase",
    loss=erase,
    streams=("erase", "keep"),
    columns={"erase": ("image", "label"), "keep": ("image", "label")},
    reference={},
    forward={},
    additive=True,
    paper="-",
    options=Erase,
    summary="unlearn to denoise a class",
    asks={"erase": ("noise",), "keep": ("noise",)},
    sides=("erase", "keep"),
)


def train(folder, name="adamw", sizes=(1, 1, 1), *, steps=6, accumulate=1, combine="sum", **more):
    devices = math.prod(sizes)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    run = Run(folder, mesh, 0, Tracker(folder))
    options = optimizer_of(name, learning_rate=1e-2, schedule="constant", warmup=0.0, **more)
    stage = TrainConfig(steps=steps, batch_size=8, accumulate=accumulate, optimizer=options)
    base: Any = model()
    recipe = Recipe(stage, options, combine)
    trained = runs.train(run, "erased", base, (ROW, Erase()), STREAMS, recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trained, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("toy"))


def test_it_unlearns_a_class(undisturbed):
    _, lines = undisturbed
    assert [line["step"] for line in lines] == list(range(6))
    assert lines[-1]["erase_loss"] < lines[0]["erase_loss"] < 0
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_stopped_run_continues(undisturbed, tmp_path, monkeypatch):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 4

    with monkeypatch.context() as patch, pytest.raises(distributed.Preempted):
        patch.setattr(distributed, "asked_to_stop", stop)
        train(tmp_path)
    trained, lines = train(tmp_path)
    assert (trained.sha, lines) == (undisturbed[0].sha, undisturbed[1])
    assert train(tmp_path)[0].sha == trained.sha  # found


@pytest.mark.parametrize(
    ("sizes", "accumulate"), [((4, 1, 1), 1), ((1, 2, 2), 1), ((1, 1, 1), 2), ((2, 1, 1), 4)]
)
def test_the_numbers_do_not_depend_on_devices_or_micro_batches(
    undisturbed, tmp_path, sizes, accumulate
):
    _, lines = train(tmp_path, sizes=sizes, accumulate=accumulate)
    for key in ("loss", "erase_loss", "keep_loss"):
        found, want = ([line[key] for line in some] for some in (lines, undisturbed[1]))
        np.testing.assert_allclose(found[:2], want[:2], rtol=2e-6)
        np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("muon", {}),
        ("sift", {"rank": 4}),
        ("zo-muon", {"rank": 4}),
        ("mezo", {}),
        ("rowwise", {}),
        ("adamw", {"combine": "blur"}),
    ],
)
def test_every_kind_of_optimizer(tmp_path, name, more):
    trained, lines = train(tmp_path, name, steps=3, **more)
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
    start = model().params["layers"]["mlp"]["up"]["kernel"]
    assert float(jnp.abs(trained.params["layers"]["mlp"]["up"]["kernel"] - start).max()) > 0


def test_what_it_does_not_answer(tmp_path):
    for name in ("graddiff", "rmu"):
        with pytest.raises(UserError, match="which this kind of model does not answer; it answers"):
            check_questions(LEARNER, *objectives.resolve(name))


def test_its_step_is_planned():
    topology = find_topology("cpu:4")
    mesh = make_mesh(MeshConfig(2, 2), list(topology.devices))
    shapes = LEARNER.shapes()
    params = shaped(shapes, param_shardings(shapes, mesh, LEARNER.rules))
    where = batch_sharding(mesh)
    batches = {
        name: {
            key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for key, x in stream.batch(np.arange(8), (), 0).items()
        }
        for name, stream in STREAMS.items()
    }
    made = trainable_of(params, ROW)
    program = step_program(
        LEARNER, (ROW, Erase()), optimizer_of("muon"), made, batches, mesh, "a step of 2 x 8 images"
    )
    found = account(program, topology, mesh.size)
    assert found["compiled"] and found["fits"] and found["unit"] == "a step of 2 x 8 images"
    # forward and backward of the products, two streams
    blocks = 2 * BLOCKS * 2 * WIDTH * 16
    ends = 2 * 2 * SIZE * WIDTH
    assert found["asked_flops_per_chip"] * 4 > 2 * 8 * 3 * (blocks + ends) * 0.9
    assert found["collectives"]


def test_it_is_reported(undisturbed, tmp_path, monkeypatch):
    def worst(results):
        value = results.scores("class_error").judged
        return Finding("Did it forget the class?", "good", "yes", f"Error {value:.2f}.")

    metric = Metric("class_error", "Class error", "error on the erased class", "up", main=True)
    row = Evaluator("denoising", lambda *_: {}, (metric,), verdicts=(Verdict("class", worst),))
    monkeypatch.setitem(EVALUATORS, "denoising", row)
    folder = tmp_path / "run"
    folder.mkdir()
    last, first = undisturbed[1][-1], undisturbed[1][0]
    models = {
        "original": {"class_error": -first["erase_loss"]},
        "erased": {"class_error": -last["erase_loss"]},
    }
    roles = {"start": "original", "reference": "oracle", "judged": "erased"}
    (folder / "config.json").write_text('{"preset": "toy", "seed": 0}')
    (folder / "summary.json").write_text(json.dumps(models))
    (folder / "run.json").write_text(json.dumps({"roles": roles, "evaluators": ["denoising"]}))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, undisturbed[1])) + "\n")
    assert tables.load_run(folder).models == ["original", "erased"]
    text = page.build(folder).path.read_text()
    assert 'data-metric="erased.class_error"' in text and "Did it forget the class?" in text
