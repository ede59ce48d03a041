"""The autoencoder: kept outputs of diffusers, exact counts, and what must not change its result."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxlib_unlearn.optim.matrices import resolve
from models.diffusion import vae as module
from models.diffusion.layers import Downsample, doubled, draw
from models.diffusion.vae import RULES, VAE, VAEConfig, pixels
from models.files.diffusers_configs import vae_config, vae_json
from models.files.diffusers_parts import file_name
from models.files.weights import flatten
from models.layout import matrices, path_str, spec_of
from train.runtime.sharding import MeshConfig, make_mesh

SMALL = VAEConfig(8, 1, 1, 2, (4, 8), 1, norm_groups=2, scaling_factor=0.5)


def beside(name):
    """A module in this folder that is no test."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_its_outputs_are_those_of_diffusers():
    golden = beside("diffusion_golden")
    raw = json.loads(json.dumps(vae_json(VAEConfig()) | golden.VAE))
    vae = VAE(dataclasses.replace(vae_config(raw, "config.json"), dtype="float64"))
    given, want = golden.inputs(), load_file(golden.FILE)
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), golden.params(vae.shapes(), file_name)
        )
        mean, logvar = jax.jit(vae.encode)(params, given["images"])
        decoded = jax.jit(vae.decode)(params, given["coded"])
    for name, found in {"mean": mean, "logvar": logvar, "decoded": decoded}.items():
        assert found.dtype == np.float64 and np.abs(want[name]).max() > 0.5
        assert np.abs(np.asarray(found) - want[name]).max() <= 1e-9 * np.abs(want[name]).max()


def test_it_has_the_published_number_of_parameters():
    flat = flatten(VAE(VAEConfig()).shapes())
    assert len(flat) == 248 and sum(math.prod(x.shape) for x in flat.values()) == 83_653_863
    assert VAEConfig().factor == 8


def test_its_matrices_and_their_places():
    shapes = VAE(VAEConfig()).shapes()
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())
    flat = {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    for (path, leaf), axes in zip(flat.items(), resolve(shapes, matrices), strict=True):
        assert (axes is not None) == path.endswith("kernel")
        spec_of(path, leaf.shape, mesh, RULES)  # raises for a leaf without a rule
    path = "encoder/mid_block/attentions_0/to_out_0/kernel"
    assert tuple(spec_of(path, flat[path].shape, mesh, RULES)) == ("tp", "fsdp")


def test_the_encoder_pads_below_and_to_the_right_alone():
    """One pixel of the kernel at a time: which pixels it reads, and where it reads the padding."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 1)), jnp.float32)

    def of(padding, row, column):
        layer = Downsample(1, padding)
        layer.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[row, column].set(1)
        return np.asarray(layer(x))[0, :, :, 0]

    image = np.asarray(x)[0, :, :, 0]
    np.testing.assert_array_equal(of((0, 1), 0, 0), image[::2, ::2])
    behind = of((0, 1), 2, 2)
    np.testing.assert_array_equal(behind[:2, :2], image[2::2, 2::2])
    assert not np.any(behind[2]) and not np.any(behind[:, 2])
    np.testing.assert_array_equal(of((1, 1), 1, 1), image[::2, ::2])  # the denoiser's
    network = nnx.merge(*module._abstract(SMALL, "none")["encoder"])
    assert network.down_blocks_0.downsamplers_0.conv.padding == (0, 1)


def test_all_its_epsilons():
    for name in ("encoder", "decoder"):
        network = nnx.merge(*module._abstract(SMALL, "none")[name])
        norms = [
            network.conv_norm_out,
            network.mid_block.attentions_0.group_norm,
            network.mid_block.resnets_0.norm1,
            network.mid_block.resnets_1.norm2,
        ]
        small = 2.0**-10
        for norm in norms:
            size = norm.scale.shape[0]
            probe = jnp.full((1, 2, 2, size), small).at[:, 0].multiply(-1)
            norm.scale, norm.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
            found = (small / float(norm(probe)[0, 1, 0, 0])) ** 2 - small**2
            assert found == pytest.approx(1e-6, rel=0.01)


def test_samples_and_their_scale():
    vae = VAE(SMALL)
    mean, logvar, noise = (jnp.full((1, 1, 1, 2), value) for value in (3.0, math.log(4), 0.5))
    assert vae.sample(mean, logvar, noise).ravel().tolist() == [2.0, 2.0]  # (3 + 2 / 2) / 2
    assert vae.sample(mean, logvar, 0 * noise).ravel().tolist() == [1.5, 1.5]


def test_from_images_to_latents_and_back():
    vae = VAE(SMALL)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f4"), vae.shapes())
    params["quant_conv"] |= {"bias": np.array([0.0, 0.0, 1e4, -1e4], np.float32)}
    halves = [{k: params[k] for k in ks} for ks in (("encoder", "quant_conv"), ("decoder",))]
    images = rng.uniform(-1, 1, (2, 8, 12, 1)).astype(np.float32)
    mean, logvar = jax.jit(vae.encode)(halves[0], images)
    assert mean.shape == logvar.shape == (2, 4, 6, 2) and np.std(mean) > 0.1
    assert np.all(logvar[..., 0] == 20) and np.all(logvar[..., 1] == -30)
    half = halves[1] | {"post_quant_conv": params["post_quant_conv"]}
    assert jax.eval_shape(vae.decode, half, mean).shape == images.shape
    assert pixels(jnp.array([-2.0, 0.5, 2.0])).tolist() == [0.0, 0.75, 1.0]


def test_what_starts_at_zero():
    shapes = VAE(SMALL).shapes()["decoder"]
    kept = {"attentions_0": shapes["mid_block"]["attentions_0"], "conv_out": shapes["conv_out"]}
    found = jax.jit(lambda key: draw(key, kept, module.ZERO))(jax.random.key(0))
    assert not np.any(found["attentions_0"]["to_out_0"]["kernel"])
    assert np.any(found["attentions_0"]["to_q"]["kernel"]) and np.any(found["conv_out"]["kernel"])


def test_what_does_not_fit():
    vae = VAE(SMALL)
    params = vae.shapes()
    for shape, words in (((1, 8, 8, 3), "the model reads"), ((1, 7, 8, 1), "2 does not divide")):
        with pytest.raises(ValueError, match=words):
            vae.encode(params, jnp.zeros(shape))
    with pytest.raises(ValueError, match="the model reads"):
        vae.decode(params, jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(ValueError, match="3 does not divide 4 channels"):
        VAE(dataclasses.replace(SMALL, norm_groups=3))
    with pytest.raises(ValueError, match="no levels"):
        VAE(dataclasses.replace(SMALL, channels=()))
    with pytest.raises(ValueError, match="remat is one of"):
        VAE(SMALL, "some")


def test_twice_as_large():
    x = np.random.default_rng(2).standard_normal((2, 3, 4, 5))
    np.testing.assert_array_equal(doubled(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2).astype("f4"))
