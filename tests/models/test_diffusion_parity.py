"""Stable Diffusion's networks: equality with diffusers on tiny random models, both directions."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.diffusion.schedulers import Schedule
from models.diffusion.unet import UNet
from models.diffusion.vae import VAE
from models.files import clip_tokenizer, diffusers_files
from models.files.diffusers_configs import unet_config, vae_config
from models.files.diffusers_files import Pipeline
from models.files.diffusers_parts import PARTS

pytestmark = [
    pytest.mark.torch_parity,
    # diffusers and what it imports, none of it ours.
    pytest.mark.filterwarnings("ignore"),
]

LIMITS = {"float32": 1e-4, "float64": 1e-9}


def beside(name):
    """A module in this folder that is no test."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = beside("diffusion_golden")


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers", reason="diffusers is not installed (diffusion-parity)")


@pytest.fixture(scope="module")
def theirs(diffusers):
    return GOLDEN.made()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """As diffusers writes it, with a text encoder of ours."""
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer = clip_tokenizer.of_merges([("c", "a"), ("ca", "t</w>")])
    config = ClipTextConfig(516, 24, 32, num_layers=3, num_heads=4)
    text = ClipText(config).init(jax.random.key(0))
    ours = Pipeline({"text_encoder": config}, {"text_encoder": text}, Schedule(), tokenizer)
    diffusers_files.export(ours, folder)
    for name, model in zip(("unet", "vae"), theirs, strict=True):
        model.float().save_pretrained(folder / name)
    path = folder / "model_index.json"
    parts = {name: [part.library, part.kind] for name, part in PARTS.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return diffusers_files.load(folder)


@pytest.mark.parametrize("dtype", LIMITS)
def test_outputs(theirs, loaded, dtype):
    want, given = GOLDEN.outputs(*theirs, dtype), GOLDEN.inputs()
    unet, vae = (dataclasses.replace(loaded.configs[name], dtype=dtype) for name in ("unet", "vae"))
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), dict(loaded.params))
        given = {name: jnp.asarray(x, dtype) for name, x in given.items()}
        found = {
            "noise": jax.jit(UNet(unet).apply)(
                params["unet"], given["latents"], given["times"], given["context"]
            ),
            "decoded": jax.jit(VAE(vae).decode)(params["vae"], given["coded"]),
        }
        found["mean"], found["logvar"] = jax.jit(VAE(vae).encode)(params["vae"], given["images"])
    for name, ours in found.items():
        assert ours.dtype == dtype and np.abs(want[name]).max() > 0.5
        error = np.abs(np.asarray(ours) - want[name]).max() / np.abs(want[name]).max()
        assert error <= LIMITS[dtype], (name, error)


def test_the_kept_outputs_are_these(theirs):
    kept = load_file(GOLDEN.FILE)
    for name, want in GOLDEN.outputs(*theirs, "float64").items():
        np.testing.assert_allclose(kept[name], want, rtol=1e-9, atol=1e-11)


def described(model):
    """Its configuration but for where it is from."""
    found = json.loads(model.to_json_string())
    return {key: value for key, value in found.items() if not key.startswith("_")}


def test_an_exported_folder_loads_in_diffusers(diffusers, theirs, loaded, tmp_path):
    import transformers

    folder = diffusers_files.export(loaded, tmp_path / "ours")
    for name, model in zip(("UNet2DConditionModel", "AutoencoderKL"), theirs, strict=True):
        part = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}[name]
        again, report = getattr(diffusers, name).from_pretrained(
            folder, subfolder=part, output_loading_info=True
        )
        assert not any(report.values()), report
        want = model.float().state_dict()
        assert all((value == want[key]).all() for key, value in again.state_dict().items())
        assert described(again) == described(model)
    _, report = transformers.CLIPTextModel.from_pretrained(
        folder / "text_encoder", output_loading_info=True
    )
    assert not any(report.values()), report
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.safety_checker is None
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=77).input_ids
    assert ids == clip_tokenizer.encode(loaded.tokenizer, ["a cat"]).ids[0].tolist()


def test_keys_left_out_mean_what_they_mean_in_diffusers(diffusers):
    for kind, given, read in (
        ("UNet2DConditionModel", GOLDEN.UNET, unet_config),
        ("AutoencoderKL", GOLDEN.VAE, vae_config),
    ):
        whole = json.loads(getattr(diffusers, kind)(**given).to_json_string())
        needed = (
            *("_class_name", "block_out_channels", "down_block_types", "up_block_types"),
            *("in_channels", "out_channels", "layers_per_block", "latent_channels"),
            *("cross_attention_dim", "attention_head_dim", "sample_size"),
        )
        short = {key: whole[key] for key in needed if key in whole}
        assert read(whole, "config.json") == read(short, "config.json")
