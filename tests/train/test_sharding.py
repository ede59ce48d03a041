"""Meshes and layouts: every leaf has a rule, axes that do not divide stay whole, clear errors."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlib_unlearn.errors import UserError
from models.decoder import lora
from models.decoder.asked import AskedDecoder
from models.decoder.model import Decoder, DecoderConfig
from models.files.families import FAMILIES, from_hf
from models.layout import DECODER
from train.costs.flops import count
from train.costs.hlo_flops import device_flops
from train.engine.step import shaped
from train.runtime.sharding import (
    MeshConfig,
    batch_sharding,
    check_batch,
    describe,
    make_mesh,
    param_shardings,
    path_str,
    put_batch,
    put_params,
    spec_of,
    state_shardings,
)

TINY = DecoderConfig(64, 16, 32, 2, 4, 2, 4)
HF = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


def family_configs():
    """Every family, tied and untied, with every bias its config file can ask for."""
    for name, family in FAMILIES.items():
        named = {family.key(key): value for key, value in HF.items() if family.key(key)}
        named[family.key("hidden_act")] = next(iter(family.activations))
        for tied in (True, False):
            raw = {**named, "model_type": name, "tie_word_embeddings": tied}
            yield f"{name}-{'tied' if tied else 'untied'}", from_hf(raw)
            raw |= {"attention_bias": True, "mlp_bias": True}
            yield f"{name}-{'tied' if tied else 'untied'}-biases", from_hf(raw)
    every = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True}
    yield "everything", dataclasses.replace(TINY, tie_embeddings=False, **every)


CONFIGS = dict(family_configs())


@pytest.fixture(scope="module")
def cube():
    return make_mesh(MeshConfig(2, 2, 2))


def leaves(tree):
    return {path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def adapters_of(params):
    return jax.eval_shape(lambda: lora.init(params, 2, list(lora.kernels(params))))


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_lie_where_their_kernels_do(name, cube):
    """The long axis of each adapter is split like that axis of its kernel; the rank is whole."""
    shapes = Decoder(CONFIGS[name]).shapes()
    kernels = leaves(param_shardings(shapes, cube))
    found = leaves(param_shardings(adapters_of(shapes), cube))
    assert len(found) == 2 * len(lora.kernels(shapes))
    for path, where in found.items():
        stem, which, _ = path.rsplit("/", 2)
        spec = kernels[f"{stem}/kernel"].spec
        expected = P(None, spec[1], None) if which == "lora_a" else P(None, None, spec[2])
        assert where.spec == expected, path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_leaf_of_every_family_has_a_rule(name, cube):
    shapes = Decoder(CONFIGS[name]).shapes()
    found = leaves(param_shardings(shapes, cube))
    assert found.keys() == leaves(shapes).keys()
    for path, where in found.items():
        used = [axis for axis in where.spec if axis is not None]
        if path.endswith(("scale", "bias")):
            assert used == [], path
        elif path == "positions/embedding":
            assert used == ["fsdp"]
        else:
            assert sorted(used) == ["fsdp", "tp"], path
        if path.startswith("layers"):
            assert where.spec == P() or where.spec[0] is None  # the stack axis stays whole


def test_the_configs_above_have_every_optional_leaf():
    paths = set().union(*(leaves(Decoder(c).shapes()) for c in CONFIGS.values()))
    for part in ("attn/q/bias", "attn/o/bias", "mlp/up/bias", "attn/q_norm/scale"):
        assert f"layers/{part}" in paths
    assert {"lm_head/kernel", "positions/embedding", "final_norm/bias"} <= paths
    paths |= leaves(adapters_of(Decoder(TINY).shapes())).keys()
    # Every rule is used.
    for pattern, axes in DECODER:
        assert any(re.search(pattern, path) for path in paths), (pattern, axes)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("embed/embedding", (64, 16), P("tp", "fsdp")),
        ("lm_head/kernel", (16, 64), P("fsdp", "tp")),
        ("layers/attn/q/kernel", (2, 16, 16), P(None, "fsdp", "tp")),
        ("layers/attn/o/kernel", (2, 16, 16), P(None, "tp", "fsdp")),
        ("layers/mlp/down/kernel", (2, 32, 16), P(None, "tp", "fsdp")),
        ("layers/1/mlp/gate/kernel", (2, 16, 32), P(None, "fsdp", "tp")),  # a tuple of stacks
        ("layers/attn/q/bias", (2, 16), P(None, None)),
        ("final_norm/scale", (16,), P(None)),
        ("positions/embedding", (34, 16), P(None, "fsdp")),
        # An axis that does not divide stays whole, each axis by itself.
        ("embed/embedding", (63, 16), P(None, "fsdp")),
        ("embed/embedding", (64, 15), P("tp", None)),
        ("layers/attn/k/kernel", (3, 15, 7), P(None, None, None)),
    ],
)
def test_spec_of(path, shape, expected, cube):
    assert spec_of(path, shape, cube) == expected


def test_spec_of_an_unknown_leaf(cube):
    with pytest.raises(ValueError, match="no sharding rule matches parameter 'router/kernel'"):
        spec_of("router/kernel", (16, 4), cube)


def test_put_params_splits_and_keeps_the_numbers(cube):
    config = dataclasses.replace(TINY, vocab_size=63, qkv_bias=True)
    params = Decoder(config).init(jax.random.key(0))
    placed = put_params(params, cube)
    for path, x in leaves(placed).items():
        ways = math.prod(cube.shape[a] for a in x.sharding.spec if a)
        assert {s.data.size for s in x.addressable_shards} == {x.size // ways}, path
        assert np.array_equal(x, leaves(params)[path])
    assert placed["embed"]["embedding"].sharding.spec == P(None, "fsdp")


def test_batches_are_split_over_data_and_fsdp(cube):
    batch = {"tokens": np.arange(32).reshape(8, 4), "row_id": np.arange(8)}
    placed = put_batch(batch, cube)
    assert batch_sharding(cube).spec == P(("data", "fsdp"))
    for name, x in placed.items():
        assert np.array_equal(x, batch[name])
        assert all(s.data.shape[0] == 2 for s in x.addressable_shards)  # 4 ways; tp holds copies
    parts = {s.index[0].start: s.data.tolist() for s in placed["row_id"].addressable_shards}
    assert parts == {0: [0, 1], 2: [2, 3], 4: [4, 5], 6: [6, 7]}


def test_state_shardings_follow_the_parameters(cube):
    shapes = Decoder(TINY).shapes()
    shapes = shaped(shapes, param_shardings(shapes, cube))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(tx.init, shapes)
    found = leaves(state_shardings(state, shapes, cube))
    assert found["1/0/mu/layers/attn/q/kernel"].spec == P(None, "fsdp", "tp")
    assert found["1/0/nu/embed/embedding"].spec == P("tp", "fsdp")
    assert found["1/0/count"].spec == P()
    # A leaf with a parameter's path but another shape (a factored moment) is not split by its rule.
    factored = {"rows": {"embed": {"embedding": jax.ShapeDtypeStruct((64,), jnp.float32)}}}
    assert leaves(state_shardings(factored, shapes, cube))["rows/embed/embedding"].spec == P()


@pytest.mark.parametrize(
    ("config", "count", "expected"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1)),
        (MeshConfig(-1, 2, 2), 4, (1, 2, 2)),
        (MeshConfig(1, 1, 1), 8, (1, 1, 1)),  # a part of the devices
        (MeshConfig(-1, 3, 1), 8, (2, 3, 1)),
    ],
)
def test_make_mesh(config, count, expected):
    mesh = make_mesh(config, jax.devices()[:count])
    assert mesh.axis_names == ("data", "fsdp", "tp")
    assert tuple(mesh.shape.values()) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.ravel().tolist() == jax.devices()[: math.prod(expected)]


def test_queries_are_the_outermost_axis():
    mesh = make_mesh(MeshConfig(fsdp=2, query=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"query": 2, "data": 2, "fsdp": 2, "tp": 1}
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    with pytest.raises(UserError, match="mesh query 3 x data 1 x fsdp 4 x tp 1 needs 12 devices"):
        make_mesh(MeshConfig(1, 4, 1, 3), jax.devices()[:8])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(16), "needs 16 devices, 8 are present; lower --mesh.data"),
        (MeshConfig(-1, 16, 1), "mesh data 1 x fsdp 16 x tp 1 needs 16 devices, 8 are present"),
        (MeshConfig(4, 2, 2), "mesh data 4 x fsdp 2 x tp 2 needs 16 devices"),
        (MeshConfig(0), "sizes must be positive"),
        (MeshConfig(-2), "sizes must be positive"),
        (MeshConfig(1, 0, 1), "sizes must be positive"),
        (MeshConfig(-1, 1, -1), "sizes must be positive"),
    ],
)
def test_make_mesh_errors(config, message):
    with pytest.raises(UserError, match=message) as error:
        make_mesh(config, jax.devices()[:8])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "accumulate", "message"),
    [
        (8, 1, None),
        (16, 4, None),
        (6, 1, "unlearning batch size 6 does not divide over data x fsdp = 4 with 1 micro-batch"),
        (8, 4, "use a multiple of 16 or another mesh"),
        (0, 1, "must be at least 1"),
        (8, 0, "must be at least 1"),
        (-4, 1, "must be at least 1"),
    ],
)
def test_check_batch(batch, accumulate, message, cube):
    if message is None:
        return check_batch(cube, batch, accumulate, "unlearning")
    with pytest.raises(UserError, match=message) as error:
        check_batch(cube, batch, accumulate, "unlearning")
    assert "\n" not in str(error.value)


def test_describe_lists_every_leaf(cube):
    shapes = Decoder(TINY).shapes()
    lines = describe(shapes, cube).splitlines()
    assert [line.split()[0] for line in lines] == list(leaves(shapes))
    line = next(line for line in lines if line.startswith("embed/embedding"))
    assert "(64, 16)" in line and "'tp', 'fsdp'" in line and line.endswith("0.00 MiB")
    big = {"embed": {"embedding": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}}
    assert describe(big, cube).endswith(" 2.00 MiB")  # 8 MiB over tp x fsdp = 4


ODD = DecoderConfig(257, 48, 96, 2, 9, 3, 8)  # nine heads in three groups, a vocabulary of 257


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 2), (2, 1, 4)])
def test_what_tp_does_not_divide_is_padded_in_the_program(sizes, tied):
    """The same loss and gradient, no padded parameter, and no device does more than its share."""
    decoder = Decoder(dataclasses.replace(ODD, tie_embeddings=tied))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 257, (4, 24)),
        "positions": np.tile(np.arange(24), (4, 1)),
        "segment_ids": np.ones((4, 24)),
        "label_index": np.tile(np.arange(7, 23), (4, 1)),
        "targets": rng.integers(0, 257, (4, 16)),
        "target_mask": np.ones((4, 16)),
    }
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    params = jax.jit(decoder.init)(jax.random.key(0))

    def loss(params, batch):
        return -jnp.mean(AskedDecoder(decoder, params).log_probs(batch))

    gradient = jax.value_and_grad(loss)
    want = jax.jit(gradient)(params, batch)
    shardings = param_shardings(params, mesh)
    program = (
        jax.jit(gradient, out_shardings=(None, shardings))
        .lower(jax.device_put(params, shardings), put_batch(batch, mesh))
        .compile()
    )
    found = program(jax.device_put(params, shardings), put_batch(batch, mesh))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, want)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6 * float(jnp.max(jnp.abs(wanted))))
    # Three groups on two or four devices: a third more of attention, which is a twentieth here.
    # If every device did all of attention and head, it would be 1.16 to 1.74.
    share = count(gradient, params, batch).flops / math.prod(sizes)
    assert device_flops(program).flops < 1.04 * share
