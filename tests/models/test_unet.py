"""The denoiser: kept outputs of diffusers, exact counts, and what must not change its result."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim.matrices import resolve, sharding_role
from models.diffusion import layers as diffusion_layers
from models.diffusion import unet
from models.diffusion.layers import attention
from models.diffusion.unet import RULES, UNet, UNetConfig
from models.files.diffusers_configs import unet_config, unet_json
from models.files.diffusers_parts import file_name
from models.files.weights import flatten
from models.layout import matrices, path_str, spec_of
from train.costs.flops import flops
from train.runtime.sharding import MeshConfig, make_mesh, param_shardings

SMALL = UNetConfig(
    8, 4, 4, (8, 16), (True, False), 1, num_heads=2, cross_attention_dim=6, norm_groups=4
)
TINY = dataclasses.replace(SMALL, sample_size=4, channels=(8,), attends=(True,))  # one level
EXACT = dataclasses.replace(TINY, dtype="float64")


def beside(name):
    """A module in this folder that is no test."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_params(model, seed=0):
    """Every leaf matters: norms are not 1, biases not 0."""
    draw = np.random.default_rng(seed)

    def one(path, leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        value = scale * draw.standard_normal(leaf.shape) + path_str(path).endswith("scale")
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, model.shapes())


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def noisy(config=TINY, batch=2):
    draw = np.random.default_rng(1)
    shapes = (batch, *config.latent_shape), (batch, 3, config.cross_attention_dim)
    latents, context = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
    return latents, np.array([3.5, 981.0], np.float32)[:batch], context


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, latents, t, context):
    return model.apply(params, latents, t, context)


@pytest.fixture(scope="module")
def params():
    return random_params(UNet(TINY))


def test_its_output_is_that_of_diffusers():
    golden = beside("diffusion_golden")
    given = golden.inputs()
    raw = json.loads(json.dumps(unet_json(UNetConfig()) | golden.UNET))
    config = dataclasses.replace(unet_config(raw, "config.json"), dtype="float64")
    model = UNet(config)
    params = golden.params(model.shapes(), file_name)
    want = load_file(golden.FILE)["noise"]
    with jax.enable_x64(True):
        found = run(model, wide(params), given["latents"], given["times"], given["context"])
    assert found.dtype == np.float64 and np.abs(want).max() > 0.5
    assert np.abs(np.asarray(found) - want).max() <= 1e-9 * np.abs(want).max()


def test_it_has_the_published_number_of_parameters():
    flat = flatten(UNet(UNetConfig()).shapes())
    assert len(flat) == 686 and sum(math.prod(x.shape) for x in flat.values()) == 859_520_964
    targets = [path for path in flat if "attn2/to_k/" in path or "attn2/to_v/" in path]
    assert len(targets) == 32 and all(flat[path].shape[0] == 768 for path in targets)


def test_its_work_is_that_of_the_published_one():
    """790 GFLOP by XLA's counter, which leaves out what convolutions multiply in their padding."""
    model, leaf = UNet(UNetConfig()), jax.ShapeDtypeStruct
    given = leaf((1, 64, 64, 4), jnp.float32), 1.0, leaf((1, 77, 768), jnp.float32)
    assert flops(model.apply, model.shapes(), *given) == pytest.approx(790e9, rel=0.02)


def test_optimizers_see_its_matrices(params):
    shapes = UNet(UNetConfig()).shapes()
    flat = {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    found = dict(zip(flat, resolve(shapes, matrices), strict=True))
    for path, axes in found.items():
        if path.endswith("kernel"):
            assert axes is not None
            *before, behind = flat[path].shape
            assert axes.sizes(flat[path].shape) == (1, math.prod(before), behind)
        else:
            assert axes is None
    assert found["down_blocks_0/resnets_0/conv1/kernel"].fan_in == (0, 1, 2)
    with pytest.raises(ValueError, match="cannot tell whether"):
        resolve(shapes)
    # Muon moves a convolution as it moves the matrix (k k in, out).
    kernel = jnp.asarray(params["conv_in"]["kernel"])
    tree, flat_tree = {"conv": {"kernel": kernel}}, {"conv": {"kernel": kernel.reshape(-1, 8)}}
    moved = []
    for given, more in ((tree, {"matrices": matrices}), (flat_tree, {})):
        tx = optim.muon(0.1, **more)
        updates, _ = tx.update(given, tx.init(given), given)
        moved.append(np.asarray(updates["conv"]["kernel"]).reshape(-1, 8))
    np.testing.assert_allclose(*moved, rtol=1e-5, atol=1e-7)


def test_every_leaf_has_a_place_on_a_mesh():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())
    specs = {
        path: tuple(spec_of(path, leaf.shape, mesh, RULES))
        for path, leaf in flatten(UNet(UNetConfig()).shapes()).items()
    }
    block = "mid_block/attentions_0/transformer_blocks_0"
    for path, want in {
        "conv_in/kernel": (None, None, "fsdp", None),
        "mid_block/resnets_0/conv1/kernel": (None, None, "fsdp", "tp"),
        "mid_block/resnets_0/conv2/kernel": (None, None, "tp", "fsdp"),
        f"{block}/attn2/to_k/kernel": ("fsdp", "tp"),
        f"{block}/attn2/to_out_0/kernel": ("tp", "fsdp"),
        f"{block}/ff/net_0/proj/kernel": ("fsdp", "tp"),
        f"{block}/ff/net_2/kernel": ("tp", "fsdp"),
        f"{block}/norm1/scale": (None,),
    }.items():
        assert specs[path] == want, path
    # What optimizers believe of a matrix, which they see by its name alone.
    of_kernels = {path: spec for path, spec in specs.items() if path.endswith("kernel")}
    by_name = {path for path in of_kernels if sharding_role(path) == "row"}
    assert by_name == {path for path, spec in of_kernels.items() if spec[-2] == "tp"}


def test_the_output_has_the_shape_of_the_latents():
    for height, width in ((8, 8), (4, 10)):
        shape = jax.eval_shape(
            UNet(SMALL).apply,
            UNet(SMALL).shapes(),
            jnp.zeros((3, height, width, 4)),
            7,
            jnp.zeros((3, 2, 6)),
        )
        assert shape.shape == (3, height, width, 4) and shape.dtype == jnp.float32


@pytest.mark.parametrize(
    ("latents", "context", "words"),
    [
        ((1, 8, 8, 3), (1, 2, 6), "the model reads"),
        ((1, 8, 7, 4), (1, 2, 6), "2 does not divide both sides"),
        ((1, 8, 8, 4), (1, 2, 5), "the context is"),
    ],
)
def test_inputs_of_another_shape(latents, context, words):
    with pytest.raises(ValueError, match=words):
        UNet(SMALL).apply(UNet(SMALL).shapes(), jnp.zeros(latents), 1, jnp.zeros(context))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attends": (True,)}, "2 levels, attends has 1"),
        ({"num_heads": 3}, "3 does not divide 8"),
        ({"norm_groups": 16}, "16 does not divide 8"),
    ],
)
def test_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        UNet(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match="remat is one of"):
        UNet(SMALL, "some")


def epsilon(norm):
    """Of a group norm, from what it makes of values that hardly vary."""
    size = norm.scale.shape[0]
    small = 2.0**-10
    probe = jnp.full((1, 2, 2, size), small).at[:, 0].multiply(-1)
    plain = nnx.clone(norm)
    plain.scale, plain.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
    return (small / float(plain(probe)[0, 1, 0, 0])) ** 2 - small**2


def test_the_epsilons_of_its_norms(params):
    network = nnx.merge(unet._abstract(TINY, "none")[0], jax.tree.map(jnp.asarray, params))
    level = network.down_blocks_0
    assert epsilon(level.attentions_0.norm) == pytest.approx(1e-6, rel=0.01)
    for norm in (level.resnets_0.norm1, level.resnets_0.norm2, network.conv_norm_out):
        assert epsilon(norm) == pytest.approx(1e-5, rel=0.01)


def test_group_norm_of_constants_is_its_bias_whatever_its_epsilon():
    norm = diffusion_layers.GroupNorm(4, 2, 1e-5)
    norm.bias[...] = jnp.arange(4.0)
    assert norm(jnp.full((1, 3, 3, 4), 7.0))[0, 1, 1].tolist() == [0, 1, 2, 3]


def test_attention_to_one_token_does_not_depend_on_the_query(params):
    model = UNet(TINY)
    latents, t, context = noisy()

    def other(path, leaf):
        return 2 * leaf if "attn2/to_q" in path_str(path) else leaf

    moved = jax.tree_util.tree_map_with_path(other, params)
    for tokens, same in ((1, True), (3, False)):
        pair = [run(model, p, latents, t, context[:, :tokens]) for p in (params, moved)]
        difference = float(jnp.abs(pair[0] - pair[1]).max())
        assert (difference <= 1e-6) if same else (difference > 1e-3)


def test_one_time_for_all_rows(params):
    latents, _, context = noisy()
    model = UNet(TINY)
    whole = run(model, params, latents, np.array([5.0, 5.0], np.float32), context)
    np.testing.assert_array_equal(run(model, params, latents, 5.0, context), whole)


def test_at_first_it_predicts_no_noise():
    shapes = UNet(TINY).shapes()
    shapes = {"block": shapes["mid_block"]["resnets_0"], "conv_out": shapes["conv_out"]}
    found = jax.jit(lambda key: diffusion_layers.draw(key, shapes, unet.ZERO))(jax.random.key(0))
    assert not np.any(found["conv_out"]["kernel"])
    block = found["block"]
    assert not np.any(block["conv2"]["kernel"])
    assert np.std(block["conv1"]["kernel"]) == pytest.approx(72**-0.5, rel=0.1)
    assert np.all(block["norm1"]["scale"] == 1) and not np.any(block["conv1"]["bias"])
    drawn = jax.eval_shape(UNet(TINY).init, jax.random.key(0))
    assert jax.tree.structure(drawn) == jax.tree.structure(UNet(TINY).shapes())


@pytest.fixture(scope="module")
def slopes():
    """A loss with its gradient with respect to the context, float64, by what is recomputed."""
    latents, t, _ = noisy(TINY, 1)
    with jax.enable_x64(True):
        given = wide((random_params(UNet(EXACT)), latents, t))

        def of(remat):
            def loss(context):
                return jnp.sum(jnp.sin(UNet(EXACT, remat).apply(*given, context)))

            return jax.jit(jax.value_and_grad(loss))

    return {remat: of(remat) for remat in ("none", "full")}


def test_its_gradient_by_finite_differences(slopes):
    context, step = noisy(TINY, 1)[2].astype(np.float64), 1e-6
    direction = np.random.default_rng(2).standard_normal(context.shape)
    with jax.enable_x64(True):
        gradient = np.asarray(slopes["none"](context)[1])
        up, down = (float(slopes["none"](context + s * direction)[0]) for s in (step, -step))
    want = float(np.sum(gradient * direction))
    assert abs(want) > 0.1
    assert (up - down) / (2 * step) == pytest.approx(want, rel=1e-6)


def test_recomputed_blocks_have_the_same_gradient(slopes):
    context = noisy(TINY, 1)[2].astype(np.float64)
    with jax.enable_x64(True):
        kept, again = (np.asarray(slopes[remat](context)[1]) for remat in ("none", "full"))
        text = str(jax.make_jaxpr(slopes["full"])(context))
    np.testing.assert_allclose(again, kept, rtol=1e-9, atol=1e-12)
    # Five residual blocks and four transformers; the primitive's name is not JAX's interface.
    assert len(re.findall(r"(?:remat\d?|checkpoint)\[", text)) == 9


@pytest.mark.parametrize("gradient", [False, True])
def test_blocks_of_queries_are_the_same_attention(gradient, monkeypatch):
    draw = np.random.default_rng(3)
    q, k, v = (draw.standard_normal((2, n, 8)).astype(np.float32) for n in (12, 7, 7))

    def of(q):
        found = attention(q, k, v, 2)
        return jnp.sum(found**2) if gradient else found

    function = jax.grad(of) if gradient else of
    whole = function(q)
    monkeypatch.setattr(diffusion_layers, "MOST_SCORES", 7 * 3)
    np.testing.assert_allclose(function(q), whole, rtol=2e-6, atol=2e-6)
    text = str(jax.make_jaxpr(function)(q))
    assert "2,2,3,7]" in text and "2,2,12,7]" not in text


def test_softmax_statistics_and_times_are_float32_in_bfloat16(params):
    model = UNet(dataclasses.replace(TINY, dtype="bfloat16"))
    latents, t, context = noisy()
    found = []

    def is_jaxpr(value):
        return hasattr(value, "jaxpr") or hasattr(value, "eqns")

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("exp", "cos", "sin", "rsqrt"):
                found.append((eqn.primitive.name, eqn.outvars[0].aval.dtype))
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    walk(getattr(value, "jaxpr", value))

    jaxpr = jax.make_jaxpr(model.apply)(params, latents, t, context)
    walk(jaxpr.jaxpr)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    assert {name for name, _ in found} == {"exp", "cos", "sin", "rsqrt"}
    assert all(dtype == jnp.float32 for _, dtype in found)


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mesh_does_not_change_its_numbers(params, gradient):
    model = UNet(TINY)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    placed = jax.device_put(params, param_shardings(params, mesh, RULES))
    latents, t, context = (np.concatenate([x, x]) for x in noisy())
    latents = latents + np.arange(4, dtype=np.float32)[:, None, None, None]

    def of(params, latents):
        return model.apply(params, latents, t, context)

    def loss(params, latents):
        return jnp.mean(of(params, latents) ** 2)

    function = jax.jit(jax.grad(loss) if gradient else of)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    want = jax.tree.leaves(function(params, latents))
    found = jax.tree.leaves(function(placed, jax.device_put(latents, split)))
    pairs = [
        tuple(np.asarray(x, np.float64) for x in pair) for pair in zip(found, want, strict=True)
    ]
    error = sum(np.sum((x - y) ** 2) for x, y in pairs) ** 0.5
    assert error <= 1e-6 * sum(np.sum(y**2) for _, y in pairs) ** 0.5 > 0
