"""Weights in and out: every family round-trips bit for bit, any damage is one clear error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import models
from jaxlib_unlearn.errors import UserError
from models.decoder.layers import RopeScaling, rope_frequencies
from models.decoder.model import Decoder, DecoderConfig
from models.files.families import FAMILIES, from_hf, new_config, to_hf
from models.files.gguf_files import unpermute
from models.files.weights import DTYPES, flatten

BASE = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
CONFIGS = {
    "llama2": dataclasses.replace(BASE, num_kv_heads=4, tie_embeddings=False),
    "llama3": dataclasses.replace(
        BASE, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
    "linear": dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 2.0)),
    "llama-bias": dataclasses.replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(
        BASE, family="mistral", sliding_window=5, tie_embeddings=False, norm_eps=1e-6
    ),
    "mistral-full": dataclasses.replace(BASE, family="mistral", head_dim=12),
    "qwen2": dataclasses.replace(BASE, family="qwen2", qkv_bias=True),
    "qwen2-window": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, sliding_window=4),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True, head_dim=16),
    **{
        f"{family}{name}": new_config(
            family,
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_layers=3,
            num_heads=4,
            context=24,
            **changes,
        )
        for family in ("gpt2", "opt")
        for name, changes in {
            "": {},
            "-untied": {"tie_embeddings": False},
            "-activation": {"activation": "silu"},
        }.items()
    },
    "opt-no-bias": new_config(
        "opt", vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, context=8,
        qkv_bias=False, o_bias=False, mlp_bias=False,
    ),
}  # fmt: skip


def small_tokenizer(size: int = 40) -> models.Tokenizer:
    vocab = {f"w{i}": i for i in range(size - 1)} | {"<eos>": size - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    return models.Tokenizer(backend, "{{ messages[0].content }}", eos_id=size - 1)


def random_params(config: DecoderConfig, seed: int = 0, scale: float = 1.0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, Decoder(config).shapes())


def model(config: DecoderConfig = BASE, dtype: str = "float32") -> models.Loaded:
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    return models.Loaded(dataclasses.replace(config, dtype=dtype), params, small_tokenizer())


def assert_same(one, two):
    one, two = flatten(one), flatten(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        assert leaf.dtype == two[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(two[path]).tobytes(), path


def edit_json(path, **changes):
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path):
    return models.export(model(), tmp_path / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(name, tmp_path):
    loaded = model(CONFIGS[name])
    models.export(loaded, tmp_path / "model")
    back = models.load(tmp_path / "model")
    assert back.config == loaded.config
    assert_same(loaded.params, back.params)
    assert back.decoder == Decoder(loaded.config)
    assert back.tokenizer.encode("w3 w7 <eos>") == [3, 7, 39]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_in_each_dtype(dtype, tmp_path):
    loaded = model(dtype=dtype)
    models.export(loaded, tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["torch_dtype"] == raw["dtype"] == dtype
    back = models.load(tmp_path / "model", dtype=dtype)
    assert back.config.dtype == dtype
    assert_same(loaded.params, back.params)


def test_dtype_of_an_export_is_chosen_and_read_back_as_asked(tmp_path):
    loaded = model()
    models.export(loaded, tmp_path / "model", dtype="bfloat16")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    back = models.load(tmp_path / "model")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), loaded.params)
    assert_same(rounded, back.params)


def test_mixed_dtypes_export_in_the_widest(tmp_path):
    loaded = model(dtype="bfloat16")
    loaded.params["final_norm"]["scale"] = loaded.params["final_norm"]["scale"].astype(jnp.float32)
    models.export(loaded, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


def test_sharded_export_loads_and_lists_every_tensor(tmp_path):
    loaded = model(CONFIGS["llama2"])
    out = models.export(loaded, tmp_path / "model", shard_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(
        4 * leaf.size for leaf in jax.tree.leaves(loaded.params)
    )
    assert_same(loaded.params, models.load(out).params)


def test_several_stacks_export_as_one(tmp_path):
    loaded = model()
    stack = loaded.params["layers"]
    cut = (jax.tree.map(lambda x: x[:1], stack), jax.tree.map(lambda x: x[1:], stack))
    models.export(
        dataclasses.replace(loaded, params={**loaded.params, "layers": cut}), tmp_path / "model"
    )
    assert_same(loaded.params, models.load(tmp_path / "model").params)


def test_every_leaf_goes_where_it_is_told(folder):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def where(path, shape):
        last = ("a", "b") if len(shape) == 3 else ("b",)
        spec = jax.sharding.PartitionSpec(*(None,) * (len(shape) - len(last)), *last)
        return jax.sharding.NamedSharding(mesh, spec)

    back = models.load(folder, shardings=where)
    for path, leaf in flatten(back.params).items():
        assert leaf.sharding.is_equivalent_to(where(path, leaf.shape), leaf.ndim), path
    assert_same(model().params, back.params)


def test_loaded_model_runs(folder):
    loaded = models.load(folder)
    hidden, _ = loaded.forward(loaded.params, jnp.asarray([[1, 2, 3]]))
    assert loaded.unembed(loaded.params, hidden).shape == (1, 3, 40)


# What export refuses and replaces.


def test_export_replaces_its_own_folder_only(tmp_path, folder):
    other = dataclasses.replace(model(), params=random_params(BASE, seed=1))
    models.export(other, folder)
    assert_same(other.params, models.load(folder).params)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"no earlier export \(notes.md\)"):
        models.export(other, folder)
    assert (folder / "notes.md").read_text() == "mine"

    (folder / "notes.md").unlink()
    edit_json(folder / "config.json", exporter=...)
    with pytest.raises(UserError, match="no earlier export"):
        models.export(other, folder)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="a file is in the way"):
        models.export(other, file)
    (tmp_path / "empty").mkdir()
    models.export(other, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "model"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path, folder, monkeypatch):
    before = models.load(folder)

    def fail(self, folder):
        raise OSError("disk full")

    monkeypatch.setattr(models.Tokenizer, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        models.export(dataclasses.replace(model(), params=random_params(BASE, 1)), folder)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same(before.params, models.load(folder).params)


def test_export_refuses_what_a_family_cannot_say(tmp_path):
    odd = dataclasses.replace(BASE, sliding_window=8)
    with pytest.raises(UserError, match="'llama' has no way to write sliding_window=8"):
        models.export(model(odd), tmp_path / "model")
    with pytest.raises(UserError, match="'gpt9' is not supported; supported: llama, mistral"):
        to_hf(dataclasses.replace(BASE, family="gpt9"))
    with pytest.raises(UserError, match="dtype 'int8' cannot be exported"):
        models.export(model(), tmp_path / "model", dtype="int8")
    assert not any(tmp_path.iterdir())


# What load refuses.


def test_all_wrong_tensors_are_in_one_message(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 4), np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.int32)
        tensors["model.layers.0.block_sparse_moe.gate.weight"] = np.zeros(2, np.float32)

    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(UserError) as caught:
        models.load(folder)
    message = str(caught.value)
    for part in (
        "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight",
        "wrong shape: model.layers.0.self_attn.k_proj.weight (3, 4) instead of (16, 32)",
        "not one of F32/BF16/F16: model.layers.2.input_layernorm.weight (I32)",
        "unknown: model.layers.0.block_sparse_moe.gate.weight",
    ):
        assert part in message
    assert "\n" not in message


def test_a_tied_copy_is_accepted_and_a_differing_head_is_not(folder):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    edit_tensors(folder / "model.safetensors", copy)
    assert_same(model().params, models.load(folder).params)

    def differ(tensors):
        tensors["lm_head.weight"][0, 0] += 1

    edit_tensors(folder / "model.safetensors", differ)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        models.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_shard(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors: cannot be read, truncated or damaged"):
        models.load(folder)


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


WEIGHTS = "neither model.safetensors nor model.safetensors.index.json"
UNREADABLE = "config.json: not readable as JSON "
SPOILED = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in it"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in it"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), WEIGHTS),
    "pickled": (pickled, "pickled .bin weights are never read"),
    "large tokenizer": (
        lambda f: small_tokenizer(41).save(f), "token id 40, the model only 40 embeddings",
    ),
    "many wrong tensors": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=9), "and 46 more",
    ),
    "cut": (config_text('{"model_type": '), UNREADABLE),
    "a list": (config_text("[]"), "holds a JSON list"),
    "digits": (
        config_text('{"vocab_size": ' + "9" * 5000 + "}"), UNREADABLE + ".*integer of 5000 digits",
    ),
    "brackets": (config_text('{"a": ' + "[" * 99999), UNREADABLE + ".*nested too deeply"),
    "twice": (
        config_text('{"model_type": "llama", "model_type": "llama"}'), UNREADABLE + ".*stands twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder(folder, name):
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        models.load(folder)


def test_missing_shard(tmp_path):
    out = models.export(model(), tmp_path / "model", shard_bytes=20_000)
    next(out.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="missing model-00002-of-"):
        models.load(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt9"},
            "'gpt9' is not supported; supported: llama, mistral, qwen2, ",
        ),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported; supported: default, linear, llama3",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "not one set of values for all blocks"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor is None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"vocab_size": ...}, "vocab_size is None"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
            | {"sliding_window": 4},
            "a sliding window in some blocks only",
        ),
    ],
)
def test_unsupported_config(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_both_styles_of_rope_give_one_config():
    config = CONFIGS["llama3"]
    raw = to_hf(config)
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    assert from_hf(new) == from_hf(old) == config


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 7}, 7),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 7}, None),
        ({"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}, None),
        (
            {"model_type": "qwen2", "sliding_window": 7, "use_sliding_window": True}
            | {"max_window_layers": 0},
            7,
        ),
        (
            {"model_type": "qwen3", "sliding_window": 7, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention"] * 3},
            7,
        ),
        ({"model_type": "llama", "sliding_window": 7}, None),
    ],
)
def test_sliding_window(changes, window):
    raw = {k: v for k, v in to_hf(BASE).items() if k != "sliding_window"}
    assert from_hf({**raw, **changes}).sliding_window == window


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "no such file or folder"),
        ("absent.gguf", "no such file or folder"),
        ("./absent/model", "no such file or folder"),
    ],
)
def test_no_such_path(source, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match=message):
        models.load(source)


def test_a_file_of_another_kind_and_an_odd_dtype(tmp_path, folder):
    with pytest.raises(UserError, match="neither a folder nor a .gguf file"):
        models.load(folder / "config.json")
    with pytest.raises(UserError, match="dtype 'int4' is not supported; use one of float32"):
        models.load(folder, dtype="int4")


def test_hub_ids_are_downloaded_and_failures_are_one_line(folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(model().params, models.load("someone/some-model").params)
    assert asked[0][0] == "someone/some-model"
    assert "*.bin" not in asked[0][1]["allow_patterns"]

    def fail(name, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="the Hub gave no such model .OSError: no route to host"):
        models.load("someone/some-model")


# GGUF files, written here with the gguf package.

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, config, params, kind="F32", arch="llama", **changes):
    """A GGUF file of the parameters; returns what its tensors hold after quantisation."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "vocab_size": config.vocab_size,
        **changes.pop("fields", {}),
    }
    for key, value in fields.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.norm_eps)
    for key, value in changes.pop("strings", {}).items():
        writer.add_string(f"{arch}.{key}", value)
    words = [chr(33 + i) for i in range(config.vocab_size - 2)] + ["#$", "<eos>"]
    writer.add_tokenizer_model(changes.pop("model", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["# $"])
    writer.add_eos_token_id(len(words) - 1)
    for name, value in changes.pop("tensors", {}).items():
        writer.add_tensor(name, value)
    assert not changes
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    quant = gguf.GGMLQuantizationType[kind]
    held = {}
    for slot in FAMILIES[arch if arch in FAMILIES else "llama"].table.slots:
        if slot.path not in flat:
            continue
        leaf = flat[slot.path]
        layered = slot.path.startswith("layers/")
        rows = []
        for i, row in enumerate(leaf if layered else [leaf]):
            row = np.ascontiguousarray(row.T if slot.transpose else row)
            heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(slot.path.split("/")[-2])
            if arch == "llama" and heads:
                row = permute(row, heads)
            if row.ndim == 2:
                data = gguf.quants.quantize(row, quant)
                writer.add_tensor(slot.gguf.format(i), data, raw_dtype=quant)
                row = gguf.quants.dequantize(data, quant).reshape(row.shape)
            else:
                writer.add_tensor(slot.gguf.format(i), row)
            row = unpermute(row, heads) if arch == "llama" and heads else row
            rows.append(row.T if slot.transpose else row)
        held[slot.path] = np.stack(rows) if layered else rows[0]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


GGUF_BASE = dataclasses.replace(BASE, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_kinds(kind, tmp_path):
    params = random_params(GGUF_BASE)
    held = write_gguf(tmp_path / "m.gguf", GGUF_BASE, params, kind)
    loaded = models.load(tmp_path / "m.gguf")
    assert loaded.config == dataclasses.replace(GGUF_BASE, max_position_embeddings=64)
    flat = flatten(loaded.params)
    assert flat.keys() == held.keys() == flatten(params).keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, held[path], err_msg=path)
        bound = {"F32": 0.0, "F16": 0.003, "BF16": 0.02, "Q8_0": 0.03}.get(kind, 0.6)
        np.testing.assert_allclose(leaf, flatten(params)[path], atol=bound, err_msg=path)
    assert loaded.tokenizer.encode("#$$<eos>") == [38, 3, 39] and loaded.tokenizer.eos_id == 39


@pytest.mark.parametrize("name", ["llama2", "llama-bias", "qwen2", "qwen3"])
def test_gguf_families(name, tmp_path):
    config = dataclasses.replace(CONFIGS[name], max_position_embeddings=64)
    params = random_params(config)
    write_gguf(tmp_path / "m.gguf", config, params, arch=config.family)
    loaded = models.load(tmp_path / "m.gguf")
    assert loaded.config == config
    assert_same(params, loaded.params)


def test_gguf_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(BASE, rope_theta=5e5, rope_scaling=scaling)
    plain = np.asarray(rope_frequencies(8, 5e5, None))
    factors = plain / np.asarray(rope_frequencies(8, 5e5, scaling))
    params = random_params(config)
    write_gguf(tmp_path / "m.gguf", config, params, tensors={"rope_freqs.weight": factors})
    assert models.load(tmp_path / "m.gguf").config.rope_scaling == scaling
    odd = factors * np.asarray([1, 2, 1, 1], np.float32)
    write_gguf(tmp_path / "odd.gguf", config, params, tensors={"rope_freqs.weight": odd})
    with pytest.raises(UserError, match="rope_freqs.weight is not Llama 3's scaling"):
        models.load(tmp_path / "odd.gguf")


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.01, 0.1, 0.2, 0.5, 0.99, 0.9999])
def test_truncated_gguf(part, tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, BASE, random_params(BASE))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match="truncated or damaged"):
        models.load(file)


def test_gguf_cut_anywhere_in_its_header_is_an_error(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, BASE, random_params(BASE))
    whole = file.read_bytes()
    for size in range(5, 1500, 37):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            models.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gemma2"}, "architecture 'gemma2' is not supported in GGUF files; supported: ll"),
        ({"kind": "Q5_0"}, r"not one of F32/F16/BF16/Q8_0/Q4_0/Q4_1: token_embd.weight \(Q5_0\)"),
        ({"model": "llama"}, "tokenizer 'llama' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; supported: default, gpt-2"),
        ({"strings": {"rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"fields": {"expert_count": 8}}, "mixtures of experts are not supported"),
        ({"fields": {"rope.dimension_count": 16}}, "rotary positions on 16 of 32"),
        ({"fields": {"block_count": 4}}, "missing: blk.3.attn_norm.weight"),
        ({"fields": {"embedding_length": 128}}, "wrong shape: token_embd.weight"),
        ({"fields": {"attention.head_count": 0}}, "llama.attention.head_count is 0"),
    ],
)
def test_unsupported_gguf(changes, message, tmp_path):
    write_gguf(tmp_path / "m.gguf", GGUF_BASE, random_params(GGUF_BASE), **changes)
    with pytest.raises(UserError, match=message) as caught:
        models.load(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "other", "refused"),
    [
        ("llama.rope.freq_base", "llama.rope.freq_bare", True),
        ("llama.vocab_size", "llama.vocab_Size", True),
        ("tokenizer.ggml.token_type", "tokenizer.ggml.token_typm", True),
        ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_token_hd", True),
        ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", False),  # another key
        ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_tooth_id", False),
    ],
)
def test_a_gguf_key_that_lost_a_letter_is_refused(key, other, refused, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, GGUF_BASE, random_params(GGUF_BASE))
    path.write_bytes(path.read_bytes().replace(key.encode(), other.encode()))
    raised = pytest.raises(UserError, match=f"'{other}' is unknown, and '{key}' is absent; down")
    with raised if refused else contextlib.nullcontext():
        models.load(path)


def test_unpermute_undoes_permute():
    rows = np.random.default_rng(0).standard_normal((24, 5))
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)


def test_gguf_export_loads_the_same(tmp_path):
    write_gguf(tmp_path / "m.gguf", GGUF_BASE, random_params(GGUF_BASE), "Q4_1")
    loaded = models.load(tmp_path / "m.gguf", dtype="bfloat16")
    back = models.load(models.export(loaded, tmp_path / "out"), dtype="bfloat16")
    assert back.config == loaded.config
    assert flatten(back.params)["embed/embedding"].dtype == ml_dtypes.bfloat16
    assert_same(loaded.params, back.params)


# Damage that does not change a shape.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(dtype, odd, tmp_path):
    out = models.export(model(dtype=dtype), tmp_path / "model")

    def spoil(tensors):
        value = tensors["model.layers.1.mlp.up_proj.weight"]
        value[3, 2] = value[0, 5] = odd

    edit_tensors(out / "model.safetensors", spoil)
    with pytest.raises(
        UserError, match=r"layers.1.mlp.up_proj.weight has 2 weight.s. that are NaN"
    ):
        models.load(out, dtype=dtype)


def test_weights_too_large_for_the_dtype_are_refused(folder):
    edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill(1e6))
    models.load(folder)
    with pytest.raises(UserError, match="norm.weight, read as float16, has 32 .* as float32 or bf"):
        models.load(folder, dtype="float16")


def test_half_floats_of_two_kinds_are_refused(tmp_path):
    out = models.export(model(dtype="bfloat16"), tmp_path / "model")
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data.replace(b'"BF16"', b'"F16" ', 1))
    with pytest.raises(UserError, match="some tensors are F16 and others BF16"):
        models.load(out)


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(data_offsets=[float(n) for n in e["data_offsets"]]), "no entry"),
        (lambda e: e.update(shape=[str(n) for n in e["shape"]]), "no entry"),
        (lambda e: e.update(data_offsets=[n + 4 for n in e["data_offsets"]]), "does not follow"),
        (lambda e: e.update(shape=[1] * 99), "no entry"),
        (lambda e: e.update(shape=[2**62, 2**62]), "its shape"),
        (lambda e: e.update(more=1), "no entry"),
    ],
)
def test_safetensors_headers(change, reason, folder):
    file = folder / "model.safetensors"
    header, rest = header_of(file.read_bytes())
    change(header["model.norm.weight"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(UserError, match=f"truncated or damaged .*{reason}"):
        models.load(folder)


def test_safetensors_headers_are_utf8_and_name_a_tensor_once(folder):
    file = folder / "model.safetensors"
    header, rest = header_of(file.read_bytes())
    once = json.dumps(header)
    twice = once[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"
    for text, reason in ((once.encode("utf-16"), "not UTF-8"), (twice.encode(), "stands twice")):
        file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        with pytest.raises(UserError, match=reason):
            models.load(folder)


@pytest.mark.parametrize(
    "shard",
    ["../model/model-00001-of-00002.safetensors", "/etc/passwd", "/dev/zero", "..", "", "x.bin", 7],
)
def test_a_shard_index_does_not_leave_its_folder(shard, tmp_path):
    out = models.export(model(), tmp_path / "model", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no name of a .safetensors file in the same folder"):
        models.load(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than the 10000"),
        ({"vocab_size": 10**30}, "vocab_size is 10+, more than the 2147483647"),
        ({"rms_norm_eps": 1e12}, "rms_norm_eps is 1000000000000.0, more than the 1 that is read"),
        (
            {"rope_parameters": {"rope_theta": 1e39}},
            "rope_theta is 1e.39, more than the 1e.15 that",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor"),
        ({"attention_bias": 1}, "attention_bias is 1, neither true nor false"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0"),
        ({"rope_scaling": 3}, "rope_scaling 3 is not one set"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        (
            {"rope_theta": ..., "rope_thetb": 5e5},
            "'rope_thetb' is unknown, and 'rope_theta' is abs",
        ),
        ({"model_type": "qwen2", "use_sliding_window": "yes", "sliding_window": 4}, "use_sliding"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "no list of 3 kinds"),
    ],
)
def test_config_values_that_cannot_be(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr("models.files.safetensors_files.read_rows", lambda *a: 1 / 0)
    monkeypatch.setattr("models.bounds.host_memory", lambda: 1000)
    with pytest.raises(UserError, match="its parameters take .* GiB, this host has .* GiB of mem"):
        models.load(folder)


def test_host_memory():
    from models.bounds import host_memory

    assert 2**28 < host_memory() < 2**50


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d, t: overwrite(d, t[1], -1, "<Q", 64), "the tensor before it ends at"),
        (lambda d, t: overwrite(d, t[1], -1, "<Q", 0), "the tensor before it ends at"),
        (lambda d, t: overwrite(d, t[-1], -1, "<Q", 2**40), "the tensor before it ends at"),
        (lambda d, t: overwrite(d, t[0], 3, "<Q", 2**62), "which cannot be"),
        (lambda d, t: overwrite(d, t[0], 4, "<I", 77), "77 is not a valid"),
        (lambda d, t: d + b"\0" * 64, "its tensors end at"),
        (lambda d, t: d[:8] + b"\xff" * 8 + d[16:], "it claims .* tensors"),
        (lambda d, t: d[:16] + (2**40).to_bytes(8, "little") + d[24:], "it claims .* keys"),
        (lambda d, t: d[:24] + (2**63).to_bytes(8, "little") + d[32:], "has 92.* bytes"),
        (lambda d, t: d[:4] + (3 << 24).to_bytes(4, "little") + d[8:], "big-endian"),
        (lambda d, t: d.replace(b"#", b"\xff", 1), "not UTF-8"),
    ],
)
def test_gguf_layout(damage, reason, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    write_gguf(file, BASE, random_params(BASE))
    tensors = gguf.GGUFReader(file).tensors
    models.load(file)
    file.write_bytes(damage(file.read_bytes(), tensors))
    with pytest.raises(UserError, match=f"not a whole GGUF file, truncated or damaged .*{reason}"):
        models.load(file)


def overwrite(data: bytes, tensor, part: int, form: str, value: int) -> bytes:
    """The file with another number in a field of a tensor's entry."""
    parts = tensor.field.parts
    at = tensor.field.offset + sum(p.nbytes for p in parts[: part % len(parts)])
    patch = struct.pack(form, value)
    return data[:at] + patch + data[at + len(patch) :]


@pytest.mark.parametrize(
    ("kind", "value"), [("F32", b"\0\0\xc0\x7f"), ("Q8_0", b"\0\x7c"), ("Q4_1", b"\0\x7e")]
)
def test_gguf_weights_that_are_no_numbers_are_refused(kind, value, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    write_gguf(file, GGUF_BASE, random_params(GGUF_BASE), kind)
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.tensor_type.name == kind)
    data = file.read_bytes()
    file.write_bytes(data[: tensor.data_offset] + value + data[tensor.data_offset + len(value) :])
    with pytest.raises(UserError, match="that are NaN or infinite"):
        models.load(file)


@pytest.mark.parametrize(
    ("key", "type_", "value", "message"),
    [
        ("llama.rope.freq_base", 6, struct.pack("<f", float("nan")), "rope.freq_base is nan"),
        ("llama.block_count", 4, struct.pack("<I", 2**31), "block_count is 2147483648, more than"),
        ("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 999), "eos_token_id is 999, none of"),
    ],
)
def test_gguf_values_that_cannot_be(key, type_, value, message, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    write_gguf(file, BASE, random_params(BASE))
    field = gguf.GGUFReader(file).fields[key]
    assert field.types[0] == type_
    at = field.offset + sum(part.nbytes for part in field.parts[:3])
    data = file.read_bytes()
    file.write_bytes(data[:at] + value + data[at + 4 :])
    with pytest.raises(UserError, match=message):
        models.load(file)
