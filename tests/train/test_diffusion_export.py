"""Exports of train.diffuse and train.defend: diffusers' pipeline loads them and draws the same.

The weights are random and none of them 0: a few steps of training leave the branches of a network
nearly shut, and everything would draw the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.concepts import span
from models.diffusion.schedulers import Schedule
from models.diffusion.text_to_image import draw_images
from models.files import clip_tokenizer
from train.data import captions
from train.engine.run import Run
from train.jobs import diffusion
from train.jobs.diffusing import defending, drawing, held, painters
from train.jobs.diffusing.drawing import Shield, Wanted
from train.jobs.diffusing.held import Painter
from train.jobs.diffusing.judges import Judge
from train.jobs.job import Started
from train.options.config import replace
from train.presets import fashion
from train.runtime.sharding import MeshConfig, make_mesh

pytestmark = [
    pytest.mark.torch_parity,
    # diffusers and what it imports, none of it ours.
    pytest.mark.filterwarnings("ignore"),
]

SIZES = {name: value for name, value in fashion.SMOKE.items() if name.startswith("model.")}
# Not "scratch": no judge is written beside the model.
CONFIG: Any = replace(fashion.PRESET, **SIZES, **{"judge.path": "given"})
TEXTS = ("a photo of a dark sneaker", "trousers", "")
LIMIT = 1e-4  # of pixels from 0 to 1


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers", reason="diffusers is not installed (diffusion-parity)")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def painter(mesh):
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        spread = 0.1 if len(shape.shape) == 1 else np.prod(shape.shape[:-1]) ** -0.5
        return jnp.asarray(spread * draw.standard_normal(shape.shape) + (name == "scale"), "f4")

    def filled(learner):
        params = jax.tree_util.tree_map_with_path(leaf, learner.model.shapes())
        return held.placed(learner, params, mesh)

    tokenizer = clip_tokenizer.of_words(captions.vocabulary(captions.CLOTHES))
    vae = held.new_vae(CONFIG, (16, 16, 1))
    denoiser = held.new_denoiser(CONFIG, vae.model.config, tokenizer.largest_id + 1)
    return Painter(filled(denoiser), filled(vae), Schedule(), tokenizer)


@pytest.fixture(scope="module")
def exported(painter, mesh, tmp_path_factory):
    """The folder of each program, and the defence that its model has at the look-up."""
    judge: Any = Judge(None)  # pyright: ignore[reportArgumentType]
    basis = np.asarray(span(np.random.default_rng(1).standard_normal((3, 16))), np.float32)
    work: Any = opened(mesh, None).run
    shut = defending.project_table(work, painter.denoiser, basis.tolist(), [])
    table = painter._replace(denoiser=painter.denoiser._replace(params=shut, sha="projected"))
    root = tmp_path_factory.mktemp("exports")
    diffusion.export(opened(mesh, root / "diffuse"), painter, judge, "A model.")
    defending.export(opened(mesh, root / "defend"), table, basis, judge)
    return {
        "diffuse": (root / "diffuse" / "export", None),
        "defend": (root / "defend" / "export", Shield(basis)),
    }


def opened(mesh, folder):
    """A run at its start, as far as exports look at it."""
    if folder is not None:
        folder.mkdir()
    run: Any = Run(folder, mesh, 0, None, None, [], {})  # pyright: ignore[reportArgumentType]
    return Started(run, CONFIG, None, None, None)


@pytest.mark.parametrize("program", ["diffuse", "defend"])
def test_no_key_is_missing_or_unexpected(diffusers, exported, painter, program):
    import transformers

    folder, _ = exported[program]
    for library, kind, part in (
        (diffusers, "UNet2DConditionModel", "unet"),
        (diffusers, "AutoencoderKL", "vae"),
        (transformers, "CLIPTextModel", "text_encoder"),
    ):
        model, report = getattr(library, kind).from_pretrained(
            folder / part, output_loading_info=True
        )
        assert not any(report.values()), (part, report)
        assert all(value.abs().max() > 0 for value in model.parameters()), part
    config = model.config  # of the text encoder
    tokenizer = painter.tokenizer
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
@pytest.mark.parametrize("program", ["diffuse", "defend"])
def test_the_same_latents_become_the_same_images(
    diffusers, exported, painter, mesh, program, sampler
):
    """As the pipeline comes, with PNDM, and with DDIM, by which runs draw."""
    import torch

    folder, shield = exported[program]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.safety_checker is None and type(pipe.scheduler).__name__ == "PNDMScheduler"
    if sampler == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    numbers = range(len(TEXTS))
    shape = painter.denoiser.model.unet.config.latent_shape
    noise = np.stack(
        [jax.random.normal(jax.random.fold_in(jax.random.key(5), i), shape) for i in numbers]
    )
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))
    how = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    want = pipe(list(TEXTS), latents=latents, **how).images

    draw = dataclasses.replace(CONFIG.draw, steps=4, sampler=sampler, rows=len(TEXTS))

    def ours(model, shield=None):
        found = drawing.drawn(
            model, Wanted(TEXTS, numbers), draw, mesh, seed=5, shield=shield, decode=False
        )
        vae = model.vae.to_device()
        return np.asarray(draw_images(vae.model, vae.params, jnp.asarray(found)))

    found = ours(painters.given(folder, CONFIG, mesh))
    assert want.shape == found.shape == (3, 16, 16, 1) and want.std() > 0.03
    np.testing.assert_allclose(found, want, rtol=0, atol=LIMIT)
    if shield is not None:
        # Prompts of words cannot tell the table from the defence at the look-up.
        np.testing.assert_allclose(ours(painter, shield), want, rtol=0, atol=LIMIT)
        assert np.abs(ours(painter) - want).max() > 100 * LIMIT
