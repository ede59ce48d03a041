"""`train.classify` of images: what it learns, writes, resumes, and refuses."""

import gzip
import json

import jax
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models.files import vit_files
from models.vision.vit import ViT, ViTConfig
from train.engine.replays import bases, recording, stored
from train.jobs import classification
from train.jobs.classification_options import StartConfig
from train.options.config import identity
from train.options.optimizers import options_of
from train.presets import arguments
from train.replay import BaseConfig
from train.runtime import distributed
from train.runtime.digests import params_sha256
from train.runtime.sharding import MeshConfig, make_mesh
from train.tasks import image_kinds

SIDE, CLASSES = 8, 10
ONE = ("--mesh.data", "1")
SMALL = (
    "--start.hidden-size 12 --start.intermediate-size 24 --start.num-layers 2 --start.num-heads 2 "
    "--start.steps 120 --start.batch-size 32 --start.learning-rate 1e-2 --data.dev-rows 20 "
    "--train.batch-size 32 --train.curve-points 2"
).split()
LEARN = [*SMALL, *"--optimizer.name adamw --optimizer.learning-rate 1e-2".split()]
LEARN += "--train.forwards 240".split()


def clothes(folder, train=300, test=60):
    """Images whose class is the place of a bright square, as IDX files."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % CLASSES
        images = draw.integers(0, 90, (count, SIDE, SIDE))
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 150
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = np.array(array.shape, ">i4").tobytes()
            data = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
            (folder / f"{name}-{what}-ubyte.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clothes(tmp_path_factory.mktemp("data") / "clothes")


def started(program, data, output, *more):
    paths = ("--data.path", data, "--output", output)
    return program("train.classify", "vit-fashion", *ONE, *paths, *more)


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


# Narrow: tests run programs that are compiled quickly, and slow.
SIZES = "--start.hidden-size 24 --start.intermediate-size 48 --start.num-layers 2".split()


@pytest.fixture(scope="module")
def smoke(program, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("smoke") / "run"
    cache = ("--stage.cache", output.parent / "cache")
    done = started(program, data, output, "--smoke", *SIZES, *cache)
    assert done.code == 0, done.err
    return output, done


@pytest.fixture(scope="module")
def learned(program, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("learned") / "run"
    done = started(program, data, output, *LEARN)
    assert done.code == 0, done.err
    return output, done


def test_a_smoke_run(smoke):
    output, done = smoke
    summary = summary_of(output)
    base, tuned = summary["base"], summary["finetuned"]
    # A head of zeros finds all ten classes equally probable.
    assert base["nll"] == pytest.approx(np.log(10)) and base["accuracy"] < 0.3
    wanted = {"accuracy", "nll", "forwards", "seconds", "step_mib", "params_sha256"}
    assert wanted <= set(tuned) and tuned["params_sha256"] != base["params_sha256"]
    assert (tuned["forwards"], tuned["steps"]) == (34, 2) and tuned["nll"] != base["nll"]
    assert "8 classes, accuracy" in done.err and "64 rows to train on" in done.err
    log = json.loads((output / "evals" / "finetuned.json").read_text())
    assert len(log["accuracy"]["value_by_index"]["0"]["scores"]) == CLASSES
    start = vit_files.load(output / "start")
    assert start.names == tuple("0123456789") and not np.any(start.params["head"]["kernel"])
    assert "image-classification" in (output / "export" / "README.md").read_text()


def test_runs_share_the_model_to_start_from_and_its_evaluation(smoke, program, data, tmp_path):
    output, _ = smoke
    (judged,) = (output.parent / "cache" / "evals").glob("base-*.json")
    before = judged.stat().st_mtime_ns
    other = ("--train.forwards", "17", "--stage.cache", output.parent / "cache")
    done = started(program, data, tmp_path / "run", "--smoke", *SIZES, *other)
    assert done.code == 0, done.err
    assert "start: found, made from the same inputs" in done.err
    assert [*judged.parent.glob("base-*.json")] == [judged] and judged.stat().st_mtime_ns == before
    ours, theirs = summary_of(tmp_path / "run"), summary_of(output)
    assert ours["base"] == theirs["base"] and ours["finetuned"]["steps"] == 1
    start = vit_files.load(tmp_path / "run" / "start")
    assert start.names == vit_files.load(output / "start").names
    assert str(output.parent / "cache") not in (output / "config.json").read_text()


@pytest.mark.slow
def test_its_steps_are_replayed_from_the_start_that_it_made(smoke, program, tmp_path):
    output, _ = smoke
    base = ("--model.path", output / "start", "--mesh.data", "1")
    done = program("train.replay", output, *base, "--output", tmp_path / "again")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["replayed"]
    assert again["params_sha256"] == summary_of(output)["finetuned"]["params_sha256"]
    ours, theirs = (vit_files.load(run / "export") for run in (output, tmp_path / "again"))
    assert ours.names == theirs.names
    line = json.loads((output / "replay.zo").read_bytes().partition(b"\n")[0])
    assert line["classes"] == list(ours.names)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    other = ("--model.path", output / "export", "--mesh.data", "1")
    done = program("train.replay", output, *other, "--check")
    assert done.code == 2 and "is not the model that" in done.err


def test_it_learns(learned):
    output, done = learned
    summary = summary_of(output)
    assert summary["finetuned"]["accuracy"] > 0.9 > 0.3 > summary["base"]["accuracy"]
    assert summary["finetuned"]["forwards"] == 240 and summary["majority_accuracy"] == 0.1
    right = float(done.err.split("8 classes, accuracy ")[1].split()[0])
    assert right > 0.9 and "on the 48 test images of them" in done.err
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "start"] == list(range(120))
    assert summary["finetuned"]["seconds"] > 0
    looked = [line["step"] for line in lines if "dev_accuracy" in line]
    assert looked == [0, 40, 80]


def test_the_exported_model_is_the_one_that_was_judged(learned, data):
    output, _ = learned
    loaded = vit_files.load(output / "export")
    images = np.frombuffer(
        gzip.decompress((data / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    ).reshape(-1, SIDE, SIDE, 1)
    found = np.asarray(jax.jit(ViT(loaded.config).logits)(loaded.params, images)).argmax(1)
    assert np.mean(found == np.arange(60) % CLASSES) == pytest.approx(
        summary_of(output)["finetuned"]["accuracy"]
    )


def test_the_models_of_a_run_are_exported(learned, program, tmp_path):
    output, _ = learned
    summary = summary_of(output)
    for name, more in (("finetuned", ("--dtype", "bfloat16")), ("base", ("--model", "base"))):
        done = program("train.export", output, tmp_path / name, *more)
        assert done.code == 0, done.err
        loaded = vit_files.load(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert summary[name]["params_sha256"] in card and "image-classification" in card
        if name == "base":
            assert params_sha256(loaded.params) == summary[name]["params_sha256"]
    assert json.loads((tmp_path / "finetuned" / "config.json").read_text())["dtype"] == "bfloat16"
    done = program("train.export", tmp_path / "base", tmp_path / "again")
    assert done.code == 0 and vit_files.is_vit(tmp_path / "again")


def test_a_second_start_finds_everything(learned, program, data, monkeypatch):
    output, _ = learned
    before = (output / "summary.json").read_text()
    monkeypatch.setattr(classification, "log_of", None)  # nothing is asked again
    done = started(program, data, output, *LEARN)
    assert done.code == 0 and done.err.count("found, made from the same inputs") == 2
    assert (output / "summary.json").read_text() == before
    config = json.loads((output / "config.json").read_text())
    assert config["start"]["steps"] == 120
    again = ["--config", str(output / "config.json"), "--seed", "1"]
    assert identity(arguments.read_arguments(arguments.CLASSIFY, again)) == config | {"seed": 1}


@pytest.mark.slow
def test_a_run_that_is_stopped_twice_continues(learned, program, data, tmp_path, monkeypatch):
    for count, stage in ((20, "start"), (140, "finetuned")):
        asked = []

        def stop(asked=asked, count=count):
            asked.append(1)
            return len(asked) == count

        with monkeypatch.context() as patch:
            patch.setattr(distributed, "asked_to_stop", stop)
            done = started(program, data, tmp_path / "run", *LEARN)
        assert f"{stage}: stopped before step" in done.err, done.err
        assert not (tmp_path / "run" / "summary.json").exists()
    done = started(program, data, tmp_path / "run", *LEARN)
    assert done.code == 0 and "continuing at step" in done.err
    again, first = summary_of(tmp_path / "run"), summary_of(learned[0])
    for summary in (again, first):
        assert summary["finetuned"].pop("seconds") > 0
    assert again == first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mezo", "rowwise", "muon", "subzero"])
def test_other_optimizers(program, data, tmp_path, name):
    options = [*SMALL, "--optimizer.name", name, "--train.forwards", "96", *ONE]
    done = started(program, data, tmp_path / "run", *options)
    assert done.code == 0, done.err
    summary = summary_of(tmp_path / "run")
    assert summary["finetuned"]["params_sha256"] != summary["base"]["params_sha256"]


@pytest.mark.slow
def test_four_devices_see_the_same(learned, program, data, tmp_path):
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2")
    paths = ("--data.path", data, "--output", tmp_path / "run")
    done = program("train.classify", "vit-fashion", *mesh, *paths, *LEARN)
    assert done.code == 0, done.err
    first = []
    for output in (tmp_path / "run", learned[0]):
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        first.append([next(x["loss"] for x in lines if x["stage"] == s) for s in ("start",)])
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    found, want = summary_of(tmp_path / "run"), summary_of(learned[0])
    assert found["finetuned"]["accuracy"] == pytest.approx(want["finetuned"]["accuracy"], abs=0.05)


def model_folder(path, side=SIDE, classes=3, channels=1):
    shape = ViTConfig(side, 4, channels, 12, 24, 2, 2, classes, mean=(0.5,) * channels,
                      std=(0.5,) * channels)  # fmt: skip
    params = jax.jit(ViT(shape).init)(jax.random.key(0))
    names = tuple(map(str, range(classes)))
    return vit_files.export(vit_files.LoadedViT(shape, params, names), path)


@pytest.mark.slow
def test_a_given_model_of_another_size_and_colours(program, data, tmp_path):
    folder = model_folder(tmp_path / "model", side=12, channels=3)
    options = "--data.resize --data.train-rows 20 --data.dev-rows 10 --data.test-rows 10".split()
    options += "--train.forwards 6 --train.batch-size 4 --optimizer.name adamw".split()
    done = started(program, data, tmp_path / "run", "--model.path", folder, *options)
    assert done.code == 0, done.err
    found = vit_files.load(tmp_path / "run" / "export")
    assert found.config.image_size == 12 and found.config.num_classes == CLASSES
    assert not (tmp_path / "run" / "start").exists()


def truncated(data, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    image = folder / "train-images-idx3-ubyte.gz"
    image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes())[:-5]))
    return folder


SCRATCH = ("--model.path", "scratch")
REFUSED = {
    "another size": ((), ["train, row 1: an image of 8 x 8 pixels in grey, the model reads 12 x"]),
    "truncated": (SCRATCH, ["train-images-idx3-ubyte.gz: truncated or damaged"]),
    "patch": ((*SCRATCH, "--start.patch-size", "3"), ["patches of that side do not divide"]),
    "classes": ((*SCRATCH, "--start.classes", "11"), ["--start.classes 11: there are 10"]),
    "heads": ((*SCRATCH, "--start.num-heads", "5"), ["--start.num-heads 5 does not divide"]),
    "start": (("--start.steps", "3"), ["--start.* is of a model that the run trains itself"]),
    "model": (("--model.path", "./none"), ["--model.path ./none does not exist"]),
    "revision": ((*SCRATCH, "--model.revision", "main"), ["--model.revision is of a Hub id"]),
    "adapters": ((*SCRATCH, "--lora.rank", "2", "--lora.targets", "q"), ["head", "of zeros"]),
    "budget": ((*SCRATCH, "--train.forwards", "16"), ["--train.forwards 16", "cost 17"]),
    "batch": ((*SCRATCH, "--mesh.data", "3", "--start.batch-size", "64", "--train.batch-size",
               "9"), ["--start.batch-size: batch size 64 does not divide"]),
    "typo": (("--start.step", "3"), ["did you mean --start.steps?"]),
    "absent": ((*SCRATCH, "--data.path", "./nowhere"), ["--data.path nowhere does not exist"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_compute(name, program, data, tmp_path):
    options, parts = REFUSED[name]
    folder = truncated(data, tmp_path) if name == "truncated" else data
    if "--model.path" not in options:
        options = ("--model.path", model_folder(tmp_path / "model", side=12), *options)
    done = started(program, folder, tmp_path / "run", "--data.dev-rows", "20", *options)
    last = done.err.strip().splitlines()
    assert done.code == 2 and done.out == "" and len(last) == 1, done.err
    assert last[0].startswith("error: ") and all(part in last[0] for part in parts), last[0]
    assert not (tmp_path / "run").exists()


def test_a_short_run_takes_a_given_model(monkeypatch):
    """What --smoke changes of a model that the run trains is of none where one is given."""
    short = arguments.read_arguments(arguments.CLASSIFY, ["vit-fashion", "--smoke"])
    given = arguments.read_arguments(
        arguments.CLASSIFY, ["vit-fashion", "--smoke", "--model.path", "./mine"]
    )
    words = "vit-fashion --smoke --model.path ./mine --start.steps 7".split()
    typed = arguments.read_arguments(arguments.CLASSIFY, words)
    assert short.start.steps == 4 and given.start == StartConfig() and typed.start.steps == 7
    assert given.train == short.train and given.data == short.data
    for config in (given, typed):
        with pytest.raises(UserError) as caught:
            image_kinds.check(config)
        assert ("--start.* is of" in str(caught.value)) == (config is typed)


def test_a_replay_names_the_classes_as_its_run_did(tmp_path):
    """One of an earlier version, whose header has no names, is read as before."""
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    start = vit_files.load(model_folder(tmp_path / "random"))
    start = start._replace(
        params=start.params | {"head": jax.tree.map(np.ones_like, start.params["head"])}
    )
    folder = vit_files.export(start, tmp_path / "model")

    def names_of(classes):
        made = recording.recording(
            tmp_path / "a.zo", "x", "", start.params, options_of("mezo"), 1, None, None, 0, classes
        )
        assert ("classes" in made.header) == (classes is not None)
        header = json.loads(json.dumps(made.header))
        replay = stored.Replay(header, np.zeros((0, 1)), ())
        found = bases.IMAGES.load(BaseConfig(str(folder)), replay, mesh)
        # Of other classes than the model's the head is of zeros, as in the run.
        assert np.any(found.params["head"]["kernel"]) == (classes != tuple("cab"))
        return found.names

    assert names_of(tuple("cab")) == tuple("cab") and names_of(tuple("210")) == tuple("210")
    assert names_of(None) == tuple("012")


def test_a_text_task_takes_no_start(program, tmp_path):
    done = program("train.classify", "sst2-tiny", "--start.steps", "3", "--model.path", tmp_path)
    assert done.code == 2 and "--start.* is of vision transformers" in done.err
    done = program("train.classify", "vit-b16-cifar100", "--model.path", "scratch")
    assert done.code == 2 and "--task images reads images of your own" in done.err
    done = program("train.classify", "vit-b16-cifar100", "--data.path", tmp_path)
    assert done.code == 2 and "--model.path ViT-B_16.npz does not exist" in done.err
