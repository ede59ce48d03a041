"""Objectives of denoisers against float64 NumPy, by hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import DENOISING, Context

SHAPE, WORDS = (4, 4, 2), 9


class Toy(NamedTuple):
    """A denoiser that is linear in the latents and in the mean of the prompt's embeddings."""

    kernel: object  # (2, 2)
    table: object  # (WORDS, 2)

    def noise(self, batch, *prompts):
        level = batch["time"][:, None, None, None]
        words = [jnp.mean(jnp.asarray(self.table)[batch[p]], axis=1) for p in prompts]
        return tuple(batch["latents"] @ self.kernel + w[:, None, None] * level for w in words)


def toy(seed):
    draw = np.random.default_rng(seed)
    return Toy(draw.standard_normal((2, 2)), draw.standard_normal((WORDS, 2)))


def rows(seed, count=3):
    draw = np.random.default_rng(seed)
    return {
        "latents": draw.standard_normal((count, *SHAPE)),
        "noise": draw.standard_normal((count, *SHAPE)),
        "time": draw.random(count),
        "tokens": draw.integers(0, WORDS, (count, 5)),
        "other_tokens": draw.integers(0, WORDS, (count, 5)),
    }


def seen(model, batch, prompt="tokens"):
    """`Toy.noise` row by row, in NumPy."""
    found = []
    for i in range(len(batch["time"])):
        words = np.mean([model.table[w] for w in batch[prompt][i]], axis=0)
        found.append(batch["latents"][i] @ model.kernel + words * batch["time"][i])
    return np.array(found)


def mse(a, b):
    return sum(np.mean((x - y) ** 2) for x, y in zip(a, b, strict=True)), len(a)


STREAMS = {"train": rows(3), "forget": rows(4), "retain": rows(5, 2)}
MODEL, START = toy(1), toy(2)
KEPT = {
    "denoise": mse(seen(MODEL, STREAMS["retain"]), STREAMS["retain"]["noise"]),
    "frozen": mse(seen(MODEL, STREAMS["retain"]), seen(START, STREAMS["retain"])),
}


def terms(name, model=MODEL, batches=STREAMS, **given):
    row, options = objectives.resolve(name, DENOISING, **given)
    context = Context(model, START)  # type: ignore[arg-type]
    return row.loss(context, {s: batches[s] for s in row.streams}, options)


def wanted(name, guidance=1.0, keep="denoise"):
    batch = STREAMS["forget"]
    mine, asked, other = seen(MODEL, batch), seen(START, batch), seen(START, batch, "other_tokens")
    target = {"esd": asked - guidance * (asked - other), "redirect": other}[name]
    return {"forget": mse(mine, target)} | ({} if keep == "none" else {"retain": KEPT[keep]})


def check(found, want):
    assert found.keys() == want.keys()
    for name, (total, count) in want.items():
        np.testing.assert_allclose(found[name][0], total, rtol=1e-12)
        assert found[name][1] == count


@pytest.mark.parametrize("keep", ["denoise", "frozen", "none"])
@pytest.mark.parametrize("name, given", [("esd", {}), ("esd", {"guidance": 2.5}), ("redirect", {})])
def test_terms_are_those_of_numpy(name, given, keep):
    with jax.enable_x64(True):
        check(terms(name, keep=keep, **given), wanted(name, keep=keep, **given))
        batch = STREAMS["train"]
        check(terms("denoise"), {"train": mse(seen(MODEL, batch), batch["noise"])})


def test_where_they_are_least():
    """ESD with eta 0 asks for what the frozen model says; with 1, for what it says of no words."""
    with jax.enable_x64(True):
        assert terms("esd", START, guidance=0.0)["forget"][0] == 0
        assert terms("redirect", START)["forget"][0] > 0.1
        np.testing.assert_allclose(
            terms("esd", guidance=1.0)["forget"][0], terms("redirect")["forget"][0], rtol=1e-12
        )
        assert terms("esd", START, keep="frozen")["retain"][0] == 0


@pytest.mark.parametrize("name", ["esd", "redirect"])
def test_no_gradient_reaches_the_target(name):
    """The model is the frozen one: its gradient is that of the model's side alone."""
    with jax.enable_x64(True):

        def forget(kernel, frozen):
            row, options = objectives.resolve(name, DENOISING, keep="none")
            model, start = MODEL._replace(kernel=kernel), START._replace(kernel=frozen)
            context = Context(model, start)  # type: ignore[arg-type]
            return row.loss(context, {"forget": STREAMS["forget"]}, options)["forget"][0]

        mine, frozen = jax.grad(forget, argnums=(0, 1))(MODEL.kernel, START.kernel)
    assert np.abs(mine).min() > 1e-3
    assert not np.any(frozen)


def test_rows_of_two_batches_add_up():
    with jax.enable_x64(True):
        cut = [{k: v[i : i + 1] for k, v in STREAMS["forget"].items()} for i in range(3)]
        parts = [terms("esd", batches={**STREAMS, "forget": part})["forget"] for part in cut]
        total, count = terms("esd")["forget"]
        np.testing.assert_allclose(sum(part[0] for part in parts), total, rtol=1e-12)
        assert sum(part[1] for part in parts) == count


def test_rows_say_what_they_read():
    row, _ = objectives.resolve("esd", DENOISING)
    assert row.streams == ("forget", "retain")
    assert row.reference == {"forget": "fork"}
    assert row.questions(None).asks == {"forget": ("noise",), "retain": ("noise",)}
    alone, _ = objectives.resolve("esd", DENOISING, keep="none")
    assert alone.streams == ("forget",)
    assert "retain" not in alone.columns
    frozen, _ = objectives.resolve("redirect", DENOISING, keep="frozen")
    assert frozen.questions(None).forked == ("forget", "retain")
    assert not set(DENOISING) & set(objectives.OBJECTIVES)


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("esd", {"guidance": -1.0}, "guidance.*0 or more"),
        ("esd", {"keep": "nll"}, "keep.*denoise"),
        ("redirect", {"guidance": 1.0}, "does not use guidance"),
        ("edd", {}, "did you mean 'esd'"),
    ],
)
def test_what_does_not_fit_is_said(name, given, said):
    with pytest.raises(UserError, match=said):
        objectives.resolve(name, DENOISING, **given)
