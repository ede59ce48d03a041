"""The files beside the weights of an export, and adapters in PEFT's format."""

import json
import os
import resource
import stat

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import models
from jaxlib_unlearn.errors import UserError
from models.decoder import lora
from models.decoder.model import Decoder, DecoderConfig
from models.files.export import RESULTS

CONFIG = DecoderConfig(61, 32, 48, 3, 4, 2, 8)


@pytest.fixture(scope="module")
def base():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0))


def words(**ids):
    return models.Tokenizer(
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])), **ids
    )


def trained(base, targets, rank=4):
    draw = np.random.default_rng(0)
    adapters = lora.init(base, rank, targets, 7)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), adapters)


@pytest.fixture
def umask():
    """The usual umask, whatever the tests run under."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_everybody_may_read_an_export(base, tmp_path, umask):
    folder = models.export(models.Loaded(CONFIG, base, words(eos_id=1)), tmp_path / "one")
    assert modes(folder) == {0o644} and stat.S_IMODE(folder.stat().st_mode) == 0o755
    options = {"rank": 4, "alpha": 8.0, "base": "x"}
    folder = models.export_adapter(trained(base, ["q"]), tmp_path / "two", **options)
    assert modes(folder) == {0o644}


@pytest.mark.parametrize(
    ("ids", "tokens", "expected"),
    [
        ({"eos_id": 1}, None, {"eos_token_id": 1, "pad_token_id": 1}),
        ({"bos_id": 0, "eos_id": 1}, 64, {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
                                          "max_new_tokens": 64}),
        ({}, 7, {"max_new_tokens": 7}),
    ],
)  # fmt: skip
def test_generation_config(ids, tokens, expected, base, tmp_path):
    loaded = models.Loaded(CONFIG, base, words(**ids))
    folder = models.export(loaded, tmp_path / "out", max_new_tokens=tokens)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"do_sample": False, **expected}


def test_the_card_sees_every_other_file_and_is_replaced_with_them(base, tmp_path):
    seen = []

    def card(folder):
        seen.append(sorted(path.name for path in folder.iterdir()))
        return f"card {len(seen)}"

    loaded = models.Loaded(CONFIG, base, words(eos_id=1).with_template("{{ messages }}"))
    for _ in range(2):
        folder = models.export(loaded, tmp_path / "out", card=card)
    assert (folder / "README.md").read_text() == "card 2"
    names = sorted(path.name for path in folder.iterdir())
    assert seen[0] == seen[1] == [name for name in names if name != "README.md"]
    assert {"generation_config.json", "chat_template.jinja"} < set(names)
    assert models.load(folder).tokenizer.chat_template == "{{ messages }}"
    models.export(loaded, tmp_path / "out")  # without a card none remains
    assert not (folder / "README.md").exists()


def test_results_lie_beside_the_card_and_are_replaced_with_it(base, tmp_path, umask):
    loaded, folder = models.Loaded(CONFIG, base, words(eos_id=1)), tmp_path / "out"
    for text in ("one", "two"):
        models.export(loaded, folder, results=text, card=lambda f: str((f / RESULTS).exists()))
        assert (folder / RESULTS).read_text() == text
    assert (folder / "README.md").read_text() == "True"
    assert modes((folder / RESULTS).parent) == {0o644}
    models.export(loaded, folder)  # without results none remain
    assert not (folder / RESULTS).parent.exists()


@pytest.mark.parametrize("name", ["other.yaml", "model.safetensors"])
@pytest.mark.parametrize("what", ["model", "adapter"])
def test_results_of_others_stay(base, tmp_path, what, name):
    folder = tmp_path / "out"

    def export():
        if what == "model":
            models.export(models.Loaded(CONFIG, base, words(eos_id=1)), folder)
        else:
            models.export_adapter(trained(base, ["q"]), folder, rank=4, alpha=4, base="x")

    export()
    theirs = (folder / RESULTS).with_name(name)
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with pytest.raises(UserError, match=r"no earlier export \(.eval_results/"):
        export()
    assert theirs.read_text() == "theirs"
    theirs.unlink()
    export()  # an empty folder holds nothing of theirs
    assert not (folder / RESULTS).parent.exists()


def test_adapters_have_the_names_and_layout_of_peft(base, tmp_path):
    adapters = trained(base, ["q", "down"])
    folder = models.export_adapter(
        adapters, tmp_path / "adapter", rank=4, alpha=2.0, base="owner/name", card="# It"
    )
    settings = json.loads((folder / "adapter_config.json").read_text())
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 2,
              "base_model_name_or_path": "owner/name", "target_modules": ["q_proj", "down_proj"],
              "fan_in_fan_out": False, "bias": "none"}  # fmt: skip
    assert wanted.items() <= settings.items() and (folder / "README.md").read_text() == "# It"
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for i in range(CONFIG.num_layers):
        for part, name, hf in (("attn", "q", "self_attn.q_proj"), ("mlp", "down", "mlp.down_proj")):
            pair = adapters["layers"][part][name]
            key = f"base_model.model.model.layers.{i}.{hf}"
            found[f"{key}.lora_A.weight"] = np.asarray(pair["lora_a"]["kernel"][i]).T
            found[f"{key}.lora_B.weight"] = np.asarray(pair["lora_b"]["kernel"][i]).T
    assert tensors.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_adapters_of_several_stacks_are_numbered_through(base, tmp_path):
    adapters = trained(base, ["q"])
    layers = adapters["layers"]
    cut = tuple(jax.tree.map(lambda x, s=s: x[s], layers) for s in (slice(0, 1), slice(1, None)))
    options = {"rank": 4, "alpha": 4, "base": "x"}
    one = models.export_adapter(adapters, tmp_path / "one", **options)
    two = models.export_adapter({"layers": cut}, tmp_path / "two", **options)
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


def test_adapters_replace_adapters_only(base, tmp_path):
    options = {"rank": 4, "alpha": 4, "base": "x"}
    folder = models.export_adapter(trained(base, ["q"]), tmp_path / "out", **options)
    models.export_adapter(trained(base, ["k"]), folder, **options)
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["k_proj"]
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    with pytest.raises(UserError, match="no earlier export"):
        models.export_adapter(trained(base, ["q"]), theirs, **options)
    model = models.export(models.Loaded(CONFIG, base, words(eos_id=1)), tmp_path / "model")
    with pytest.raises(UserError, match="no earlier export"):
        models.export_adapter(trained(base, ["q"]), model, **options)


@pytest.mark.parametrize("what", ["model", "adapter", "tokenizer"])
def test_a_full_disk_is_an_error_of_the_system(base, tmp_path, what):
    folder, tokenizer = tmp_path / "out", words(eos_id=1)
    folder.mkdir()
    write = {
        "model": lambda: models.export(models.Loaded(CONFIG, base, tokenizer), folder),
        "adapter": lambda: models.export_adapter(
            trained(base, ["q"]), folder, rank=4, alpha=8.0, base="x"
        ),
        "tokenizer": lambda: tokenizer.save(folder),
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write[what]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (folder / "config.json").exists() and not [*folder.glob("*.safetensors")]
