"""Adapters beside frozen kernels: the same model as a merged one, without a copy of the base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxlib_unlearn.optim import matrices
from jaxlib_unlearn.optim.rules import sharding_role
from jaxlib_unlearn.optim.zeroth_order import perturbations
from jaxlib_unlearn.optim.zeroth_order.engine import zeroth_order
from models.decoder import lora
from models.decoder.model import REMAT, Decoder, DecoderConfig

CONFIG = DecoderConfig(61, 32, 48, 3, 4, 2, 8, qkv_bias=True)
DECODER = Decoder(CONFIG)
ALL = ("q", "k", "v", "o", "gate", "up", "down")
SCALE = 0.5


@pytest.fixture(scope="module")
def base():
    return jax.jit(DECODER.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)


def trained(base, targets=ALL, rank=4):
    """Adapters that have moved: B is no longer zero."""
    draw = np.random.default_rng(0)
    adapters = lora.init(base, rank, targets, 7)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), adapters)


@functools.partial(jax.jit, static_argnames="decoder")
def logits(params, tokens, decoder=DECODER):
    return decoder.unembed(params, decoder.forward(params, tokens)[0])


@functools.partial(jax.jit, static_argnames="decoder")
def adapted_logits(adapters, base, tokens, decoder=DECODER):
    params, layer_map = lora.bind(adapters, base, scale=SCALE)
    return decoder.unembed(params, decoder.forward(params, tokens, layer_map=layer_map)[0])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_kernels_by_name():
    found = lora.kernels(DECODER.shapes())
    assert set(found) == set(ALL)
    assert found["q"] == ("attn/q", (32, 32)) and found["k"] == ("attn/k", (32, 16))
    assert found["down"] == ("mlp/down", (48, 32))


def test_start_is_the_frozen_model(base, tokens):
    adapters = lora.init(base, 4, ALL, 7)
    np.testing.assert_array_equal(adapted_logits(adapters, base, tokens), logits(base, tokens))


def test_draws_belong_to_a_path_and_a_layer(base):
    adapters = lora.init(base, 4, ("q", "down"), 7)
    a = {
        n: adapters["layers"][p][n]["lora_a"]["kernel"] for p, n in (("attn", "q"), ("mlp", "down"))
    }
    assert a["q"].std() == pytest.approx(32**-0.5, rel=0.1)
    assert a["down"].std() == pytest.approx(48**-0.5, rel=0.1)
    # Neither the other targets nor the split of layers into stacks change them; the seed does.
    alone = lora.init(base, 4, ("q",), 7)
    np.testing.assert_array_equal(alone["layers"]["attn"]["q"]["lora_a"]["kernel"], a["q"])
    cut = {**base, "layers": tuple(part(base["layers"], s) for s in (slice(1), slice(1, 3)))}
    first, second = (
        x["attn"]["q"]["lora_a"]["kernel"] for x in lora.init(cut, 4, ALL, 7)["layers"]
    )
    np.testing.assert_array_equal(jnp.concatenate([first, second]), a["q"])
    other = lora.init(base, 4, ("q",), 8)
    assert not np.any(np.equal(other["layers"]["attn"]["q"]["lora_a"]["kernel"], a["q"]))
    assert len({np.asarray(layer).tobytes() for layer in a["q"]}) == 3


def part(stack, where):
    return jax.tree.map(lambda x: x[where], stack)


@pytest.mark.parametrize("targets", [ALL, ("v", "down")])
def test_merged_equals_adapted(targets, base, tokens):
    adapters = trained(base, targets)
    expected = adapted_logits(adapters, base, tokens)
    assert np.abs(expected - logits(base, tokens)).max() > 0.05
    merged = lora.merge(adapters, base, scale=SCALE)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    close(logits(merged, tokens), expected)
    close(logits(lora.view(adapters, base, scale=SCALE), tokens), expected)
    # By hand; and what has no adapter is not even copied.
    q = adapters["layers"]["attn"]["q"] if "q" in targets else None
    if q is not None:
        term = np.einsum("lir,lro->lio", q["lora_a"]["kernel"], q["lora_b"]["kernel"])
        kernel = base["layers"]["attn"]["q"]["kernel"] + SCALE * term
        close(merged["layers"]["attn"]["q"]["kernel"], kernel, 1e-6)
    else:
        assert merged["layers"]["attn"]["q"]["kernel"] is base["layers"]["attn"]["q"]["kernel"]
    assert merged["embed"]["embedding"] is base["embed"]["embedding"]
    assert merged["layers"]["attn"]["q"]["bias"] is base["layers"]["attn"]["q"]["bias"]


def test_merge_rounds_once(base):
    """A bfloat16 kernel plus a term, computed in float32 and rounded once."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    adapters = trained(base)
    merged = lora.merge(adapters, half, scale=SCALE)["layers"]["mlp"]["up"]["kernel"]
    a, b = (np.float64(adapters["layers"]["mlp"]["up"][n]["kernel"]) for n in ("lora_a", "lora_b"))
    exact = np.float64(half["layers"]["mlp"]["up"]["kernel"]) + SCALE * a @ b
    assert merged.dtype == jnp.bfloat16
    off = np.abs(np.float64(merged) - exact)
    assert (off <= np.abs(exact) * 2**-8 + 1e-7).all()


def test_export_of_the_merged_model(base, tokens, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models as kinds

    config = dataclasses.replace(CONFIG, family="qwen2")
    adapters = trained(base)
    merged = lora.merge(adapters, base, scale=SCALE)
    words = models.Tokenizer(Backend(kinds.BPE({"a": 0, "b": 1}, [])), eos_id=1, pad_id=0)
    models.export(models.Loaded(config, merged, words), tmp_path / "export")
    back = models.load(tmp_path / "export")
    close(logits(back.params, tokens, back.decoder), adapted_logits(adapters, base, tokens))


def test_stacks_in_a_tuple(base, tokens):
    cut = {**base, "layers": tuple(part(base["layers"], s) for s in (slice(1), slice(1, 3)))}
    whole = trained(base)
    pieces = {"layers": tuple(part(whole["layers"], s) for s in (slice(1), slice(1, 3)))}
    expected = adapted_logits(whole, base, tokens)
    close(adapted_logits(pieces, cut, tokens), expected)
    close(logits(lora.merge(pieces, cut, scale=SCALE), tokens), expected)


def loss(adapters, base, tokens, decoder, layer_map=None):
    params, layer_map = lora.bind(adapters, base, layer_map, scale=SCALE)
    hidden, _ = decoder.forward(params, tokens, layer_map=layer_map)
    return jnp.mean(jnp.square(decoder.unembed(params, hidden)))


gradient = jax.jit(jax.grad(loss), static_argnums=3)


def test_gradient_is_the_chain_rule_on_the_merged_model(base, tokens):
    """dA = s dW B^T and dB = s A^T dW, for every remat policy; initial adapters included."""
    for adapters in (lora.init(base, 4, ALL, 7), trained(base)):
        merged = lora.merge(adapters, base, scale=SCALE)
        full = jax.jit(
            jax.grad(
                lambda p: jnp.mean(jnp.square(DECODER.unembed(p, DECODER.forward(p, tokens)[0])))
            )
        )(merged)
        found = {remat: gradient(adapters, base, tokens, Decoder(CONFIG, remat)) for remat in REMAT}
        for name in ALL:
            kind = "attn" if name in "qkvo" else "mlp"
            dw = np.float64(full["layers"][kind][name]["kernel"])
            pair = adapters["layers"][kind][name]
            a, b = (np.float64(pair[n]["kernel"]) for n in ("lora_a", "lora_b"))
            for grads in found.values():
                got = grads["layers"][kind][name]
                for mine, expected in (
                    (got["lora_a"]["kernel"], SCALE * dw @ b.swapaxes(1, 2)),
                    (got["lora_b"]["kernel"], SCALE * a.swapaxes(1, 2) @ dw),
                ):
                    size = np.abs(expected).max()
                    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5 * size + 1e-12)


@pytest.mark.fused
@pytest.mark.parametrize("remat", REMAT)
def test_no_copy_of_the_base(remat):
    """Temporaries of a gradient hold neither the adapted kernels nor gradients of them."""
    config = DecoderConfig(64, 128, 384, 24, 4, 2, 32)
    decoder, tokens = Decoder(config, remat), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = decoder.shapes()
    adapters = jax.eval_shape(lambda: lora.init(shapes, 4, ALL))
    kernels = [x for x in jax.tree.leaves(shapes["layers"]) if x.ndim == 3]
    size = sum(4 * x.size for x in kernels)

    def temporaries(fn, *args):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    step = jax.grad(lambda a, p, t: loss(a, p, t, decoder))
    assert temporaries(step, adapters, shapes, tokens) < 0.25 * size
    if remat != "none":
        return

    def by_copy(adapters, params, tokens):
        merged = lora.merge(adapters, params, scale=SCALE)
        return jnp.mean(jnp.square(decoder.unembed(merged, decoder.forward(merged, tokens)[0])))

    assert temporaries(jax.grad(by_copy), adapters, shapes, tokens) > size  # the cost of a copy


def test_optimizers_see_matrices():
    shapes = DECODER.shapes()
    adapters = jax.eval_shape(lambda: lora.init(shapes, 4, ALL))
    assert set(jax.tree.leaves(matrices.labels(adapters))) == {"muon"}
    rows = matrices.describe(adapters).splitlines()[1:]
    assert len(rows) == 14
    assert (
        rows[0].split() == "layers/attn/k/lora_a/kernel (3, 32, 4) muon 3 x (32 in, 4 out)".split()
    )
    roles = {row.split()[0]: sharding_role(row.split()[0]) for row in rows}
    for path, role in roles.items():
        assert role == ("row" if path.split("/")[2] in ("o", "down") else "column"), path


@pytest.mark.parametrize("family", ["dense", "subspace"])
def test_perturbed_adapters_layer_by_layer(family, base, tokens):
    """A zeroth-order step sees adapters alone: through a layer map or as a whole, the same."""
    made = {"dense": perturbations.dense()}.get(family) or getattr(perturbations, family)(2)
    tx = zeroth_order(0.1, made, eps=0.1)
    adapters = trained(base, ("q", "down"))

    def after(**functions):
        def run(adapters):
            return tx.update(None, tx.init(adapters), adapters, **functions)

        return jax.jit(run)(adapters)

    whole = after(value_fn=lambda a: loss(a, base, tokens, DECODER))
    layers = after(layered_value_fn=lambda a, m: loss(a, base, tokens, DECODER, m))
    assert np.abs(whole[1].coeffs).min() > 1e-4
    np.testing.assert_allclose(layers[1].coeffs, whole[1].coeffs, rtol=1e-3, atol=1e-5)
    assert jax.tree.structure(layers[0]) == jax.tree.structure(adapters)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [(0, ("q",), "rank 0 does not fit"), (17, ("q", "k"), "rank 17 does not fit k's"),
     (4, (), "targets are some of"), (4, ("q", "w"), "targets are some of k, o, q, v")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(rank, targets, message):
    with pytest.raises(ValueError, match=message):
        lora.init(DECODER.shapes(), rank, targets)
