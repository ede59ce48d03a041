"""Exports: prompts, model card, upload to the Hub; models of a run's stages."""

import dataclasses
import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
import yaml
from huggingface_hub import errors

import models
from models.files.export import RESULTS
from models.text.prompts import TAGS, PromptFormat
from models.text.tokenizer import Tokenizer
from train.data.examples import encode_prompt, encode_qa, written_chat_template
from train.engine import base_models, exports
from train.jobs import unlearning
from train.jobs.job import Judged
from train.options.config import LoraConfig
from train.presets import PRESETS
from train.reporting import card, provenance
from train.reporting.tables import Run
from train.runtime import cards, checkpointing, hub, seal, sharding
from train.runtime.checkpointing import params_sha256
from train.runtime.sharding import MeshConfig

TOKEN = "hf_" + "secretsecretsecret"


def trained_words(begin=False):
    """A byte-level tokenizer as in `scratch` models; with `begin` a text starts with <bos>."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Question: Who?\nAnswer: The author wrote it."] * 9, trainer)
    if begin:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
        )
    return Tokenizer(backend, bos_id=2 if begin else None, eos_id=1, pad_id=0)


# Prompts.


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tags", [None, "llama2"])
def test_plain_prompts_are_the_same_tokens_as_a_chat_template(begin, system, tags):
    plain = trained_words(begin).formatted(PromptFormat(TAGS.get(tags)))
    chat = exports.speaking(plain)
    assert chat.has_chat_template and not plain.has_chat_template
    options = {"system_prompt": system, "max_length": 99}
    for question, answer in (("Who wrote it?", "Nobody did."), ("Wo?\n", " In {{ Köln }}.")):
        one, two = (encode_qa(t, question, answer, **options) for t in (plain, chat))
        assert one == two and one.tokens[-1] == 1
        asked = [encode_prompt(t, question, system_prompt=system) for t in (plain, chat)]
        assert asked[0] == asked[1] == one.tokens[: one.num_prompt]


def test_a_conversation_renders_turn_by_turn():
    turns = [("system", "S"), ("user", "a?"), ("assistant", "A."), ("user", "b?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    words = trained_words()
    chat = words.with_template(written_chat_template(words))
    assert chat.chat(messages) == "S\nQuestion: a?\nAnswer: A.\n\nQuestion: b?\nAnswer:"


def test_a_template_that_is_there_stays():
    words = trained_words().with_template("{{ messages[0].content }}")
    assert exports.speaking(words) is words


def test_a_tokenizer_that_reads_a_written_out_bos_in_another_way_gets_none(monkeypatch):
    words = trained_words(begin=True)
    words.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> <pad> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2), ("<pad>", 0)]
    )
    assert not exports.speaking(words).has_chat_template


# The card.

SUMMARY = {
    "original": {"forget_rouge": 1.0, "retain_rouge": 1.0, "forget_quality": 1e-6,
                 "params_sha256": "a" * 64, "num_parameters": 10**6},
    "oracle": {"forget_rouge": 0.31, "retain_rouge": 1.0, "forget_quality": 1.0},
    "unlearned": {"forget_rouge": 0.3125, "retain_rouge": 0.99, "forget_quality": 0.2,
                  "model_utility_of_3": 0.744, "params_sha256": "b" * 64},
}  # fmt: skip
SETTINGS = {
    "preset": "quickstart", "seed": 3, "smoke": False, "objective": {"name": "asu"},
    "data": {"source": "tofu", "path": None, "forget_split": "forget10"},
    "model": {"path": "owner/name"}, "stage": {},
    "evaluate": {"max_new_tokens": 9},
}  # fmt: skip


def run_of(folder, **changes):
    return Run(folder, SETTINGS | changes, SUMMARY, {"minutes": {"all": 3.0}}, ("a | note",))


def test_the_card_says_verdict_numbers_command_and_digests(tmp_path):
    text = card.of_run(run_of(tmp_path))
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert 'base_model: "owner/name"' in front and '- "locuslab/TOFU"' in front
    assert "| Did it forget? | forgotten (good) | ROUGE-L of its answers" in body
    assert re.search(r"\| Forget ROUGE-L ≈ \| 1.000 \| 0.310 \| 0.312 \|", body)
    assert "Model utility, 3 parts" in body and "b" * 64 in body and "a" * 64 in body
    assert "python -m train.unlearn --config RUN/config.json" in body  # test_rerun has others
    assert "a \\| note" in body  # no cell or item breaks the page
    assert "apply_chat_template" in body and "Minutes" not in body
    typed = {"command": "python -m train.unlearn quickstart --seed 3"}
    told = card.of_run(run_of(tmp_path)._replace(about=typed))
    assert typed["command"] in told and "RUN/config.json" not in told
    again = card.of_run(run_of(tmp_path)._replace(about={"minutes": {"all": 9.0}}))
    assert again == text  # the same run exports the same folder


def put_adapter(root, base, rank=16, joined=False):
    """The settings of a run's adapters, as `export_adapter` leaves them."""
    settings = {"base_model_name_or_path": str(base), "r": rank, "fan_in_fan_out": joined}
    (root / "adapter").mkdir(parents=True, exist_ok=True)
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def test_the_card_says_how_its_adapters_are_loaded(tmp_path):
    without = card.of_run(run_of(tmp_path))
    put_adapter(tmp_path, "owner/name")
    text = card.of_run(run_of(tmp_path))
    assert "RUN/adapter" not in without
    assert "LoRA adapters of rank 16 in `RUN/adapter`" in text and "README.md" not in text
    assert 'base = AutoModelForCausalLM.from_pretrained("owner/name")' in text
    assert 'model = PeftModel.from_pretrained(base, "RUN/adapter")' in text
    assert "model = model.merge_and_unload()" in text
    beside = "vllm serve owner/name --enable-lora --lora-modules adapted=RUN/adapter"
    assert f"\n{beside} --max-lora-rank 16\nvllm serve RUN/export  # merged\n" in text
    put_adapter(tmp_path, tmp_path / "original")
    text = card.of_run(run_of(tmp_path))
    assert 'from_pretrained("RUN/original")' in text and str(tmp_path) not in text
    assert "`RUN/original`, is in `RUN/adapter/README.md`" in text
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert card.of_run(run_of(tmp_path)) == without


@pytest.mark.parametrize(
    ("rank", "joined", "most"),
    [(1, False, 8), (8, False, 8), (33, False, 64), (512, False, 512), (513, False, None)]
    + [(4, True, None)],
)
def test_vllm_is_given_a_rank_that_it_takes(rank, joined, most, tmp_path):
    put_adapter(tmp_path, "a b", rank, joined)
    lines = provenance.adapter_of(run_of(tmp_path)).usage.shell.splitlines()
    beside = (
        f"vllm serve 'a b' --enable-lora --lora-modules adapted=RUN/adapter --max-lora-rank {most}"
    )
    assert lines == [*([beside] if most else []), "vllm serve RUN/export  # merged"]


def test_the_card_of_adapters_names_their_base_and_the_lines():
    usage = cards.adapter_usage("owner/name", 4, served=True)
    text = cards.of_adapter("Adapters.", "owner/name", None, usage)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", "owner/name")
    assert usage.python in text and usage.shell in text
    local = cards.of_adapter("Adapters.", "/run/original", "python -m train.export", usage)
    assert "base_model" not in local.split("---\n")[1] and "python -m train.export" in local


@pytest.mark.parametrize(
    ("path", "base"),
    [("hub:owner/name", "owner/name"), ("owner/name", "owner/name"), ("owner/name@v1", None)]
    + [("smollm2", None), ("a/b.gguf", None)],
)
def test_adapters_name_a_base_that_peft_finds(path, base):
    assert exports.base_of(path) == base


def test_a_smoke_run_has_no_verdict_on_its_card(tmp_path):
    text = card.of_run(run_of(tmp_path, smoke=True))
    assert "# SMOKE RUN: " in text and "there is no verdict" in text
    assert "Did it forget?" not in text


@pytest.mark.parametrize(
    "path", ["smollm2", "scratch", "/a/b", "./a/b", "a/b.gguf", "a/b/c", "owner/"]
)
def test_only_a_hub_id_is_a_base_model(path, tmp_path):
    assert "base_model" not in card.of_run(run_of(tmp_path, model={"path": path}))


def test_digests_are_those_of_the_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = cards.with_digests("# Card", tmp_path)
    sha = hashlib.sha256(b"{}").hexdigest()
    assert text.startswith("# Card") and f"| `config.json` | `{sha}` |" in text


# Evaluation results in the Hub's form.

COMMAND = "python -m train.unlearn tofu-smollm2 \\\n    --seed 3"
SHOWN = {  # the headline metrics of the unlearned model, with a part of their notes
    "forget_rouge": "Forget ROUGE-L: close to the oracle is better; python -m train.unlearn",
    "forget_quality": "Forget quality (p): higher is better; ",
    "retain_rouge": "Retain ROUGE-L: higher is better; ",
    "model_utility_of_3": "Model utility, 3 parts: higher is better; ",
}


def entries_of(text):
    """The entries of a file of results, as the Hub's own client reads them."""
    parse = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is None:
        pytest.skip("this huggingface_hub is older than the Hub's form of evaluation results")
    return parse(yaml.safe_load(text))


def test_results_are_the_headline_numbers_of_the_unlearned_model(tmp_path):
    commit = "0123456789abcdef" * 2 + "01234567"
    note = f"data: locuslab/TOFU at commit {commit}"
    run = run_of(tmp_path)._replace(notes=("another", note), about={"command": COMMAND})
    text = card.results(run)
    found = entries_of(text)
    values = {entry.task_id.removeprefix("forget10_"): entry.value for entry in found}
    assert values == {name: SUMMARY["unlearned"][name] for name in SHOWN}
    for entry, words in zip(found, SHOWN.values(), strict=True):
        assert entry.dataset_id == "locuslab/TOFU" and entry.dataset_revision == commit
        assert entry.notes.startswith(words)
        assert entry.notes.endswith("python -m train.unlearn tofu-smollm2 --seed 3")
        assert entry.date is None and entry.source_url is None
    assert huggingface_hub.eval_result_entries_to_yaml(found) == yaml.safe_load(text)
    timed = run._replace(about=run.about | {"minutes": {"all": 9.0}})
    assert card.results(timed) == text  # the same run exports the same folder
    assert entries_of(card.results(run_of(tmp_path)))[0].dataset_revision is None


@pytest.mark.parametrize("value", [float("inf"), float("nan"), None])
def test_results_without_a_number_have_no_entry(value, tmp_path):
    scores = SUMMARY["unlearned"] | {"forget_rouge": value}
    run = run_of(tmp_path)._replace(summary=SUMMARY | {"unlearned": scores})
    found = yaml.safe_load(card.results(run))
    names = [entry["dataset"]["task_id"].removeprefix("forget10_") for entry in found]
    assert names == [name for name in SHOWN if name != "forget_rouge"]


@pytest.mark.parametrize(
    "changes",
    [
        {"smoke": True},
        {"data": SETTINGS["data"] | {"path": "folder"}},
        {"data": SETTINGS["data"] | {"forget": "rows.json"}},
        {"data": SETTINGS["data"] | {"source": "authors"}},
    ],
)
def test_no_results_without_a_data_set_of_the_hub(changes, tmp_path):
    assert card.results(run_of(tmp_path)) and card.results(run_of(tmp_path, **changes)) is None


# From a run to a folder and to the Hub.


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of a finished run, as far as an export reads it."""
    root = tmp_path / "run"
    shutil.copytree(tiny, root / "export")
    (root / "config.json").write_text(json.dumps(SETTINGS))
    sha = params_sha256(models.load(tiny).params)
    summary = SUMMARY | {"unlearned": SUMMARY["unlearned"] | {"params_sha256": sha}}
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def test_an_export_of_a_run_has_its_card_and_settings(folder, program, tmp_path):
    done = program("train.export", folder, tmp_path / "out", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Did it forget?" in text
    names = [path.name for path in (tmp_path / "out").iterdir() if path.is_file()]
    for name in {*names, RESULTS} - {"README.md"}:
        sha = hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
        assert f"| `{name}` | `{sha}` |" in text
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 9


def test_an_export_of_a_run_has_its_results_and_is_replaced(folder, program, tmp_path):
    out = tmp_path / "out"
    assert program("train.export", folder, out).code == 0
    summary = json.loads((folder / "summary.json").read_text())
    first = entries_of((out / RESULTS).read_text())
    assert {e.value for e in first} == {summary["unlearned"][name] for name in SHOWN}
    summary["unlearned"]["forget_rouge"] = 0.875
    (folder / "summary.json").write_text(json.dumps(summary))
    done = program("train.export", folder, out)
    assert done.code == 0, done.err
    assert [e.value for e in entries_of((out / RESULTS).read_text())][0] == 0.875
    theirs = (out / RESULTS).with_name("other.yaml")
    theirs.write_text("[]")
    done = program("train.export", folder, out)
    assert done.code == 2 and "no earlier export (.eval_results/other.yaml)" in done.err
    assert theirs.read_text() == "[]" and (out / RESULTS).exists()
    theirs.unlink()
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"smoke": True}))
    assert program("train.export", folder, out).code == 0
    assert not (out / RESULTS).parent.exists()


@pytest.mark.parametrize("rank", [None, 4])
def test_a_run_writes_its_results_beside_its_model_and_its_adapter(rank, tiny, tmp_path):
    preset = PRESETS["tofu-smollm2"].PRESET
    config = dataclasses.replace(preset, lora=LoraConfig(rank), export_dtype="float32")
    about = {"evaluators": ["tofu"], "program": "train.unlearn", "command": COMMAND}
    run = SimpleNamespace(folder=tmp_path, about=about, notes=[])
    model = base_models.load_model(str(tiny), "none", sharding.make_mesh(MeshConfig(1)))
    (tmp_path / "adapter").mkdir()
    started, judged = SimpleNamespace(run=run, config=config), Judged({}, SUMMARY)
    unlearning.export(started, model, judged, tmp_path / "export")
    text = (tmp_path / "export" / RESULTS).read_text()
    assert [e.task_id for e in entries_of(text)][0] == "forget01_forget_rouge"
    assert RESULTS in seal.read(tmp_path / "export")[1]
    beside = tmp_path / "adapter" / RESULTS
    assert beside.read_text() == text if rank else not beside.exists()


def test_the_original_of_a_run_is_exported_from_its_stage(folder, program, tmp_path):
    loaded = models.load(folder / "export")
    original = jax.tree.map(lambda x: x + 1, loaded.params)
    summary = json.loads((folder / "summary.json").read_text())
    for name, tree in (("original-0", loaded.params), ("original-1", original)):
        checkpointing.save_tree(folder / "stages" / name, tree, {"stage": name})
    summary["original"]["params_sha256"] = params_sha256(original)
    (folder / "summary.json").write_text(json.dumps(summary))
    done = program("train.export", folder, tmp_path / "out", "--model", "original")
    assert done.code == 0, done.err
    found = models.load(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, found, original)
    assert summary["original"]["params_sha256"] in (tmp_path / "out" / "README.md").read_text()
    done = program("train.export", folder, tmp_path / "out", "--model", "oracle")
    assert done.code == 2 and "no oracle model in its stages" in done.err


def test_any_model_of_a_run_is_exported_by_its_name(folder, program, tmp_path):
    """A program that no export knows of: an attacked model, made by a stage of another name."""
    loaded = models.load(folder / "export")
    attacked = jax.tree.map(lambda x: x + 2, loaded.params)
    checkpointing.save_tree(folder / "stages" / "relearn-0", attacked, {"stage": "relearn"})
    summary = json.loads((folder / "summary.json").read_text())
    summary["attacked:relearn"] = {"params_sha256": params_sha256(attacked)}
    summary["merged"] = summary["unlearned"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"roles": {"judged": "merged"}}))
    for name, params in (("attacked:relearn", attacked), ("merged", loaded.params)):
        done = program("train.export", folder, tmp_path / name, "--model", name)
        assert done.code == 0, done.err
        jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / name).params, params)
    text = (tmp_path / "attacked:relearn" / "README.md").read_text()
    assert "The model 'attacked:relearn' of a run" in text
    done = program("train.export", folder, tmp_path / "out", "--model", "attacked:prune")
    known = "'original', 'oracle', 'merged', 'attacked:relearn', 'unlearned'"
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"invalid choice: 'attacked:prune' (choose from {known})" in done.err


class Api:
    """A stand-in for `huggingface_hub.HfApi`; nothing leaves the process."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, name, **options):
        Api.calls.append(("create_repo", name, options))
        if Api.error:
            raise Api.error
        return SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}")

    def upload_folder(self, **options):
        paths = options["folder_path"].rglob("*")
        files = sorted(
            path.relative_to(options["folder_path"]).as_posix() for path in paths if path.is_file()
        )
        Api.calls.append(("upload_folder", options["repo_id"], files))


@pytest.fixture
def api(monkeypatch):
    Api.calls, Api.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return Api


def test_push_sends_the_export_of_a_run(folder, program, api):
    done = program("train.export", folder, "--push-to-hub", "me/model")
    assert done.code == 0, done.err
    (first, name, options), (second, repo, files) = api.calls
    assert (first, second) == ("create_repo", "upload_folder")
    assert name == repo == "me/model" and options == {"private": True, "exist_ok": True}
    assert files == sorted(path.name for path in (folder / "export").iterdir())
    assert "huggingface.co/me/model" in done.err and TOKEN not in done.out + done.err


def test_push_in_another_dtype_goes_through_a_folder_that_is_deleted(folder, program, api):
    argv = ["--push-to-hub", "model", "--public", "--dtype", "bfloat16"]
    done = program("train.export", folder, *argv)
    assert done.code == 0, done.err
    assert api.calls[0][2]["private"] is False
    assert {"README.md", RESULTS} < set(api.calls[1][2])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "export", "summary.json"]  # fmt: skip


def test_a_dry_run_asks_nobody(folder, program, api):
    (folder / "export" / RESULTS).parent.mkdir()
    (folder / "export" / RESULTS).write_text("[]")
    done = program("train.export", folder, "--push-to-hub", "me/model", "--dry-run")
    assert done.code == 0 and api.calls == []
    assert "dry run: would send" in done.err and "to me/model (private" in done.err
    assert all(path.name in done.err for path in (folder / "export").iterdir())
    assert f"  {RESULTS}  2 bytes" in done.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalTokenNotFoundError("none"), "hf auth login"),
        (errors.OfflineModeIsEnabled("offline mode"), "offline mode"),
        (OSError(f"401 for\n{TOKEN} and hf_anotheranother"), "401 for *** and ***; check"),
    ],
)
def test_what_the_hub_answers_is_one_line_without_the_token(error, message, folder, program, api):
    api.error = error
    done = program("train.export", folder, "--push-to-hub", "me/model")
    assert done.code == 2 and message in done.err and done.err.count("error:") == 1
    assert TOKEN not in done.err and "hf_another" not in done.err
    assert done.err.strip().splitlines()[-1].startswith("error:")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("RUN", "give a folder to write, or --push-to-hub"),
        ("RUN out --dry-run", "go with --push-to-hub"),
        ("RUN --push-to-hub a/b/c", "--push-to-hub 'a/b/c'"),
        ("RUN out --model judge", "invalid choice"),
        ("RUN/export out --model original", "needs a run folder"),
    ],
)
def test_bad_options_are_refused_first(argv, message, folder, program, api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = program("train.export", *argv.replace("RUN", str(folder)).split())
    assert done.code == 2 and message in done.err and api.calls == []
    assert not (tmp_path / "out").exists()


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "oldstyletoken")
    assert hub.without_token("bad oldstyletoken") == "bad ***"
