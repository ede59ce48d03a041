"""CLIP's text encoder: against a float64 reference by the names of files, and transformers."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim.matrices import labels
from models.diffusion.clip_text import RULES, ClipText, ClipTextConfig
from models.files.clip_tensors import HF, hf_config, to_hf
from models.files.weights import DTYPES, filled, flatten, safetensors_of
from train.runtime.sharding import MeshConfig, make_mesh, param_shardings

VOCAB, WIDTH, MLP, LAYERS, HEADS, LENGTH = 99, 32, 48, 3, 4, 77
CONFIG = ClipTextConfig(VOCAB, WIDTH, MLP, LAYERS, HEADS)
ENCODER = ClipText(CONFIG)


def tensors():
    """Random ones, by their names in files."""
    draw = np.random.default_rng(0)
    shapes = flatten(ENCODER.shapes())
    found = {}
    for slot in HF.slots:
        shape = shapes[slot.path].shape
        for layer in range(LAYERS) if slot.layered else (None,):
            stored = slot.stored_shape(shape[1:] if slot.layered else shape)
            value = 0.3 * draw.standard_normal(stored) + slot.path.endswith("scale")
            found[slot.hf.format(layer)] = value.astype(np.float32)
    return found


def load(folder, encoder=ENCODER):
    """Parameters from a folder's safetensors, each tensor used once or on the list of unused."""

    def ignored(name):
        return re.search(HF.unused, name) is not None

    shapes, stored = flatten(encoder.shapes()), safetensors_of(folder)
    dtype = DTYPES["float32"]
    return filled(shapes, HF, stored, "hf", dtype, None, str(folder), "clip", ignored)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_file(tensors(), folder / "model.safetensors")
    return load(folder)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(encoder, params, ids):
    return encoder.apply(params, ids)


@functools.partial(jax.jit, static_argnums=0)
def apply_embeds(encoder, params, embeds):
    return encoder.apply_embeds(params, embeds)


def norm(t, name, x):
    x = x - x.mean(-1, keepdims=True)
    return (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]
    )


def linear(t, name, x):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def reference(t, row):
    """One row of ids in float64, query by query."""
    t = {name.removeprefix("text_model."): value.astype(np.float64) for name, value in t.items()}
    x = t["embeddings.token_embedding.weight"][row] + t["embeddings.position_embedding.weight"]
    size = WIDTH // HEADS
    for i in range(LAYERS):
        at = f"encoder.layers.{i}"
        y = norm(t, f"{at}.layer_norm1", x)
        q, k, v = (linear(t, f"{at}.self_attn.{name}_proj", y) for name in "qkv")
        out = np.zeros_like(x)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for n in range(len(row)):
                scores = k[: n + 1, part] @ q[n, part] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[n, part] = weights @ v[: n + 1, part] / weights.sum()
        x = x + linear(t, f"{at}.self_attn.out_proj", out)
        y = linear(t, f"{at}.mlp.fc1", norm(t, f"{at}.layer_norm2", x))
        x = x + linear(t, f"{at}.mlp.fc2", y / (1 + np.exp(-1.702 * y)))
    return norm(t, "final_layer_norm", x)


def close(found, want, tolerance):
    assert np.abs(want).max() > 0.5
    assert np.abs(np.asarray(found) - want).max() <= tolerance * np.abs(want).max()


def in_float64(encoder, params, ids):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        encoder = dataclasses.replace(
            encoder, config=dataclasses.replace(encoder.config, dtype="float64")
        )
        found = np.asarray(apply(encoder, wide, jnp.asarray(ids)))
    assert found.dtype == np.float64
    return found


def test_the_reference(params, ids):
    want = np.stack([reference(tensors(), row) for row in ids])
    close(apply(ENCODER, params, ids), want, 1e-5)
    close(in_float64(ENCODER, params, ids), want, 1e-12)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_names_with_and_without_their_prefix(params, prefix, tmp_path):
    stored = {prefix + name.removeprefix("text_model."): x for name, x in tensors().items()}
    stored[f"{prefix}embeddings.position_ids"] = np.arange(LENGTH)[None]
    save_file(stored, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)


def test_tensors_that_do_not_fit(tmp_path):
    stored = tensors()
    stored["text_model.encoder.layers.1.mlp.fc1.odd"] = stored.pop(
        "text_model.final_layer_norm.bias"
    )
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"missing: text_model.final_layer_norm.bias; unknown: .*odd"
    ):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ids_are_their_embeddings(params, ids, dtype):
    encoder = ClipText(dataclasses.replace(CONFIG, dtype=dtype))
    found = apply_embeds(encoder, params, params["embed"]["embedding"][ids])
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, apply(encoder, params, ids))


def test_a_token_sees_those_before_it(params, ids):
    before = apply(ENCODER, params, ids)
    for position in (0, 30, LENGTH - 1):
        changed = ids.copy()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = np.any(np.asarray(before != apply(ENCODER, params, changed)), -1)
        # Those behind it all do: there is no mask of padding.
        assert not moved[:, :position].any() and moved[:, position:].all()


def test_padding_does_not_reach_the_text(params, ids):
    words, end = 9, VOCAB - 1
    padded, others = ids.copy(), ids.copy()
    padded[:, words:], others[:, words:] = end, 0
    found = np.asarray(apply(ENCODER, params, padded))[:, :words]
    np.testing.assert_array_equal(found, apply(ENCODER, params, others)[:, :words])
    close(apply(ENCODER, params, padded[:, :words]), found, 1e-5)


def test_rows_do_not_see_each_other(params, ids):
    both = np.asarray(apply(ENCODER, params, ids))
    close(apply(ENCODER, params, ids[1:]), both[1:], 1e-5)


def test_the_size_of_stable_diffusion():
    encoder = ClipText(ClipTextConfig())
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, encoder.shapes()
    )
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 123_060_480
    assert sum(12 if slot.layered else 1 for slot in HF.slots) == 196
    out = jax.eval_shape(encoder.apply, shapes, jax.ShapeDtypeStruct((2, 77), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 77, 768), jnp.float32)


def test_the_gradient_of_an_injected_token(params, ids):
    place = 5
    weights = np.random.default_rng(2).standard_normal((LENGTH, WIDTH))
    direction = np.random.default_rng(3).standard_normal(WIDTH)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        config = dataclasses.replace(CONFIG, dtype="float64")

        def value(token, remat="none"):
            encoder = ClipText(config, remat)
            embeds = encoder.embed(wide, jnp.asarray(ids[:1])).at[:, place].set(token)
            return jnp.sum(encoder.apply_embeds(wide, embeds)[0] * weights)

        token = wide["embed"]["embedding"][7]
        gradient = jax.jit(jax.grad(value))(token)
        again = jax.jit(jax.grad(functools.partial(value, remat="full")))(token)
        step, value = 1e-5, jax.jit(value)
        slope = (value(token + step * direction) - value(token - step * direction)) / (2 * step)
        assert float(gradient @ direction) == pytest.approx(float(slope), rel=1e-7)
        np.testing.assert_allclose(again, gradient, rtol=1e-12, atol=1e-12)


def test_on_several_devices_it_is_the_same(params, ids):
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    layout = param_shardings(ENCODER.shapes(), mesh, RULES)
    assert layout["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tp")
    spread = jax.device_put(params, layout)
    found = np.asarray(jax.jit(ENCODER.apply)(spread, np.concatenate([ids, ids])))
    want = np.asarray(apply(ENCODER, params, ids))
    close(found[:2], want, 1e-5)
    close(found[2:], want, 1e-5)


def test_optimizers_see_its_matrices():
    found = flatten(labels({"text": ENCODER.shapes()}))
    assert {path for path, label in found.items() if label == "muon"} == {
        f"text/layers/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")
    }


def test_random_parameters_have_their_scales():
    flat = flatten(ClipText(ClipTextConfig(400, 64, 256, 2, 4)).init(jax.random.key(0)))
    want = {
        "embed/embedding": 0.02,
        "positions/embedding": 0.01,
        "layers/attn/q/kernel": 64**-0.5,
        "layers/attn/o/kernel": 64**-0.5 / 2,
        "layers/mlp/up/kernel": 64**-0.5,
        "layers/mlp/down/kernel": 256**-0.5 / 2,
        "layers/attn/q/bias": 0.0,
    }
    for path, std in want.items():
        assert float(flat[path].std()) == pytest.approx(std, rel=0.05)
    assert (flat["layers/attn_norm/scale"] == 1).all()


def test_what_it_refuses(params):
    for field, value in {"num_heads": 5, "activation": "tanh"}.items():
        with pytest.raises(ValueError, match="does not divide|activation is one of"):
            ClipText(dataclasses.replace(CONFIG, **{field: value}))
    with pytest.raises(ValueError, match="remat is one of"):
        ClipText(CONFIG, "some")
    with pytest.raises(ValueError, match="the model reads"):
        ENCODER.apply_embeds(params, jnp.zeros((1, 3, WIDTH + 1)))
    with pytest.raises(UserError, match="78 tokens, more than the 77 positions"):
        ENCODER.apply(params, jnp.zeros((1, 78), jnp.int32))


def test_a_configuration_and_back():
    for config in (CONFIG, dataclasses.replace(CONFIG, activation="gelu", norm_eps=1e-6)):
        assert hf_config(to_hf(config), "config.json") == config
    published = to_hf(ClipTextConfig()) | {"projection_dim": 768, "bos_token_id": 0}
    assert hf_config(published, "config.json") == ClipTextConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is no text encoder"),
        (
            {"hidden_act": ["gelu"]},
            r"hidden_act \['gelu'\] is not supported; supported: quick_gelu",
        ),
        ({"num_attention_heads": 5}, "5 does not divide 32"),
        ({"hidden_size": "32"}, "not a positive int"),
        ({"layer_norm_eps": 0}, "not a positive float"),
    ],
)
def test_a_configuration_that_is_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        hf_config(to_hf(CONFIG) | change, "config.json")
    assert "\n" not in str(caught.value)


def test_a_misspelt_key():
    raw = to_hf(CONFIG)
    raw["hiden_size"] = raw.pop("hidden_size")
    with pytest.raises(UserError, match="'hiden_size' is unknown, and 'hidden_size' is absent"):
        hf_config(raw, "config.json")


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    raw = to_hf(dataclasses.replace(CONFIG, activation=request.param))
    keys = ("architectures", "model_type")
    config = transformers.CLIPTextConfig(
        **{key: value for key, value in raw.items() if key not in keys},
        bos_token_id=97,
        eos_token_id=98,
    )
    model = transformers.CLIPTextModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Larger than the usual 0.02, norms and biases too: every term must matter.
            value.copy_(0.3 * torch.randn(value.shape) + ("norm" in name and "weight" in name))
    return model.eval()


def torch_hidden(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(ids).long()).last_hidden_state.numpy()


@pytest.mark.torch_parity
def test_hidden_states_are_those_of_transformers(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    encoder = ClipText(hf_config(raw, "config.json"))
    params = load(tmp_path, encoder)
    close(apply(encoder, params, ids), torch_hidden(theirs, ids), 1e-5)
    found = in_float64(encoder, params, ids)
    try:
        close(found, torch_hidden(theirs.double(), ids), 1e-9)
    finally:
        theirs.float()


@pytest.mark.torch_parity
def test_keys_left_out_mean_what_they_mean_in_transformers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = transformers.CLIPTextConfig().to_dict()
    assert hf_config({"model_type": "clip_text_model"}, "a") == hf_config(raw, "a")
