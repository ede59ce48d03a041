"""Vision transformers: equality with transformers on tiny random models, both directions."""

import json

import numpy as np
import pytest

from models.files import vit_files
from models.vision.vit import ViT

pytestmark = pytest.mark.torch_parity

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_labels": 5,
}
CASES = {
    "colour": {"image_size": 12, "patch_size": 4, "num_channels": 3},
    "grey": {"image_size": 8, "patch_size": 2, "num_channels": 1, "layer_norm_eps": 1e-6},
    "no-bias": {"image_size": 8, "patch_size": 4, "qkv_bias": False, "hidden_act": "gelu_new"},
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=CASES)
def theirs(request, transformers):
    import torch

    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, **CASES[request.param])
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Larger than the usual 0.02, norms and biases too: every term must matter.
            value.copy_(0.3 * torch.randn(value.shape) + ("norm" in name and "weight" in name))
    return model.eval()


def pixels(config, count=3):
    """Normalised images, ours and theirs."""
    shape = count, config.image_size, config.image_size, config.num_channels
    ours = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return ours, ours.transpose(0, 3, 1, 2).copy()


def torch_logits(model, images):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(images)).logits.numpy()


def close(found, want):
    assert np.abs(want).max() > 0.5
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    loaded = vit_files.load(tmp_path)
    images, others = pixels(theirs.config)
    close(ViT(loaded.config).logits(loaded.params, images), torch_logits(theirs, others))
    assert loaded.names == tuple(f"LABEL_{i}" for i in range(5))


def test_an_exported_folder_loads_in_transformers(theirs, transformers, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = vit_files.load(tmp_path / "theirs")._replace(names=tuple("abcde"))
    folder = vit_files.export(loaded, tmp_path / "ours")
    model, report = transformers.ViTForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.id2label == dict(enumerate("abcde"))
    want = theirs.state_dict()
    assert all((value == want[name]).all() for name, value in model.state_dict().items())


def test_a_headless_folder_gets_a_head_of_zeros(theirs, tmp_path):
    theirs.vit.save_pretrained(tmp_path)
    loaded = vit_files.load(tmp_path, ("cat", "dog"))
    images, _ = pixels(theirs.config)
    assert not np.any(ViT(loaded.config).logits(loaded.params, images))


def test_keys_left_out_mean_what_they_mean_in_transformers(transformers, tmp_path):
    theirs = json.loads(json.dumps(transformers.ViTConfig().to_dict()))
    assert vit_files.hf_config(theirs, tmp_path) == vit_files.hf_config(
        {"model_type": "vit"}, tmp_path
    )
