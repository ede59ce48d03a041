"""Folders of diffusers: in and out bit for bit, onto a mesh, overlays, and what cannot be read."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlib_unlearn.errors import UserError
from models.diffusion.clip_text import ClipTextConfig
from models.diffusion.schedulers import Schedule
from models.diffusion.unet import RULES, UNetConfig
from models.diffusion.vae import VAEConfig
from models.files import clip_tokenizer, diffusers_files
from models.files.diffusers_configs import unet_config, unet_json, vae_config, vae_json
from models.files.diffusers_files import Pipeline
from models.files.diffusers_parts import PARTS
from models.files.weights import flatten
from models.layout import path_str, spec_of
from train.runtime.sharding import MeshConfig, make_mesh

CONFIGS = {
    "text_encoder": ClipTextConfig(516, 8, 16, num_layers=2, num_heads=2),
    "unet": UNetConfig(4, 4, 4, (8, 16), (True, False), 1, 2, 8, 4),
    "vae": VAEConfig(8, 3, 3, 4, (8, 8), 1, 4, 0.5),
}
WEIGHTS = {name: f"{name}/{part.stem}.safetensors" for name, part in PARTS.items()}
ATTENTION = "decoder.mid_block.attentions.0"
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def pipeline():
    draw = np.random.default_rng(0)

    def one(leaf):
        return jax.numpy.asarray(draw.standard_normal(leaf.shape), jax.numpy.float32)

    params = {
        name: jax.tree.map(one, part.model(CONFIGS[name]).shapes()) for name, part in PARTS.items()
    }
    tokenizer = clip_tokenizer.of_merges([("c", "a"), ("ca", "t</w>")])
    return Pipeline(CONFIGS, params, Schedule(), tokenizer)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    return diffusers_files.export(pipeline, tmp_path_factory.mktemp("diffusion") / "model")


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(exported, tmp_path / "model")


def same(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def rewrite(path, change):
    """A safetensors file changed in place."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def configure(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | changes))


def test_an_export_is_the_same_to_the_last_bit(exported, pipeline):
    found = diffusers_files.load(exported)
    assert found.configs == CONFIGS and found.scheduler == Schedule()
    assert found.tokenizer is not None and pipeline.tokenizer is not None
    assert found.tokenizer.encode("a cat") == pipeline.tokenizer.encode("a cat")
    same(found.params, pipeline.params)
    names = sorted(str(path.relative_to(exported)) for path in exported.rglob("*.json"))
    assert names == sorted(
        ["model_index.json", "scheduler/scheduler_config.json"]
        + [f"{name}/config.json" for name in PARTS]
        + [f"tokenizer/{n}" for n in ("vocab.json", *clip_tokenizer.SPECIAL)]
    )
    assert (exported / "unet").stat().st_mode & 0o555 == 0o555
    raw = json.loads((exported / "text_encoder" / "config.json").read_text())
    tokens = json.loads((exported / "tokenizer" / "vocab.json").read_text())
    ends = {"bos_token_id": "<|startoftext|>", "eos_token_id": "<|endoftext|>"}
    assert {key: raw[key] for key in ends} == {key: tokens[word] for key, word in ends.items()}
    assert raw["pad_token_id"] == raw["eos_token_id"]


def test_names_and_layout_in_files(exported, pipeline):
    tensors = load_file(exported / WEIGHTS["unet"])
    block = pipeline.params["unet"]["down_blocks_0"]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    kernel = block["attentions_0"]["transformer_blocks_0"]["attn2"]["to_out_0"]["kernel"]
    np.testing.assert_array_equal(tensors[name], kernel.T)
    kernel = np.asarray(block["resnets_0"]["conv1"]["kernel"])
    for row, column in ((0, 2), (1, 0)):
        np.testing.assert_array_equal(
            tensors["down_blocks.0.resnets.0.conv1.weight"][:, :, row, column],
            kernel[row, column].T,
        )
    assert {
        "time_embedding.linear_1.weight",
        "down_blocks.0.downsamplers.0.conv.bias",
        "up_blocks.0.upsamplers.0.conv.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.bias",
        "mid_block.attentions.0.proj_in.weight",
        "up_blocks.1.resnets.1.conv_shortcut.weight",
    } <= tensors.keys()
    assert f"{ATTENTION}.to_out.0.weight" in load_file(exported / WEIGHTS["vae"])


def older(squeezed):
    def change(tensors):
        for name in list(tensors):
            for new, old in OLDER.items():
                if f".attentions.0.{new}." in name:
                    value = tensors.pop(name)
                    if squeezed and value.ndim == 2:
                        value = value[:, :, None, None]
                    tensors[name.replace(f".{new}.", f".{old}.")] = value

    return change


@pytest.mark.parametrize("squeezed", [False, True])
def test_older_names_of_the_autoencoder(folder, pipeline, squeezed):
    rewrite(folder / WEIGHTS["vae"], older(squeezed))
    assert f"{ATTENTION}.proj_attn.weight" in load_file(folder / WEIGHTS["vae"])
    same(diffusers_files.load(folder, parts=["vae"]).params["vae"], pipeline.params["vae"])


def test_both_names_of_a_tensor_are_one_too_many(folder):
    def change(tensors):
        tensors[f"{ATTENTION}.query.weight"] = tensors[f"{ATTENTION}.to_q.weight"]

    rewrite(folder / WEIGHTS["vae"], change)
    with pytest.raises(UserError, match=rf"unknown: {ATTENTION}.query.weight; use"):
        diffusers_files.load(folder)


def test_text_encoders_without_the_prefix_or_with_a_buffer(folder, pipeline):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(77)[None]

    rewrite(folder / WEIGHTS["text_encoder"], change)
    same(diffusers_files.load(folder).params, pipeline.params)


def test_a_folder_of_the_time_of_v1_4(folder):
    """Its `config.json` files leave out what was added later."""
    for name in ("unet", "vae"):
        path = folder / name / "config.json"
        raw = json.loads(path.read_text())
        kept = {"_class_name", "in_channels", "out_channels", "latent_channels", "act_fn"}
        kept |= {"block_out_channels", "down_block_types", "up_block_types", "sample_size"}
        kept |= {"layers_per_block", "cross_attention_dim", "attention_head_dim"}
        kept |= {"norm_num_groups"}  # 32 would not divide these channels
        kept |= {"_new_key"}
        raw["_new_key"] = [1, 2]
        path.write_text(json.dumps({key: raw[key] for key in raw if key in kept}))
    found = diffusers_files.load(folder, parts=["unet", "vae"])
    want = dict(CONFIGS, vae=dataclasses.replace(CONFIGS["vae"], scaling_factor=0.18215))
    assert found.configs == {name: want[name] for name in ("unet", "vae")}
    assert found.tokenizer is None


def test_configurations_there_and_back():
    for change in (
        {},
        {"channels": (64, 128), "attends": (True, False), "layers_per_block": 1},
        {"channels": (32, 64, 128, 128), "cross_attention_dim": 24, "sample_size": 16},
    ):
        config = dataclasses.replace(UNetConfig(), **change)
        assert unet_config(json.loads(json.dumps(unet_json(config))), "config.json") == config
    for change in ({}, {"channels": (16, 32, 32), "norm_groups": 16, "in_channels": 1}):
        config = dataclasses.replace(VAEConfig(), **change)
        assert vae_config(json.loads(json.dumps(vae_json(config))), "config.json") == config


def test_half_precision_files(pipeline, tmp_path):
    folder = diffusers_files.export(pipeline, tmp_path / "half", dtype="float16")
    for name in PARTS:
        path = folder / WEIGHTS[name]
        path.rename(path.with_name(f"{PARTS[name].stem}.fp16.safetensors"))
    found = diffusers_files.load(folder, dtype="bfloat16", parts=["unet"])
    assert found.configs["unet"].dtype == "bfloat16"
    want = pipeline.params["unet"]["conv_in"]["kernel"]
    kernel = found.params["unet"]["conv_in"]["kernel"]
    assert kernel.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(kernel, want.astype("float16").astype("bfloat16"))
    assert diffusers_files.load(folder, variant="fp16", parts=["vae"]).params["vae"]
    with pytest.raises(UserError, match="neither diffusion_pytorch_model.safetensors nor"):
        diffusers_files.load(folder, variant="", parts=["vae"])


def test_shards_onto_a_mesh(folder, pipeline):
    """Files in two shards; each leaf lies as its rule says, and holds the same numbers."""
    tensors = load_file(folder / WEIGHTS["unet"])
    stem, names = PARTS["unet"].stem, sorted(tensors)
    parts = {f"{stem}-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / "unet" / file)
    (folder / WEIGHTS["unet"]).unlink()
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())

    def shardings(path, shape):
        assert path.startswith("unet/")
        return jax.sharding.NamedSharding(mesh, spec_of(path, shape, mesh, RULES))

    found = diffusers_files.load(folder, parts=["unet"], shardings=shardings).params["unet"]
    same(found, pipeline.params["unet"])
    kernel = found["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 4, 8)}
    # What is laid over it lies as it does.
    pipeline = dataclasses.replace(pipeline, params={"unet": found})
    again = diffusers_files.overlay(pipeline, folder / "unet").params["unet"]
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, again, found))
    same(again, found)


def test_part_of_a_denoiser_over_another(pipeline, exported, tmp_path):
    """As ESD and UCE publish what they changed."""
    tensors = load_file(exported / WEIGHTS["unet"])
    changed = {name: x + 1 for name, x in tensors.items() if "attn2.to_" in name}
    path = tmp_path / "esd.safetensors"
    save_file(changed, path)
    found = diffusers_files.overlay(pipeline, path)
    base = flatten(pipeline.params["unet"])
    for name, leaf in flatten(found.params["unet"]).items():
        if "attn2/to_" in name:
            np.testing.assert_array_equal(leaf, base[name] + 1)
        else:
            assert leaf is base[name]
    assert found.params["vae"] is pipeline.params["vae"]
    assert jax.tree.structure(found.params) == jax.tree.structure(pipeline.params)
    # A folder with the whole of it, and a part that is stacked.
    same(diffusers_files.overlay(found, exported / "unet").params, pipeline.params)
    whole = diffusers_files.overlay(found, exported / WEIGHTS["text_encoder"], "text_encoder")
    same(whole.params["text_encoder"], pipeline.params["text_encoder"])


def test_overlays_that_do_not_fit(pipeline, exported, tmp_path):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    for tensors, words in (
        ({name: np.zeros((16, 9), np.float32)}, rf"wrong shape: {name} \(16, 9\) instead of"),
        ({"lora.down": np.zeros(3, np.float32)}, "unknown: lora.down"),
        ({}, "holds no tensors"),
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=words):
            diffusers_files.overlay(pipeline, tmp_path / "a.safetensors")
    for path, words in (
        ("esd.pt", r"\.bin, \.pt and \.ckpt files are pickled"),
        ("none.safetensors", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            diffusers_files.overlay(pipeline, tmp_path / path)


def spoil(name, folder):
    """A folder that cannot be read."""
    unet, vae = folder / "unet" / "config.json", folder / "vae" / "config.json"
    index, weights = folder / "model_index.json", folder / WEIGHTS["unet"]
    if name == "bin":
        weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    elif name == "text bin":
        path = folder / WEIGHTS["text_encoder"]
        path.rename(path.with_name("pytorch_model.bin"))
    elif name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(folder / name)
    elif name == "vae config":
        vae.unlink()
    elif name == "index":
        index.unlink()
    elif name == "pipeline":
        configure(index, _class_name="StableDiffusionXLPipeline")
    elif name == "part":
        configure(index, unet=["diffusers", "UNet3DConditionModel"])
    elif name == "class":
        configure(unet, _class_name="AutoencoderKL")
    elif name == "context":
        configure(unet, cross_attention_dim=24)
    elif name == "latents":
        configure(vae, latent_channels=8)
    elif name == "layers":
        configure(unet, layers_per_block=2)
    elif name == "vocabulary":
        configure(folder / "text_encoder" / "config.json", vocab_size=500)
    elif name == "sampler":
        configure(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    elif name == "linear":
        configure(unet, use_linear_projection=True)
    elif name == "levels":
        configure(unet, block_out_channels=[8, 16, 16])
    elif name == "blocks":
        configure(unet, up_block_types=["UpBlock2D", "UpBlock2D"])
    elif name == "kinds":
        configure(vae, down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"])
    elif name == "groups":
        configure(unet, norm_num_groups=3)
    elif name == "heads":
        configure(unet, attention_head_dim=[5, 10])
    elif name == "square":
        configure(unet, sample_size=[64, 32])
    elif name == "typo":
        raw = json.loads(vae.read_text())
        raw["scaling_facto"] = raw.pop("scaling_factor")
        vae.write_text(json.dumps(raw))
    elif name == "tensors":

        def change(tensors):
            tensors["conv_in.weight"] = np.zeros((8, 5, 3, 3), np.float32)
            tensors["conv_odd.bias"] = tensors.pop("conv_out.bias")

        rewrite(weights, change)
    elif name == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif name == "nan":
        rewrite(weights, lambda tensors: tensors["conv_out.bias"].fill(np.nan))
    else:
        raise KeyError(name)


SPOILT = {
    "bin": r"neither diffusion_pytorch_model.safetensors nor .* \(pickled .bin weights are never "
    r"read\); save the model as safetensors",
    "text bin": r"neither model.safetensors nor .* \(pickled .bin weights are never read\)",
    "unet": "no folder unet in it",
    "text_encoder": "no folder text_encoder in it",
    "tokenizer": "no folder tokenizer in it",
    "scheduler": "no folder scheduler in it",
    "vae config": "no config.json in it",
    "index": "no model_index.json in it",
    "pipeline": "'StableDiffusionXLPipeline' is not supported",
    "part": r"unet is \['diffusers', 'UNet3DConditionModel'\], and",
    "class": "_class_name 'AutoencoderKL' is no UNet2DConditionModel",
    "context": "unet/config.json says cross_attention_dim 24, text_encoder/config.json hidden",
    "latents": "unet/config.json says in_channels 4, vae/config.json latent_channels 8",
    "layers": "unet: the tensors do not fit a unet model; missing: down_blocks.0.att.*; wrong sha",
    "vocabulary": "tokenizer has token id 515, text_encoder/config.json says vocab_size 500",
    "sampler": "prediction_type is 'v_prediction', and 'epsilon' alone is supported",
    "linear": "use_linear_projection is True, and only False is supported",
    "levels": "2 down_block_types, 2 up_block_types and 3 block_out_channels",
    "blocks": "levels attend on the way down or up alone",
    "kinds": "AttnDownEncoderBlock2D.*; a list of DownEncoderBlock2D is read",
    "groups": r"does not read \(3 does not divide 8 channels\)",
    "heads": r"attention_head_dim is \[5, 10\], not a positive int",
    "square": "is no square",
    "typo": "'scaling_facto' is unknown, and 'scaling_factor' is absent",
    "tensors": r"missing: conv_out.bias; wrong shape: conv_in.weight \(8, 5, 3, 3\) instead of "
    r"\(8, 4, 3, 3\); unknown: conv_odd.bias; use",
    "cut": "cannot be read, truncated or damaged",
    "nan": r"conv_out.bias has 4 weight\(s\) that are NaN or infinite",
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_read(name, folder):
    spoil(name, folder)
    with pytest.raises(UserError, match=SPOILT[name]) as caught:
        diffusers_files.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_no_folder(tmp_path, pipeline):
    (tmp_path / "v1.ckpt").write_bytes(b"")
    for path, words in (("none", "no such folder"), ("v1.ckpt", "a file, not a folder with")):
        with pytest.raises(UserError, match=words):
            diffusers_files.load(tmp_path / path)
    for call in (
        lambda: diffusers_files.load(tmp_path, dtype="float64"),
        lambda: diffusers_files.export(pipeline, tmp_path / "a", dtype="int8"),
    ):
        with pytest.raises(UserError, match="dtype '.*' (is not supported|cannot be exported)"):
            call()


def test_only_an_earlier_export_is_replaced(pipeline, folder):
    odd = dataclasses.replace(pipeline, configs=dict(CONFIGS, unet=UNetConfig()))
    with pytest.raises(UserError, match="says cross_attention_dim 768"):
        diffusers_files.export(odd, folder)
    diffusers_files.export(pipeline, folder, card=lambda at: "hi")
    assert (folder / "README.md").read_text() == "hi"
    more = dict(pipeline.params, vae=pipeline.params["vae"] | {"lora": {"kernel": np.zeros(1)}})
    with pytest.raises(UserError, match="parameters lora/kernel have no name"):
        diffusers_files.export(dataclasses.replace(pipeline, params=more), folder)
    same(diffusers_files.load(folder).params, pipeline.params)  # the earlier one is still there
    (folder / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no earlier export \(notes.txt\)"):
        diffusers_files.export(pipeline, folder)
    (folder / "unet" / "notes.txt").unlink()
    configure(folder / "model_index.json", _exporter="me")
    with pytest.raises(UserError, match="no earlier export"):
        diffusers_files.export(pipeline, folder)


def test_every_leaf_has_a_name_of_its_own():
    for name, part in PARTS.items():
        config = CONFIGS[name]
        slots = part.table(config).slots
        assert {slot.path for slot in slots} == part.shapes(config).keys()
        assert len({slot.hf for slot in slots}) == len(slots)
        leaves = jax.tree_util.tree_leaves_with_path(part.model(config).shapes())
        assert {path_str(path) for path, _ in leaves} == part.shapes(config).keys()
