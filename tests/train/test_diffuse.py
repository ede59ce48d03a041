"""The programs about text-to-image models: diffuse, erase, attack and defend, on drawn shapes."""

import itertools
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlib_unlearn.errors import UserError
from models.files import diffusers_files, vit_files
from models.files.vit_files import LoadedViT
from models.files.weights import flatten
from models.vision.vit import ViT, ViTConfig
from train.data.captions import CLOTHES
from train.jobs.diffusing import attack_files, attacking, drawing, painters, prompts, stored
from train.jobs.diffusing.drawing import Wanted
from train.options.config import identity
from train.presets.arguments import read_arguments
from train.reporting import provenance
from train.reporting.tables import load_run
from train.runtime.digests import params_sha256
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.tracking import Tracker
from train.tasks.erasure import PLACEHOLDER

ONE = ("--mesh.data", "1")


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def log_of(output, model):
    return json.loads((output / "evals" / f"{model}.json").read_text())


def done(program, name, *argv):
    found = program(f"train.{name}", *argv)
    assert found.code == 0, found.err
    return found


@pytest.fixture(scope="session")
def diffused(program, tmp_path_factory):
    """A smoke run of train.diffuse, whose models the other programs take."""
    output = tmp_path_factory.mktemp("diffuse") / "run"
    found = done(program, "diffuse", "fashion", "--smoke", *ONE, "--output", output)
    return output, found


@pytest.fixture(scope="session")
def erased(program, diffused):
    output = diffused[0].parent / "erased"
    method = ("--erase.concept", "sneaker", "--erase.method", "uce")
    done(program, "erase", diffused[0], *method, "--output", output)
    return output


@pytest.fixture(scope="session")
def attacked(program, erased):
    output = erased.parent / "attacked"
    done(program, "attack", erased, "--attack", "subattack", "--output", output)
    return output


@pytest.fixture(scope="session")
def defended(program, erased, attacked):
    output = erased.parent / "defended"
    done(program, "defend", erased, attacked, "--output", output)
    return output


# diffuse


def test_diffuse_trains_judges_and_reports(diffused):
    output, found = diffused
    summary = summary_of(output)["original"]
    assert {"kept_accuracy", "kept_frechet", "prompt_attributes", "judge_accuracy"} <= set(summary)
    page = (output / "report.html").read_text()
    assert "SMOKE" in page and "What they draw" in page and (output / "images.png").exists()
    assert "classifier: held-out accuracy" in found.err
    stages = {
        line["stage"]
        for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    }
    assert stages == {"classifier", "vae", "original"}


def test_the_log_tells_of_every_image(diffused):
    items = list(log_of(diffused[0], "original")["kept_accuracy"]["value_by_index"].values())
    assert len(items) == 20 and {item["class"] for item in items} >= {"sneaker", "ankle boot"}
    assert len({item["number"] for item in items}) == 20 and {i["seed"] for i in items} == {0}
    assert all(item["shown"] == (item["judged"] == item["class"]) for item in items)
    agreed = log_of(diffused[0], "original")["prompt_attributes"]["value_by_index"].values()
    assert all(item["agrees"] == (item["word"] == item["measured"]) for item in agreed)


def test_the_export_is_a_folder_of_diffusers(diffused):
    output = diffused[0]
    found = diffusers_files.load(output / "export")
    both = {name: found.params[name] for name in ("text_encoder", "unet")}
    assert params_sha256(both) == summary_of(output)["original"]["params_sha256"]
    assert found.tokenizer is not None
    assert found.tokenizer.encode("a sneaker") == [0, found.tokenizer.encode("sneaker")[0]]
    told = json.loads((output / "export" / "tokenizer" / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == found.configs["text_encoder"].num_positions == 24


def test_a_second_start_computes_nothing(diffused, program):
    output, _ = diffused
    before = (output / "metrics.jsonl").read_bytes(), summary_of(output)
    again = done(program, "diffuse", "fashion", "--smoke", *ONE, "--output", output)
    assert again.err.count("found, made from the same inputs") == 4
    assert ((output / "metrics.jsonl").read_bytes(), summary_of(output)) == before


@pytest.mark.parametrize("least", [1.0])
def test_a_judge_that_is_too_bad_stops_the_run(program, tmp_path, least):
    sizes = "--data.source shapes --data.train-rows 40 --data.test-rows 20 --judge.channels 8 8 "
    sizes += "--judge.features 16 --classifier.epochs 1 --classifier.batch-size 20 --draw.rows 20 "
    sizes += "--model.norm-groups 4"
    more = (*sizes.split(), "--judge.least", str(least), "--output", tmp_path / "run")
    found = program("train.diffuse", "fashion", *ONE, *more)
    lines = [line for line in found.err.splitlines() if line.startswith("stopped: ")]
    assert found.code == 1 and len(lines) == 1 and "below --judge.least 1" in lines[0]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow  # compiles for eight devices and for another judge
def test_given_models_are_judged(program, diffused, tmp_path):
    """A folder of diffusers, and a vision transformer as the judge."""
    names = tuple(noun.names[0] + ", clothing" for noun in CLOTHES)
    shape = ViTConfig(8, 4, 1, 12, 24, 1, 2, len(names), mean=(0.5,), std=(0.5,))
    vit = LoadedViT(shape, ViT(shape).init(jax.random.key(0)), names)
    vit_files.export(vit, tmp_path / "vit")
    given = ("--model.path", diffused[0] / "export", "--judge.path", tmp_path / "vit")
    more = (*ONE, "--data.source", "shapes", "--output", tmp_path / "run")
    done(program, "diffuse", "sd14", "--smoke", *given, *more, "--draw.sampler", "ddim")
    found = summary_of(tmp_path / "run")["original"]
    assert found["params_sha256"] == summary_of(diffused[0])["original"]["params_sha256"]
    assert not (tmp_path / "run" / "judge").exists()


# erase


def test_uce_changes_what_cross_attention_reads(diffused, erased):
    before = flatten(diffusers_files.load(diffused[0] / "export").params)
    after = flatten(diffusers_files.load(erased / "export").params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    asked = ("attn2/to_k/kernel", "attn2/to_v/kernel")
    assert moved == {name for name in before if name.endswith(asked)}
    summary = summary_of(erased)
    assert set(summary) == {"original", "erased"}
    assert summary["original"]["params_sha256"] != summary["erased"]["params_sha256"]
    wanted = {"concept_rate_explicit", "concept_rate_names", "kept_accuracy", "kept_frechet"}
    assert wanted <= set(summary["erased"])


def test_other_names_have_the_noise_of_the_name(erased):
    log = log_of(erased, "erased")
    kinds = ("concept_rate_explicit", "concept_rate_names")
    numbers = [[i["number"] for i in log[k]["value_by_index"].values()] for k in kinds]
    assert numbers[0] == numbers[1]
    texts = [[i["prompt"] for i in log[k]["value_by_index"].values()] for k in kinds]
    assert all("sneaker" in text for text in texts[0])
    assert [a.replace("sneaker", "trainer") for a in texts[0][:1]] == texts[1][:1]


@pytest.mark.slow  # compiles the step
@pytest.mark.parametrize("method", ["esd", "finetune"])
def test_training_erases_with_the_cross_attention_alone(program, diffused, tmp_path, method):
    more = ("--erase.towards", "bag") if method == "finetune" else ("--combine", "blur")
    run = ("--erase.method", method, *more, "--output", tmp_path / "run")
    done(program, "erase", diffused[0], *run)
    before = flatten(diffusers_files.load(diffused[0] / "export").params)
    after = flatten(diffusers_files.load(tmp_path / "run" / "export").params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "/attn2/" in name}


def test_rece_goes_further_than_uce(program, diffused, erased, tmp_path):
    more = ("--erase.method", "rece", "--output", tmp_path / "run")
    done(program, "erase", diffused[0], *more)
    shas = {summary_of(run)["erased"]["params_sha256"] for run in (erased, tmp_path / "run")}
    assert len(shas) == 2


# attack and defend


def test_subattack_writes_its_tokens(attacked):
    told = json.loads((attacked / "attack.json").read_text())
    tensors = load_file(attacked / "tokens.safetensors")
    assert (told["attack"], told["concept"], len(told["tokens"])) == ("subattack", "sneaker", 2)
    for token, row in zip(told["tokens"], tensors["embeddings"], strict=True):
        alphas = [word["alpha"] for word in token["words"]]
        assert len(alphas) == 20 and alphas == sorted(alphas, reverse=True) and min(alphas) >= 0
        assert -1 <= token["share_of_top_50"] <= 1
        assert token["norm"] == pytest.approx(np.linalg.norm(row), rel=1e-6)
    unit = tensors["embeddings"] / np.linalg.norm(tensors["embeddings"], axis=1, keepdims=True)
    np.testing.assert_allclose(unit @ unit.T, np.eye(2), atol=1e-5)


def test_an_attack_is_judged_with_any_of_its_tokens(attacked, erased):
    summary, log = summary_of(attacked), log_of(attacked, "attacked")
    assert set(summary) == {"original", "erased", "attacked"}
    tried = log["concept_rate_attacked"]["value_by_index"]
    assert all(PLACEHOLDER in i["prompt"] and len(i["tokens"]) == 2 for i in tried.values())
    asked = log["concept_rate_explicit"]["value_by_index"]
    assert [i["number"] for i in tried.values()] == [i["number"] for i in asked.values()]
    assert summary["attacked"]["asr"] >= summary["attacked"]["pre_asr"]
    assert summary["erased"] == summary_of(erased)["erased"]  # the same images, not drawn again
    assert 0 <= summary["attacked"]["interpretable_at_10"] <= 1


def test_the_grid_shows_no_images_twice(attacked):
    """An attack replaces the name; with the name, the model draws what it drew before."""
    page = (attacked / "report.html").read_text()
    assert "Images in columns: " in page and "attacked, first token" in page
    assert "erased, its name" in page and "attacked, its name" not in page


@pytest.mark.parametrize(
    "name, title, facts, models",
    [
        ("erased", "sneaker erased by uce", {"Erased by": "uce (concept sneaker"}, ""),
        (
            "attacked",
            "subattack on erased",
            {"Attack": "subattack (tokens 2", "Optimizer": "adamw"},
            "attacked",
        ),
        ("defended", "erased defended", {"Defence": "where lookup"}, "defended"),
    ],
)
def test_a_page_says_what_was_done(request, name, title, facts, models):
    folder = request.getfixturevalue(name)
    page = (folder / "report.html").read_text()
    assert f"fashion, {title}, seed 0" in page
    run = load_run(folder)
    told = dict(provenance.facts(run, {}))
    assert {k: v[: len(facts[k])] for k, v in told.items() if k in facts} == facts
    assert ("Optimizer" in told) == ("Optimizer" in facts)  # a closed form has none
    assert run.models == ["original", "erased", *([models] if models else [])]


def test_the_attacked_model_stays_as_it_is(attacked, erased):
    told = summary_of(attacked)["attacked"]["params_sha256"]
    assert told == summary_of(erased)["erased"]["params_sha256"]


@pytest.mark.parametrize("name", ["none", "words", "random"])
def test_what_is_compared_with_it(program, erased, diffused, tmp_path, name):
    more = ("--attack.transfer", diffused[0]) if name == "random" else ()
    done(program, "attack", erased, "--attack", name, *more, "--output", tmp_path / "run")
    summary = summary_of(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "attack.json").read_text())
    assert len(told["tokens"]) == (2 if name == "random" else 0)
    assert ("transferred" in summary) == (name == "random")
    assert "asr" in summary["attacked"]
    if name == "words":
        items = log_of(tmp_path / "run", "attacked")["concept_rate_attacked"]["value_by_index"]
        assert {len(item["tokens"]) for item in items.values()} == {3}


def test_tokens_of_another_run_are_tried_as_they_are(program, erased, attacked, tmp_path):
    """On the model that they were found on they draw the same again; nothing is learned."""
    more = ("--attack", "given", "--attack.source", attacked, "--output", tmp_path / "run")
    done(program, "attack", erased, *more)
    tensors = [load_file(run / "tokens.safetensors") for run in (attacked, tmp_path / "run")]
    np.testing.assert_array_equal(tensors[0]["embeddings"], tensors[1]["embeddings"])
    told = [json.loads((run / "attack.json").read_text()) for run in (attacked, tmp_path / "run")]
    assert told[1]["tokens_sha256"] == told[0]["tokens_sha256"]
    assert [t["words"] for t in told[1]["tokens"]] == [t["words"] for t in told[0]["tokens"]]
    assert (told[1]["attack"], told[1]["concept"]) == ("given", "sneaker")
    assert summary_of(tmp_path / "run") == summary_of(attacked)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow  # compiles the step
def test_free_embeddings_move_away_from_where_they_began(program, erased, tmp_path):
    found = []
    for steps in ("1", "3"):
        run = tmp_path / steps
        more = ("--attack", "cce", "--attack.steps", steps, "--output", run)
        done(program, "attack", erased, *more)
        found.append(load_file(run / "tokens.safetensors")["embeddings"])
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_a_defence_takes_the_span_out(defended, attacked):
    tensors = load_file(attacked / "tokens.safetensors")
    basis = load_file(defended / "export" / "projection.safetensors")["basis"]
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
    rest = tensors["embeddings"].T - basis @ (basis.T @ tensors["embeddings"].T)
    assert np.abs(rest).max() < 1e-5 * np.abs(tensors["embeddings"]).max()
    table = diffusers_files.load(defended / "export").params["text_encoder"]["embed"]["embedding"]
    assert np.abs(np.asarray(table) @ basis).max() < 1e-5
    summary = summary_of(defended)
    assert set(summary) == {"original", "erased", "defended"}
    assert {"asr", "kept_accuracy", "concept_rate_attacked"} <= set(summary["defended"])


def test_a_token_of_the_span_is_as_no_embedding_at_all(defended, attacked):
    """Whatever stands at the place: its part in the span is gone, and it has no other."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    source = stored.read_run(defended, "RUN")
    model = stored.shown_of(source, mesh)
    token = 50 * load_file(attacked / "tokens.safetensors")["embeddings"][1]
    text = f"a photo of a {PLACEHOLDER}"

    def drawn(embedding, shield):
        wanted = Wanted([text], [3], embedding[None])
        draw = source.config.draw
        how = {"seed": 0, "shield": shield, "decode": False}
        return drawing.drawn(model.painter, wanted, draw, mesh, **how)

    nothing = np.zeros_like(token)
    apart = [np.abs(drawn(token, s) - drawn(nothing, s)).max() for s in (model.shield, None)]
    assert apart[0] < 1e-5 and apart[1] > 100 * apart[0], (
        apart
    )  # a projected table does not stop it


# Bad input


REFUSED = {
    "no run": ("attack", "nowhere --attack none", "is no folder"),
    "not a run": ("attack", "EMPTY --attack none", "is not a finished run"),
    "another program": ("attack", "DIFFUSED --attack none", "is a run of train.diffuse"),
    "unknown attack": ("attack", "ERASED --attack subatack", "did you mean 'subattack'"),
    "another's option": ("attack", "ERASED --attack none --attack.form project", "not for none"),
    "K above d - 1": ("attack", "ERASED --attack.tokens 16", "at most 15"),
    "no placeholder": ("attack", "ERASED --attack.prompt shoe", "has no placeholder"),
    "two placeholders": ("attack", "ERASED --attack.prompt <v_att><v_att>", "has 2 placeholders"),
    "unknown option": ("attack", "ERASED --attack.token 2", "did you mean --attack.tokens"),
    "no tokens": ("attack", "ERASED --attack given", "--attack.source is missing"),
    "no tokens there": ("attack", "ERASED --attack given --attack.source ERASED", "no finished"),
    "no attack": ("defend", "ERASED", "second argument"),
    "attack of nothing": ("defend", "ERASED ERASED", "no finished run of train.attack"),
    "more tokens": ("defend", "ERASED ATTACKED --defend.tokens 3", "has 2"),
    "unknown concept": ("erase", "DIFFUSED --erase.concept sneker", "did you mean 'sneaker'"),
    "another name": ("erase", "DIFFUSED --erase.concept trainer", "another name of 'sneaker'"),
    "towards itself": ("erase", "DIFFUSED --erase.towards trainer", "is a name of 'sneaker'"),
    "unknown method": ("erase", "DIFFUSED --erase.method ucee", "did you mean 'uce'"),
    "unknown leaf": ("erase", "DIFFUSED --erase.method esd --train.leaves attn3", "attn3"),
    "leaf of the text": ("erase", "DIFFUSED --erase.method esd --train.leaves embed", "text enc"),
    "no preset": ("erase", "fashon", "did you mean 'fashion'"),
    "no images": ("diffuse", "fashion --data.path nowhere", "does not exist"),
    "mixed sizes": ("diffuse", "fashion --data.path MIXED", "bring all images to one size"),
    "empty class": ("diffuse", "fashion --data.path HOLLOW", "a class without an image"),
    "other classes": ("diffuse", "fashion --data.path OTHER", "is none of --data.source fashion"),
    "no folder of sd": (
        "diffuse",
        "sd14 --model.path nowhere --data.path SHAPES",
        "no such folder",
    ),
    "pickled": ("diffuse", "sd14 --model.path PICKLED --data.path SHAPES", ".bin"),
    "short prompts": (
        "diffuse",
        "fashion --smoke --mesh.data 1 --model.length 9",
        "captions have up to",
    ),
    "odd sizes": (
        "diffuse",
        "fashion --smoke --mesh.data 1 --model.norm-groups 5",
        "does not divide",
    ),
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, diffused, erased, attacked):
    from PIL import Image

    from train.data.captions import OBJECTS

    root = tmp_path_factory.mktemp("places")

    def folder(name, classes, sizes=(8, 8)):
        for i, label in enumerate(classes):
            (root / name / label).mkdir(parents=True)
            for j in range(5):
                side = sizes[j % 2]
                image = Image.new("L", (side, side), 40 * i % 255)
                image.save(root / name / label / f"{j}.png")
        return root / name

    (root / "EMPTY").mkdir()
    hollow = folder("HOLLOW", ["bag", "dress"])
    (hollow / "coat").mkdir()
    pickled = root / "PICKLED"
    shutil.copytree(diffused[0] / "export", pickled)
    (pickled / "params_sha256").unlink()
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    found = {
        "EMPTY": root / "EMPTY",
        "MIXED": folder("MIXED", ["bag", "dress"], (8, 9)),
        "HOLLOW": hollow,
        "OTHER": folder("OTHER", ["cat", "dog"]),
        "SHAPES": folder("SHAPES", [noun.names[0] for noun in OBJECTS]),
        "PICKLED": pickled,
    }
    return found | {"DIFFUSED": diffused[0], "ERASED": erased, "ATTACKED": attacked}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case, program, places, tmp_path):
    name, line, words = REFUSED[case]
    argv = [places.get(word, word) for word in line.split()]
    found = program(f"train.{name}", *argv, "--output", tmp_path / "run")
    errors = found.err.splitlines()
    assert found.code == 2 and words in errors[-1], found.err
    assert errors[-1].startswith("error: ") and len(errors) == 1
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_cut_and_that_is_said(diffused, capsys):
    tokenizer = diffusers_files.load(diffused[0] / "export").tokenizer
    assert tokenizer is not None
    short, long = "a photo of a sneaker", "a photo of a sneaker " + "on a shelf " * 9
    rows = prompts.encode(tokenizer, [short, long], 12, "prompts")
    assert "prompts: 1 prompt(s) cut at 10 tokens" in capsys.readouterr().err
    whole = tokenizer.encode(long)
    assert rows.tokens[1].tolist() == [tokenizer.bos_id, *whole[:10], tokenizer.eos_id]
    assert rows.tokens[0].tolist()[6:] == [tokenizer.eos_id] + [tokenizer.pad_id] * 5
    prompts.encode(tokenizer, [short], 12, "prompts")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="stands at token 33, the model reads 10; shorten it"):
        prompts.encode(tokenizer, [f"{long} {PLACEHOLDER}"], 12)


def test_tokens_of_another_vocabulary_are_refused(program, erased, attacked, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(attacked, other)
    told = json.loads((other / "attack.json").read_text())
    told["vocabulary_sha256"] = "0" * 64
    (other / "attack.json").write_text(json.dumps(told))
    damaged = program("train.defend", erased, other, "--output", tmp_path / "run")
    assert damaged.code == 2 and "attack.json is not what the run wrote" in damaged.err
    (other / "attack.key").unlink()
    found = program("train.defend", erased, other, "--output", tmp_path / "run")
    assert found.code == 2 and "of another vocabulary" in found.err
    given = ("--attack", "given", "--attack.source", other, "--output", tmp_path / "run")
    found = program("train.attack", erased, *given)
    assert found.code == 2 and "of another vocabulary" in found.err


def test_tokens_for_other_embeddings_are_refused(program, erased, attacked, tmp_path, monkeypatch):
    """Models of two seeds have one vocabulary, and other embeddings."""
    other = tmp_path / "other"
    shutil.copytree(attacked, other)
    told = json.loads((other / "attack.json").read_text())
    assert len(told["embeddings_sha256"]) == 64
    told["embeddings_sha256"] = "0" * 64
    (other / "attack.json").write_text(json.dumps(told))
    (other / "attack.key").unlink()
    output = ("--output", tmp_path / "run")
    lines = [("defend", erased, other, *output)]
    lines += [("attack", erased, "--attack", "given", "--attack.source", other, *output)]
    for name, *argv in lines:
        found = program(f"train.{name}", *argv)
        assert found.code == 2 and "with other embeddings" in found.err
    monkeypatch.setattr(attacking, "embeddings_sha", lambda original: "0" * 64)
    given = ("--attack", "none", "--attack.transfer", erased)
    found = program("train.attack", erased, *given, *output)
    assert found.code == 2 and "with other embeddings" in found.err
    assert not (tmp_path / "run").exists()


def test_embeddings_are_known_in_any_precision(diffused):
    mesh = make_mesh(MeshConfig(data=1))
    painter = painters.given(
        diffused[0] / "export", read_arguments("train.diffuse", ["fashion"]), mesh
    )
    known = attack_files.embeddings_sha(painter)
    for dtype, same in (("bfloat16", True), ("float32", True), (None, False)):
        table = np.asarray(painter.params["text_encoder"]["embed"]["embedding"])
        table = table + 0.01 if dtype is None else jax.numpy.asarray(table, dtype)
        params = {"text_encoder": {"embed": {"embedding": table}}}
        changed = painter._replace(denoiser=painter.denoiser._replace(params=params))
        assert (attack_files.embeddings_sha(changed) == known) is same


def test_a_run_without_an_original_is_refused(program, erased, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(erased, other)
    shutil.rmtree(other / "original")
    found = program("train.attack", other, "--attack", "none", "--output", tmp_path / "run")
    assert found.code == 2 and "has no original" in found.err
    assert not (tmp_path / "run").exists()


# Command lines


def test_commands_read_as_configurations(diffused, erased):
    one = read_arguments("train.diffuse", ["fashion", "--original.steps", "20"])
    assert one.original.steps == 20 and one.data.source == "fashion"
    two = read_arguments(
        "train.erase", [str(diffused[0]), "--erase.method", "esd", "--erase.guidance", "2"]
    )
    tuned: dict[str, Any] = {
        name: read_arguments("train.erase", [name]).erase for name in ("fashion", "sd14")
    }
    assert (tuned["fashion"].positions, tuned["sd14"].positions) == ("onward", "last")
    erase: Any = two.erase
    assert (erase.name, erase.guidance, two.run) == ("esd", 2.0, diffused[0])
    assert two.smoke and two.unlearn.steps == 4
    attack: Any = read_arguments(
        "train.attack", [str(erased), "--attack", "cce", "--attack.steps", "7"]
    ).attack
    assert (attack.name, attack.steps, attack.tokens) == ("cce", 7, 2)


def test_a_report_tells_how_to_repeat_a_run(erased, attacked, defended):
    for output, program in ((erased, "erase"), (attacked, "attack"), (defended, "defend")):
        config = json.loads((output / "config.json").read_text())
        argv = ["--config", str(output / "config.json")]
        again = read_arguments(f"train.{program}", argv)
        assert identity(again) == config
        command = json.loads((output / "run.json").read_text())["command"]
        assert command.startswith(f"python -m train.{program} "), command


# A run that was stopped


def stopping(patch, stage, step):
    """Let Ctrl-C come at a step of a stage; until then every step is stored."""
    real = Tracker.write

    def write(self, name, at, scalars):
        if (name, at) == (stage, step):
            raise KeyboardInterrupt
        real(self, name, at, scalars)

    patch.setattr(Tracker, "write", write)
    clock = SimpleNamespace(monotonic=itertools.count(step=1000).__next__)
    patch.setattr("train.engine.loop.time", clock)


def test_a_run_that_was_stopped_in_every_stage_ends_with_the_same_models(
    program, diffused, tmp_path, monkeypatch
):
    output, start = tmp_path / "run", ("fashion", "--smoke", *ONE)
    stages = {"classifier": 7, "vae": 3, "original": 5}
    argv = [*start, "--output", output]
    for stage, step in stages.items():
        with monkeypatch.context() as patch:
            stopping(patch, stage, step)
            found = program("train.diffuse", *argv)
        assert found.code == 130 and not (output / "summary.json").exists(), found.err
    found = done(program, "diffuse", *argv)
    assert f"original: continuing at step {stages['original']} of 8" in found.err
    assert summary_of(output) == summary_of(diffused[0])
    assert log_of(output, "original") == log_of(diffused[0], "original")


def test_an_attack_that_was_stopped_ends_with_the_same_tokens(
    program, erased, attacked, tmp_path, monkeypatch
):
    argv = (erased, "--attack", "subattack", "--output", tmp_path / "run")
    lines = [json.loads(x) for x in (attacked / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]  # of the second token
    with monkeypatch.context() as patch:
        stopping(patch, last["stage"], last["step"])
        assert program("train.attack", *argv).code == 130
    done(program, "attack", *argv)
    for name in ("tokens.safetensors", "attack.json"):
        assert (tmp_path / "run" / name).read_bytes() == (attacked / name).read_bytes()
    assert summary_of(tmp_path / "run") == summary_of(attacked)
