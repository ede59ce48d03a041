"""Bad input through the real programs: one line, exit code 2, nothing written, no compute."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from train.options import cli, config_files
from train.options.config import RunConfig
from train.presets import PRESETS
from train.runtime import folder
from train.tasks import load_task


@pytest.fixture(autouse=True)
def no_compute(monkeypatch):
    """No training step and no generated token may be reached here."""

    def reached(*args, **options):
        raise AssertionError("compute began")

    monkeypatch.setattr("train.engine.loop.run", reached)
    monkeypatch.setattr("train.evaluators.evaluation.generate", reached)
    monkeypatch.setattr("train.evaluators.evaluation.score_items", reached)


@pytest.fixture
def refused(program, tmp_path):
    """Run a program that must refuse: one line with all `parts`, code 2, no output folder."""

    def run(module, *argv, parts, output=None):
        before = snapshot(output) if output is not None else None
        folder = tmp_path / "run" if output is None else output
        if module != "train.export":
            argv = (*argv, "--output", folder)
        done = program(module, *argv)
        assert done.code == 2, done
        lines = done.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done.err
        assert "Traceback" not in done.err
        for part in parts:
            assert str(part) in lines[0], lines[0]
        if before is None:
            assert not folder.exists()
        else:
            assert snapshot(folder) == before
        assert not list(tmp_path.glob("**/*.part"))
        return lines[0]

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {folder.name: folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def tofu(tofu_folder, tiny):
    """Arguments of a run on the small TOFU folder with the tiny model."""
    options = "--mesh.data 1 --finetune.batch-size 4 --unlearn.batch-size 4".split()
    return ["tofu-smollm2", "--data.path", tofu_folder, "--model.path", tiny, *options]


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


# Names.


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["quikstart"], ["preset 'quikstart'", "'quickstart'"]),
        (["tofu"], ["preset 'tofu'", "'tofu-smollm2'"]),
        (["--seed", "3"], ["first argument", "quickstart"]),
        (["quickstart", "--data.pth", "x"], ["--data.pth", "--data.path?"]),
        (["quickstart", "--objective.nam=npo"], ["--objective.nam", "--objective.name?"]),
        (["quickstart", "--objective.name", "asuu"], ["'asuu'", "'asu'"]),
        (["quickstart", "--optimizer.name", "muom"], ["'muom'", "'muon'"]),
        (["quickstart", "--finetune.optimizer.name", "adam"], ["'adam'", "'adamw'"]),
        (["quickstart", "--optimizer.schedule", "step"], ["'step'", "cosine"]),
        (["quickstart", "--optimizer.rank", "8"], ["--optimizer.rank", "adamw does not read it"]),
        (["quickstart", "--optimizer.name", "sift", "--optimizer.bases", "sdv"], ["'svd'"]),
        (["quickstart", "--combine", "blurr"], ["'blurr'", "'blur'"]),
        (["quickstart", "--combine", "blur", "--objective.retain", "none"], ["forget and retain"]),
        (["quickstart", "--combine", "pcgrad", "--optimizer.name", "sift"], ["pcgrad", "sift"]),
        (["quickstart", "--combine", "blur", "--optimizer.name", "zo-muon"], ["blur", "zo-muon"]),
        (["quickstart", "--optimizer.name", "hybrid", "--unlearn.steps", "50"], ["use 80 steps"]),
        (["quickstart", "--finetune.optimizer.name", "sift"], ["sift", "forget and retain"]),
        (["quickstart", "--objective.retain", "k"], ["--objective.retain", "'k'", "kl"]),
        (["quickstart", "--objective.compat", "x"], ["compat", "'x'"]),
        (["quickstart", "--objective.name", "npo", "--objective.delta", "1"], ["npo", "delta"]),
        (["quickstart", "--data.source", "web"], ["'web'", "authors"]),
        (["quickstart", "--data.retain-split", "retain90"], ["--data.retain-split", "generated"]),
        (["quickstart", "--data.template", "llama"], ["--data.template", "'llama2'"]),
        (["quickstart", "--data.template-date", "today"], ["--data.template-date", "'today'"]),
        (["quickstart", "--data.few-shot", "no.json"], ["no.json"]),
        (["quickstart", "--evaluate.judge", "orcale"], ["--evaluate.judge", "'oracle'"]),
        (["quickstart", "--evaluate.leak-question", "q"], ["--evaluate.leak-question"]),
        (["quickstart", "--report-to", "wandbb"], ["--report-to", "'wandb'"]),
        (["quickstart", "--optimizer", "muon"], ["did you mean --optimizer.name muon?"]),
        (["quickstart", "--export-dtype", "float8"], ["--export-dtype", "float"]),
        (["--config", "no/such/config.json"], ["no/such/config.json"]),
    ],
)
def test_names(refused, argv, parts):
    refused("train.unlearn", *argv, parts=parts)


# Numbers and meshes.


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--seed two", ["--seed", "'two'"]),
        ("--seed -1", ["--seed", "from 0"]),
        ("--seed 99999999999", ["--seed"]),
        ("--finetune.batch-size 0", ["--finetune.batch-size", "at least 1"]),
        ("--unlearn.accumulate 0", ["--unlearn.accumulate"]),
        ("--unlearn.steps 0", ["--unlearn.steps"]),
        ("--finetune.epochs inf", ["--finetune.epochs"]),
        ("--finetune.epochs nan", ["--finetune.epochs"]),
        ("--finetune.epochs 0.001", ["no step", "epochs"]),
        ("--unlearn.steps None --unlearn.epochs 0.01", ["no step", "epochs"]),
        ("--optimizer.learning-rate 0", ["learning-rate", "positive"]),
        ("--optimizer.learning-rate nan", ["learning-rate", "positive"]),
        ("--optimizer.learning-rate inf", ["learning-rate is inf", "float32"]),
        ("--finetune.optimizer.learning-rate 1e39", ["--finetune.optimizer", "float32"]),
        ("--optimizer.b1 1", ["--optimizer.b1 is 1", "below 1"]),
        ("--finetune.optimizer.b2 1.0", ["--finetune.optimizer.b2", "below 1"]),
        ("--optimizer.b2 -0.1", ["--optimizer.b2", "at least 0"]),
        ("--optimizer.b1 nan", ["--optimizer.b1 is nan"]),
        ("--optimizer.name muon --optimizer.momentum 1", ["--optimizer.momentum", "below 1"]),
        ("--optimizer.eps 0", ["--optimizer.eps", "at least 1e-30"]),
        ("--optimizer.weight-decay inf", ["--optimizer.weight-decay is inf"]),
        ("--objective.forget-weight nan", ["forget-weight is nan"]),
        ("--unlearn.steps 99999999999", ["--unlearn.steps", "2^31"]),
        ("--optimizer.warmup 2", ["--optimizer.warmup"]),
        ("--evaluate.max-new-tokens 0", ["--evaluate.max-new-tokens"]),
        ("--evaluate.leak-top-p 0", ["--evaluate.leak-top-p"]),
        ("--evaluate.leak-samples -1", ["--evaluate.leak-samples"]),
        ("--data.max-length 0", ["--data.max-length"]),
        ("--data.num-authors 1", ["--data.num-authors"]),
        ("--data.forget-rows 0", ["--data.forget-rows", "at least 1"]),
        ("--data.judged-retain-rows 0", ["--data.judged-retain-rows", "at least 1"]),
        ("--data.num-authors 100000", ["--data.num-authors"]),
        ("--model.num-layers 0", ["--model.num-layers"]),
        ("--model.remat all", ["--model.remat", "none, dots, full"]),
        ("--model.num-heads 3", ["--model.num-heads"]),
        ("--model.num-layers 20000", ["--model.num-layers", "from 1 to 10000"]),
        ("--model.vocab-size 1000000000", ["--model.vocab-size", "from 1 to 1048576"]),
        ("--unlearn.steps " + "9" * 5000, ["--unlearn.steps"]),
        ("--model.hidden-size 1000000", ["--model.hidden-size", "GiB of memory"]),
        ("--model.revision v1", ["--model.revision", "scratch"]),
        ("--model.path hub:x", ["hub:x", "no such file"]),
        ("--model.path " + "x" * 5000, ["File name too long"]),
        ("--retain-log " + "x" * 5000, ["File name too long"]),
        ("--stage.original ./absent --model.revision v1", ["--model.revision", "--stage.original"]),
        ("--model.hidden-size 6 --model.num-heads 2", ["--model.hidden-size", "odd"]),
        ("--objective.name asu --objective.layers", ["layers", "empty"]),
        ("--objective.name asu --objective.layers 2", ["layers", "block 2", "0 to 1"]),
        ("--objective.name asu --objective.layers 0 -1", ["layers", "-1"]),
        ("--objective.name asu --objective.temperature -1", ["temperature"]),
        ("--mesh.data 3", ["batch size 8", "3"]),
        ("--mesh.data 1 --mesh.fsdp 3", ["batch size 8", "3"]),
        ("--mesh.data 16", ["16 devices", "8 are present"]),
        ("--mesh.tp 9", ["9 devices", "8 are present"]),
        ("--mesh.data 0", ["mesh", "positive"]),
        ("--mesh.query 2", ["--mesh.query 2", "adamw", "--mesh.data"]),
        (
            "--mesh.query 4 --optimizer.name mezo --optimizer.queries 3",
            ["--mesh.query 4", "6 evaluation(s)", "multiple of 2"],
        ),
        ("--finetune.accumulate 3", ["fine-tuning batch size 8"]),
        ("--unlearn.accumulate 16", ["unlearning batch size 8"]),
    ],
)
def test_numbers_and_meshes(refused, small, options, parts):
    refused("train.unlearn", "quickstart", *small, *options.split(), parts=parts)


# Data.


def test_data_folder_missing(refused, tofu, tmp_path):
    absent = tmp_path / "absent"
    refused("train.unlearn", *tofu, "--data.path", absent, parts=[absent, "does not exist"])
    refused(
        "train.unlearn", *tofu, "--data.path", tmp_path / "data" / "retain99.json", parts=["file"]
    )


def test_own_files(refused, small, tmp_path):
    """All problems of both files, in one line."""
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt,reply\nq,a\n")
    both = ["--data.forget", bad, "--data.retain", tmp_path / "absent.jsonl"]
    parts = [bad, "no column 'question' and no 'answer'", "absent.jsonl does not exist"]
    refused("train.unlearn", "quickstart", *small, *both, parts=parts)
    refused("train.unlearn", "quickstart", *small, *both[:2], parts=[bad, "--data.retain FILE"])


def test_split_missing(refused, tofu, tofu_folder):
    line = refused("train.unlearn", *tofu, "--data.forget-split", "forget02", parts=["forget02"])
    assert "nearest is 'forget01'" in line
    (tofu_folder / "retain_perturbed.json").unlink()
    refused("train.unlearn", *tofu, parts=["retain_perturbed", tofu_folder])


def test_broken_json_line(refused, tofu, tofu_folder):
    path = tofu_folder / "forget01_perturbed.json"
    append(path, '{"question": "q"\n')
    refused("train.unlearn", *tofu, parts=[path, "line 9", "broken JSON"])


def test_not_text(refused, tofu, tofu_folder):
    path = tofu_folder / "retain_perturbed.json"
    path.write_bytes(b"\xff\xfe\x00")
    refused("train.unlearn", *tofu, parts=[path, "UTF-8"])


@pytest.mark.parametrize("column", ["question", "answer", "perturbed_answer"])
def test_missing_column(refused, tofu, tofu_folder, column):
    path = tofu_folder / "forget01_perturbed.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[4][column]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("train.unlearn", *tofu, parts=[path, "row 5", column])


def test_paths_that_are_too_long(program, tofu, small, tmp_path):
    name = "x" * 5000
    for argv in (
        ["quickstart", *small, "--output", tmp_path / name],
        ["quickstart", *small, "--stage.cache", tmp_path / name],
        [*tofu, "--data.path", name],
        [*tofu, "--data.forget-split", name],
        ["--config", name],
    ):
        done = program("train.unlearn", *argv)
        assert done.code == 2 and done.err.startswith("error: "), done
        assert "File name too long" in done.err and done.err.count("\n") == 1
        assert len(done.err) < 500
    assert not list(tmp_path.glob("run*"))


def test_empty_split(refused, tofu, tofu_folder):
    path = tofu_folder / "retain_perturbed.json"
    path.write_text("\n")
    refused("train.unlearn", *tofu, parts=[path, "empty"])


def test_asked_column_missing(refused, tofu, tofu_folder):
    path = tofu_folder / "forget01_perturbed.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["paraphrased_question"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--evaluate.leak-question", "paraphrased_question"]
    refused("train.unlearn", *tofu, *options, parts=["paraphrased_question", "forget rows"])


def test_all_prompts_longer_than_the_context(refused, tofu, small):
    line = refused("train.unlearn", *tofu, "--data.max-length", "8", parts=["no label", "8 tokens"])
    assert "--data.max-length" in line
    refused("train.unlearn", "quickstart", *small, "--data.max-length", "4", parts=["no label"])


def long_row(path: Path) -> None:
    """Give the third row of a file a question that exceeds any context."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["question"] = "word " * 200
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_some_prompts_longer_than_the_context(program, tofu, tofu_folder, tmp_path, monkeypatch):
    long_row(tofu_folder / "forget01_perturbed.json")
    long_row(tofu_folder / "real_authors_perturbed.json")

    class Reached(Exception):
        pass

    def stop(stage, *args):
        raise Reached(len(stage.batches(0)["train"]["row_id"]))

    monkeypatch.setattr("train.engine.loop.run", stop)
    with pytest.raises(Reached):
        program("train.unlearn", *tofu, "--output", tmp_path / "run")
    # The steps after this would be the same without the long rows: see the task that is trained on.
    from train.jobs import job, unlearning
    from train.presets import arguments

    config = arguments.read_arguments(arguments.UNLEARN, [str(a) for a in tofu])
    task = job.prepare(unlearning.JOB, config).fitted.parts
    assert (len(task.forget), len(task.retain)) == (7, 12)
    assert {k: len(v) for k, v in task.evaluation.items()} == {
        "forget": 7, "retain": 12, "real_authors": 2, "world_facts": 3, "holdout": 4,
    }  # fmt: skip
    assert "3 rows" in task.notes[-1] and "context" in task.notes[-1]


def test_left_out_rows_are_counted_in_a_line(tofu, tofu_folder, capsys):
    from train.jobs import job, unlearning
    from train.presets import arguments

    long_row(tofu_folder / "forget01_perturbed.json")
    job.prepare(unlearning.JOB, arguments.read_arguments(arguments.UNLEARN, [str(a) for a in tofu]))
    assert capsys.readouterr().err == "forget: 1 row(s) left out, their prompt fills 96 tokens\n"


def test_overlap_of_forget_and_retain_is_a_warning(tofu, tofu_folder, capsys):
    forget = (tofu_folder / "forget01_perturbed.json").read_text().splitlines(keepends=True)
    append(tofu_folder / "retain_perturbed.json", "".join(forget[:3]))
    config = cli.parse(RunConfig, PRESETS["tofu-smollm2"].PRESET, map_str(tofu[1:]), "", "")
    task = load_task(config)
    err = capsys.readouterr().err
    assert err.startswith("warning: 3 forget rows are also retain rows") and err.count("\n") == 1
    assert len(task.forget) == 8 and len(task.retain) == 15
    assert "3 forget rows are also retain rows; they pull both ways" in task.notes


def map_str(values):
    return [str(value) for value in values]


def test_data_that_does_not_go_with_the_quickstart(refused, tofu_folder):
    refused(
        "train.unlearn",
        "quickstart",
        "--data.path",
        tofu_folder,
        parts=["--data.path", "tofu-smollm2"],
    )
    refused("train.unlearn", "quickstart", "--data.forget-split", "forget05", parts=["forget10"])


# Models.


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def with_model(tofu, path):
    return [*tofu, "--model.path", path]


def test_model_that_is_not_there(refused, tofu, tmp_path):
    refused("train.unlearn", *with_model(tofu, tmp_path / "x"), parts=["no such file or folder"])
    refused("train.unlearn", *with_model(tofu, tmp_path / "x.gguf"), parts=["no such file"])


@pytest.mark.parametrize("option", ["--model.path", "--stage.original"])
def test_a_missing_model_is_said_before_the_hub_is_asked_for_data(
    refused, tmp_path, monkeypatch, option
):
    monkeypatch.setattr("train.data.tofu.hub_source", lambda: pytest.fail("the Hub was asked"))
    one = ["--mesh.data", "1"]
    refused("train.unlearn", "tofu-smollm2", option, tmp_path / "x", *one, parts=["no such file"])
    refused("train.evaluate", tmp_path / "x", parts=["no such file"])
    (tmp_path / "empty").mkdir()
    parts = [tmp_path / "empty", "without config.json"]
    refused("train.unlearn", "tofu-smollm2", option, tmp_path / "empty", *one, parts=parts)


def test_model_without_config(refused, tofu, model):
    (model / "config.json").unlink()
    refused("train.unlearn", *with_model(tofu, model), parts=[model, "config.json"])
    line = refused("train.evaluate", model, *tofu[1:3], parts=[model, "config.json"])
    assert "Hugging Face" in line


def test_truncated_shard(refused, tofu, model, tofu_folder):
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    parts = [shard, "truncated"]
    refused("train.unlearn", *with_model(tofu, model), parts=parts)
    refused("train.unlearn", *tofu, "--stage.original", model, parts=parts)
    refused("train.evaluate", model, "--data.path", tofu_folder, parts=parts)
    refused("train.finetune", model, tofu_folder / "retain99.json", "--mesh.data", "1", parts=parts)


def test_weights_that_are_no_numbers(refused, tofu, model):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")
    refused("train.unlearn", *with_model(tofu, model), parts=["model.norm.weight has 1", "NaN"])


def test_a_chat_template_that_never_ends(refused, tofu, model):
    loop = "{% for a in range(99999) %}"
    (model / "chat_template.jinja").write_text(loop * 3 + "{% endfor %}" * 3)
    refused("train.unlearn", *with_model(tofu, model), parts=["chat template", "processor time"])


def test_a_revision_of_what_is_here(refused, tofu, model):
    options = ["--model.revision", "v1"]
    refused("train.unlearn", *with_model(tofu, model), *options, parts=["only a Hub id"])
    refused("train.unlearn", *tofu, "--data.revision", "v1", parts=["--data.revision v1"])


def test_shard_missing(refused, tofu, model):
    (model / "model.safetensors").unlink()
    refused("train.unlearn", *with_model(tofu, model), parts=[model, "safetensors"])


def test_weights_of_another_model(refused, tofu, model):
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] *= 2
    (model / "config.json").write_text(json.dumps(config))
    refused("train.unlearn", *with_model(tofu, model), parts=[model, "wrong shape", "gate_proj"])


def write_gguf(path: Path, kind: str) -> Path:
    """A GGUF file of one block with matrices of a quantisation."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64, "embedding_length": 64, "feed_forward_length": 64, "block_count": 1,
        "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": 64,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    words = [chr(33 + i) for i in range(62)] + ["!#", "<eos>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["! #"])
    writer.add_eos_token_id(63)
    matrix = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    quant = gguf.GGMLQuantizationType[kind]
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", *(f"blk.0.{name}" for name in names)]:
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(matrix, quant), raw_dtype=quant)
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_truncated(refused, tofu, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "Q8_0")
    for keep in (40, path.stat().st_size // 2, path.stat().st_size - 8):
        path.write_bytes(path.read_bytes()[:keep])
        refused("train.unlearn", *with_model(tofu, path), parts=[path, "truncated"])
        write_gguf(path, "Q8_0")


def test_gguf_of_an_unsupported_quantisation(refused, tofu, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "Q5_0")
    line = refused("train.unlearn", *with_model(tofu, path), parts=[path.name, "Q5_0", "Q4_1"])
    assert "blk.0.attn_q.weight" in line


@pytest.mark.parametrize("module", ["train.unlearn", "train.evaluate", "train.export"])
def test_smollm2_not_installed(refused, monkeypatch, tofu, tmp_path, module):
    monkeypatch.setattr("models.files.weights.find_smollm2", lambda: None)
    monkeypatch.setattr("train.engine.base_models.find_smollm2", lambda: None)
    argv = {
        "train.unlearn": with_model(tofu, "smollm2"),
        "train.evaluate": ["smollm2", *tofu[1:3]],
        "train.export": ["smollm2", tmp_path / "exported"],
    }[module]
    refused(module, *argv, parts=["SmolLM2", "make smollm2"])
    assert not (tmp_path / "exported").exists()


# Output folders and logs.


def test_output_folder_of_another_run(refused, small, tmp_path):
    from train.jobs import job
    from train.presets import arguments
    from train.runtime import folder

    root = tmp_path / "there"
    config = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", *small, "--seed", "4", "--output", str(root)]
    )
    folder.enter(job.place_of(config))
    (root / "summary.json").write_text("{}")
    argv = ["quickstart", *small]
    line = refused("train.unlearn", *argv, "--seed", "5", parts=[root, "another run"], output=root)
    assert "seed: 4 there, 5 here" in line
    line = refused(
        "train.unlearn",
        *[*argv, "--seed", "4", "--optimizer.learning-rate", "0.1"],
        parts=["optimizer.learning_rate", "0.1 here"],
        output=root,
    )
    # The other programs respect it too.
    refused("train.evaluate", "some-model", parts=[root, "--output"], output=root)
    refused("train.finetune", "model", "rows.json", parts=[root, "another run"], output=root)


def test_output_folder_that_is_something_else(refused, small, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    (root / "cat.txt").write_text("a cat")
    refused("train.unlearn", "quickstart", *small, parts=[root, "not a run folder"], output=root)
    refused("train.finetune", "model", "rows.json", parts=[root], output=root)
    cat = root / "cat.txt"
    refused("train.evaluate", "some-model", parts=[cat, "--output"], output=cat)
    refused("train.unlearn", "quickstart", *small, parts=["cat.txt"], output=root / "cat.txt")
    (root / "config.json").write_text("{")
    refused("train.unlearn", "quickstart", *small, parts=["does not read"], output=root)
    (root / "config.json").rename(root / "summary.json")
    refused("train.evaluate", "some-model", parts=[root, "--output"], output=root)


def test_empty_output_folders_are_welcome(small, tmp_path):
    from train.jobs import job
    from train.presets import arguments

    root = tmp_path / "new"
    root.mkdir()
    (root / "config.json.part").write_text("{")  # from a run killed in its first moment
    config = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", *small, "--output", str(root)]
    )
    with folder.locked(root):
        assert folder.enter(job.place_of(config)) == root == folder.enter(job.place_of(config))
    assert sorted(p.name for p in root.iterdir()) == ["config.json", "config.key"]
    assert config_files.read_config(RunConfig, root / "config.json").finetune == config.finetune


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "{", '{"forget_Q_A_ROUGE": 3}', "\x00"])
def test_retain_log_that_is_not_one(refused, small, tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    refused("train.unlearn", "quickstart", *small, "--retain-log", path, parts=[path])
    refused("train.evaluate", "model", "--retain-log", path, parts=[path])


def test_retain_log_that_is_not_there(refused, small, tmp_path):
    path = tmp_path / "log.json"
    refused("train.unlearn", "quickstart", *small, "--retain-log", path, parts=[path, "No such"])


# The other programs.


def test_evaluate(refused, tiny, tofu_folder, tmp_path):
    data = ["--data.path", tofu_folder]
    refused("train.evaluate", "--data.path", "x", parts=["first argument"])
    refused("train.evaluate", tiny, "--data.pth", "x", parts=["--data.path?"])
    refused("train.evaluate", tiny, *data, "--mesh.data", "99", parts=["99 devices"])
    refused("train.evaluate", tiny, *data, "--evaluate.leak-top-p", "2", parts=["leak-top-p"])
    refused("train.evaluate", tmp_path / "nothing", *data, parts=["no such file or folder"])
    absent = tmp_path / "absent"
    refused("train.evaluate", tiny, "--data.path", absent, parts=[absent])


def test_finetune(refused, tiny, tmp_path):
    rows = tmp_path / "rows.json"
    argv = [tiny, rows, "--mesh.data", "1"]
    refused("train.finetune", *argv, parts=[rows, "does not exist"])
    rows.write_text("")
    refused("train.finetune", *argv, parts=[rows, "empty"])
    rows.write_text('{"question": "q?"}\n')
    refused("train.finetune", *argv, parts=[rows, "row 1", "'answer'"])
    rows.write_text('{"question": "q?", "answer": "a"}\nx\n')
    refused("train.finetune", *argv, parts=[rows, "line 2"])
    rows.write_text('{"question": "q?", "answer": "a"}\n')
    refused("train.finetune", *argv, "--train.lr", "1", parts=["--train.lr", "did you mean"])
    refused("train.finetune", *argv, "--train.epochs", "0.1", parts=["no step"])
    refused("train.finetune", *argv, "--export-dtype", "int8", parts=["--export-dtype"])
    refused("train.finetune", *argv, "--max-length", "5", parts=["no label"])
    mesh = "--mesh.data 1 --mesh.fsdp 3".split()
    refused("train.finetune", tiny, rows, *mesh, parts=["fine-tuning batch size 8", "3"])


def test_export(refused, tiny, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "cat.txt").write_text("a cat")
    refused("train.export", tiny, taken, parts=[taken, "cat.txt"], output=taken)
    new = tmp_path / "run"
    refused("train.export", tiny, new, "--dtype", "bfloat61", parts=["--dtype", "'bfloat16'"])
    refused("train.export", tiny, new, "--dtpe", "float16", parts=["--dtpe"])
    refused("train.export", tiny, parts=["give a folder to write", "--push-to-hub"])
    refused("train.export", tmp_path / "nothing", new, parts=["no such file or folder"])


def test_report(program, tmp_path):
    done = program("train.report", tmp_path / "nothing")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
