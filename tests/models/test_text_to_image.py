"""Images of prompts: a scan is the loop, guidance is what it is defined as, pixels are pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.diffusion import schedulers
from models.diffusion.clip_text import ClipText, ClipTextConfig
from models.diffusion.denoiser import TEXT, Diffusion
from models.diffusion.schedulers import Schedule
from models.diffusion.text_to_image import draw_images, draw_latents
from models.diffusion.unet import UNet, UNetConfig
from models.diffusion.vae import VAE, VAEConfig

LENGTH, WORDS = 5, 12
NET = UNetConfig(4, 2, 2, (8,), (True,), 1, num_heads=2, cross_attention_dim=8, norm_groups=4)
MODEL = Diffusion(ClipText(ClipTextConfig(WORDS, 8, 16, 1, 2, num_positions=LENGTH)), UNet(NET))
STEPS = schedulers.plan(Schedule(), 3, "pndm")


def random_of(shapes, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), jnp.float32), shapes
    )


PARAMS = random_of(MODEL.shapes())
NOISE = random_of(jax.ShapeDtypeStruct((3, 4, 4, 2), jnp.float32), 1)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, WORDS, (3, LENGTH)))
EMPTY = jnp.arange(LENGTH)


@pytest.fixture(scope="module")
def drawn():
    def draw(weight):
        given, empty = (MODEL.text.embed(PARAMS[TEXT], ids) for ids in (TOKENS, EMPTY))
        return draw_latents(MODEL, PARAMS, STEPS, NOISE, given, empty, weight)

    return jax.jit(draw)


@pytest.fixture(scope="module")
def noise_of():
    return jax.jit(lambda x, time, ids: MODEL.noise(PARAMS, x, time, ids))


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5])
def test_samples_are_those_of_a_loop_over_two_passes(weight, drawn, noise_of):
    """With a weight of 1 nothing but the prompt counts, with 0 nothing but the empty one."""
    state = schedulers.begin(STEPS, NOISE)
    for i in range(len(STEPS.times)):
        x, time = schedulers.model_input(STEPS, state, i)
        given = noise_of(x, time, TOKENS)
        plain = noise_of(x, time, jnp.broadcast_to(EMPTY, TOKENS.shape))
        eps = {0.0: plain, 1.0: given}.get(weight, plain + weight * (given - plain))
        state = schedulers.advance(STEPS, state, eps, i)
    want = np.asarray(state.sample)
    np.testing.assert_allclose(drawn(weight), want, atol=2e-5 * np.abs(want).max())
    assert np.abs(drawn(0.0) - drawn(1.0)).max() > 1e-3  # the text matters


def test_images_need_the_decoder_alone():
    vae = VAE(VAEConfig(8, channels=(4, 8), layers_per_block=1, norm_groups=2))
    params = random_of(vae.shapes(), 3)
    mine = {name: params[name] for name in ("post_quant_conv", "decoder")}
    latents = random_of(jax.ShapeDtypeStruct((2, 4, 4, 4), jnp.float32), 4)
    found = np.asarray(jax.jit(lambda z: draw_images(vae, mine, z))(latents))
    assert found.shape == (2, 8, 8, 3) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1 and np.ptp(found) > 0.01
    whole = vae.decode(params, latents)
    np.testing.assert_allclose(found, np.clip(whole / 2 + 0.5, 0, 1), atol=1e-5)
