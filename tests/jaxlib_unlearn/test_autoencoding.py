"""The objective of an autoencoder against NumPy, and on the model itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import LEARNING, Context, Questions, row_keys
from models.diffusion.vae import VAE, VAEConfig, VAELearner
from models.learner import Frozen, check_questions


class Toy(NamedTuple):
    """Two linear maps; latents are a quarter of the image."""

    into: np.ndarray  # (16, 4)
    out: np.ndarray

    def encode(self, batch):
        flat = batch["image"].reshape(len(batch["image"]), 16) @ self.into
        return flat, -jnp.abs(flat)

    def decode(self, latents):
        return (latents @ self.out).reshape(len(latents), 4, 4, 1)


def batch(rows=3):
    draw = np.random.default_rng(0)
    return {"image": draw.uniform(-1, 1, (rows, 4, 4, 1)), "row_id": np.arange(rows) + 7}


def toy():
    draw = np.random.default_rng(1)
    return Toy(draw.standard_normal((16, 4)), draw.standard_normal((4, 16)))


KEYS = row_keys(jax.random.key(3), 5)


def term(rows, weight=0.25, model=None):
    row, options = objectives.resolve("autoencode", LEARNING, kl_weight=weight)
    context = Context(toy() if model is None else model, row_keys=KEYS)  # type: ignore[arg-type]
    return row.loss(context, {"train": rows}, options)["train"]


def test_it_is_that_of_numpy():
    with jax.enable_x64(True):
        rows, model = batch(), toy()
        total, count = term(rows)
        keys = KEYS(rows, "latents")
        want = 0.0
        for i, image in enumerate(rows["image"]):
            mean = image.ravel() @ model.into
            logvar = -np.abs(mean)
            noise = np.asarray(jax.random.normal(keys[i], (4,), jnp.float64))
            found = (mean + np.exp(logvar / 2) * noise) @ model.out
            want += np.mean((found - image.ravel()) ** 2)
            want += 0.25 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar) / 2 / 16
        np.testing.assert_allclose(total, want, rtol=1e-12)
        assert count == 3


def test_a_row_draws_the_same_beside_any_other():
    with jax.enable_x64(True):
        rows = batch()
        parts = [term({k: v[i : i + 1] for k, v in rows.items()})[0] for i in range(3)]
        np.testing.assert_allclose(sum(parts), term(rows)[0], rtol=1e-12)
        assert term({**rows, "row_id": rows["row_id"] + 1})[0] != term(rows)[0]


def test_latents_that_are_standard_normal_cost_nothing():
    class Still(Toy):
        def encode(self, batch):
            zero = jnp.zeros((len(batch["image"]), 4))
            return zero, zero

    model = Still(*toy())
    assert term(batch(), 0.0, model)[0] == term(batch(), 9.0, model)[0]


def test_the_autoencoder_answers():
    """At its own latents, without noise, the error is that of `decode(sample(encode))`."""
    vae = VAE(VAEConfig(4, 1, 1, 2, (4, 8), 1, norm_groups=2))
    learner = VAELearner(vae)
    row, options = objectives.resolve("autoencode", LEARNING, kl_weight=0.0)
    check_questions(learner, row, options)
    params, rows = vae.init(jax.random.key(0)), {**batch(), "row_id": np.arange(3)}
    image = rows["image"] = rows["image"].astype(np.float32)

    @jax.jit
    def both(params):
        # So sure of its latents that the noise is rounded away.
        bias = params["quant_conv"]["bias"].at[2:].set(-30.0)
        kernel = params["quant_conv"]["kernel"].at[..., 2:].set(0.0)
        params = {**params, "quant_conv": {"kernel": kernel, "bias": bias}}
        context = learner.context(params, Frozen(), {"train": rows}, Questions({}))
        context = context._replace(row_keys=KEYS)
        mean, logvar = vae.encode(params, image)
        found = vae.decode(params, vae.sample(mean, logvar, jnp.zeros(mean.shape)))
        return row.loss(context, {"train": rows}, options)["train"][0], found

    total, found = both(params)
    np.testing.assert_allclose(total, np.sum(np.mean((found - image) ** 2, (1, 2, 3))), rtol=1e-4)
