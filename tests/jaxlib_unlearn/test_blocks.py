"""Which block a leaf belongs to, by common naming schemes; what TEON groups and reports."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import matrices
from jaxlib_unlearn.optim.blocks import layer_of, layers_of

D = 4


@pytest.mark.parametrize(
    ("path", "kind", "block"),
    [
        ("params/Block_3/Dense_1/kernel", "params/Block_*/Dense_1/kernel", 3),
        ("Block_12/MultiHeadDotProductAttention_0/query/kernel", None, 12),
        ("layers_0/kernel", "layers_*/kernel", 0),  # nn.Sequential
        ("decoder/layers_7/mlp/wi_0/kernel", "decoder/layers_*/mlp/wi_0/kernel", 7),
        ("Transformer/encoderblock_3/Dense_0/kernel", None, 3),
        ("h_3/c_attn/kernel", "h_*/c_attn/kernel", 3),
        ("transformer/h3_attn/query/w", "transformer/h*_attn/query/w", 3),
        ("transformer/~/layer_2/query/w", "transformer/~/layer_*/query/w", 2),
        ("model.layers.7.self_attn.q_proj.weight", "model/layers/*/self_attn/q_proj/weight", 7),
        ("encoder/layer/5/attention/self/query/kernel", None, 5),
        ("blocks.7/attn/q", "blocks/*/attn/q", 7),
        ("name0/w1", "name*/w1", 0),
        ("unit_4/wq2/kernel", "unit_*/wq2/kernel", 4),
        ("layers_2/experts/1/up/kernel", "layers_*/experts/1/up/kernel", 2),
        ("h/3/attn/c_attn", "h/*/attn/c_attn", 3),
        ("experts/1/layers/2/up", "experts/1/layers/*/up", 2),
        ("3", "*", 3),
    ],
)
def test_the_number_of_a_block(path, kind, block):
    found = layer_of(path, False)
    assert found is not None and found[1] == block
    assert kind is None or found[0] == kind


def test_stacks():
    assert layer_of("layers/1/q/kernel", True) == ("layers/*/q/kernel", None)
    assert layer_of("layers/q/kernel", True) == ("layers/q/kernel", None)


@pytest.mark.parametrize(
    "path",
    [
        "Dense_0/kernel",  # siblings: the four of one attention, or a plain MLP
        "attn/Dense_3/kernel",
        "mlp/w1",
        "wq2/kernel",
        "conv1/kernel",
        "mlp/fc2/weight",
        "up/kernel",
        "experts/1/up/kernel",  # side by side
        "Expert_1/up/kernel",
    ],
)
def test_numbers_that_are_no_blocks(path):
    assert layer_of(path, False) is None


@pytest.mark.parametrize(
    ("paths", "blocks"),
    [
        # The outermost repeated name counts; a tower that is not repeated is ignored.
        (["Encoder_0/Unit_0/q/w", "Encoder_0/Unit_1/q/w"], [0, 1]),
        (["Unit_0/Sub_0/q/w", "Unit_0/Sub_1/q/w", "Unit_1/Sub_0/q/w"], [0, 0, 1]),
        (["stage_0/Block_0/q/w", "stage_0/Block_1/q/w", "stage_1/Block_0/q/w"], [0, 1, 0]),
        (["layer1/0/q/w", "layer1/1/q/w"], [0, 1]),
        # Names that are numbered from the second one on.
        (["net/block/q/w", "net/block_1/q/w", "net/block_2/q/w"], [0, 1, 2]),
        (["attn/q/w", "attn_1/q/w"], [0, 1]),
        (["q/w", "q_1/w"], [None, None]),
        (["block/mlp_1/up/w", "block_1/mlp_1/up/w", "block_2/mlp_1/up/w"], [0, 1, 2]),
        (["u_0/attn/q/w", "u_0/attn_1/q/w", "u_1/attn/q/w"], [0, 0, 1]),
        (["block/q/w", "block_0/q/w", "block_1/q/w"], [None, 0, 1]),
    ],
)
def test_what_counts_depends_on_what_comes_again(paths, blocks):
    found = layers_of([(path, False, (D, D)) for path in paths])
    assert [where and where[1] for where in found] == blocks
    kinds = {where[0] for where in found if where}
    assert len(kinds) <= 2


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
        return linen.Dense(D)(linen.Dense(D)(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(4):
            x = LinenBlock()(x)
        return x


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(4):
            x = linen.Dense(D)(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)


class Nnx(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([NnxBlock(nnx.Rngs(0)) for _ in range(4)])


class Equinox(eqx.Module):
    blocks: list

    def __init__(self):
        self.blocks = [eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0)) for _ in range(4)]


def linen_shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3, D)))


def repeated(name, *leaves):
    return {name(i): {leaf: {"w": jnp.zeros((D, D))} for leaf in leaves} for i in range(4)}


TREES = {
    "linen": lambda: linen_shapes(Linen()),
    "nnx state": lambda: nnx.state(Nnx(), nnx.Param),
    "nnx pure dict": lambda: nnx.to_pure_dict(nnx.state(Nnx(), nnx.Param)),
    "equinox": lambda: eqx.filter(Equinox(), eqx.is_inexact_array),
    "haiku": lambda: repeated(lambda i: f"transformer/h{i}_attn", "query", "key", "value"),
    "haiku, first without number": lambda: repeated(
        lambda i: f"net/~/block_{i}".removesuffix("_0"), "query", "key", "value"
    ),
    "unscanned MaxText": lambda: {
        "decoder": repeated(lambda i: f"layers_{i}", "query", "key", "value")
    },
    "HF": lambda: {
        f"model.layers.{i}.self_attn.{leaf}_proj.weight": jnp.zeros((D, D))
        for i in range(4)
        for leaf in "qkv"
    },
}


@pytest.mark.parametrize("name", TREES)
def test_teon_groups_the_trees_people_have(name):
    """Query, key and value of four blocks in pairs, and nothing else."""
    tree = TREES[name]()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
    lines = matrices.describe(shapes, optim.teon(0.1)).splitlines()
    assert "group" in lines[0].split()
    pairs = [line for line in lines if "blocks 0+1" in line or "blocks 2+3" in line]
    assert len(pairs) == 12
    assert not any("alone" in line for line in lines)


@pytest.mark.parametrize(
    ("tx", "tree", "words"),
    [
        (optim.scale_by_teon(), lambda: linen_shapes(Mlp()), ["Dense_0/kernel", "no number"]),
        (optim.teon(0.1), lambda: linen_shapes(Mlp()), ["groups=", "picks none", "Dense_1/kernel"]),
        (
            optim.teon(0.1, groups="Dense"),
            lambda: {"attn": {f"Dense_{i}": {"kernel": jnp.zeros((D, D))} for i in range(4)}},
            ["no number"],
        ),
        (
            optim.teon(0.1),
            lambda: {"Block_2": {"query": {"kernel": jnp.zeros((D, D))}}},
            ["Block_2/query/kernel", "block 2 alone, without 3"],
        ),
        (
            optim.scale_by_teon(4),
            lambda: {"w": jnp.zeros((3, D, D))},
            ["'w'", "block 0-2 alone, without 3"],
        ),
        (
            optim.teon(0.1, group_size=3, groups=lambda path: path.startswith("a")),
            lambda: {"layers": {"q": {"kernel": jnp.zeros((6, D, D))}}},
            ["layers/q/kernel", "picks none"],
        ),
    ],
)
def test_no_group_is_an_error(tx, tree, words):
    with pytest.raises(ValueError, match="finds no group") as caught:
        jax.eval_shape(tx.init, tree())
    for word in [*words, "group_size=1"]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_group_is_no_error():
    """No matrices at all, or K = 1."""
    bias, kernel = {"bias": jnp.ones(3)}, {"Dense_0": {"kernel": jnp.eye(D)}}
    for tx, params in ((optim.teon(0.1), bias), (optim.teon(0.1, group_size=1), kernel)):
        updates, _ = tx.update(params, tx.init(params), params)
        for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert update.shape == leaf.shape and np.any(update)


def test_a_frozen_block_leaves_its_partner_alone_and_describe_says_so():
    names = [f"Block_{i}" for i in range(4)]
    params = {n: {"query": {"kernel": jnp.asarray(np.eye(D), jnp.float32)}} for n in names}
    train = {n: n != "Block_1" for n in names}
    tx = optax.masked(optim.teon(1.0, orthogonalize="svd"), train)
    lines = {line.split()[0]: line for line in matrices.describe(params, tx).splitlines()}
    assert "block 0 alone, without 1" in lines["Block_0/query/kernel"]
    assert "nothing" in lines["Block_1/query/kernel"] and " - " in lines["Block_1/query/kernel"]
    assert "blocks 2+3" in lines["Block_2/query/kernel"]
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    sizes = [float(jnp.linalg.norm(updates[n]["query"]["kernel"], 2)) for n in names]
    assert sizes[0] == pytest.approx(1.0, abs=1e-5)  # Muon's
    assert sizes[2:] == pytest.approx([0.5**0.5] * 2, abs=1e-5)  # shared


def test_describe_says_stacks_and_more_than_once():
    tx = optim.teon(0.1)
    params = {
        "layers": {"q": {"kernel": jnp.zeros((5, D, D))}, "up": {"kernel": jnp.ones((5, D, D))}}
    }
    for _ in range(2):  # JAX remembers what it traced
        lines = matrices.describe(params, tx).splitlines()
        assert "blocks 0-3 by 2, block 4 alone, without 5" in lines[1]
        assert "  -  " in lines[2]
    assert "group" not in matrices.describe(params, optim.muon(0.1))


def test_stacked_experts_are_no_blocks():
    """Layer by layer with their expert axis, not expert by expert."""
    names = ("layers_0", "layers_1")
    params = {n: {"experts": {"up": {"kernel": jnp.zeros((3, D, D))}}} for n in names}
    text = matrices.describe(params, optim.teon(0.1, groups=None))
    assert text.count("blocks 0+1") == 2
    with pytest.raises(ValueError, match="no number of a block"):
        optim.teon(0.1, groups=None).init({"experts": {"up": {"kernel": jnp.zeros((4, D, D))}}})
