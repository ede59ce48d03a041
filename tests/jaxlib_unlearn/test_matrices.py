"""Which update rule each leaf gets, on common parameter trees."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jaxlib_unlearn import optim
from jaxlib_unlearn.optim import matrices as m

L, D, F, V = 3, 8, 12, 20


def stack_of_blocks(biases=True):
    attn = {n: {"kernel": np.zeros((L, D, D))} for n in "qkvo"}
    mlp = {n: {"kernel": np.zeros((L, D, F))} for n in ("gate", "up")}
    mlp["down"] = {"kernel": np.zeros((L, F, D))}
    if biases:
        for part in (attn, mlp):
            for leaf in part.values():
                leaf["bias"] = np.zeros((L, leaf["kernel"].shape[-1]))
    attn |= {n: {"scale": np.zeros((L, 4))} for n in ("q_norm", "k_norm")}
    norms = {n: {"scale": np.zeros((L, D))} for n in ("attn_norm", "mlp_norm")}
    return {"attn": attn, "mlp": mlp, **norms}


def decoder(layers):
    return {
        "embed": {"embedding": np.zeros((V, D))},
        "layers": layers,
        "final_norm": {"scale": np.zeros(D)},
        "lm_head": {"kernel": np.zeros((D, V))},
    }


def found(tree, **options):
    """path -> axes of the leaves that are matrices."""
    paths = [m.path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    axes = m.resolve(tree, **options)
    return {p: a for p, a in zip(paths, axes, strict=True) if a is not None}


@pytest.mark.parametrize("tail", ["", "/value"])
def test_decoder_tree(tail):
    tree = decoder(stack_of_blocks())
    if tail:
        tree = jax.tree.map(lambda x: {"value": x}, tree)
    got = found(tree)
    assert len(got) == 7
    assert set(got.values()) == {m.MatrixAxes((0,), (1,), (2,))}
    assert all(p.startswith(("layers/attn", "layers/mlp")) for p in got)
    assert all(p.endswith("kernel") for p in got)
    assert got["layers/mlp/down/kernel"].sizes((L, F, D)) == (L, F, D)


def test_tuple_of_consecutive_stacks():
    got = found(decoder((stack_of_blocks(), stack_of_blocks(False))))
    assert len(got) == 14
    assert set(got.values()) == {m.MatrixAxes((0,), (1,), (2,))}


def test_list_of_layers():
    layers = [jax.tree.map(lambda x: x[0], stack_of_blocks()) for _ in range(2)]
    got = found(decoder(layers))
    assert len(got) == 14
    assert set(got.values()) == {m.MatrixAxes((), (0,), (1,))}


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("layers/attn/q/kernel", (3, 4, 5), ((0,), (1,), (2,))),
        ("layers/mlp/experts/up/kernel", (3, 2, 4, 5), ((0, 1), (2,), (3,))),
        ("experts/up/kernel", (2, 4, 5), ((0,), (1,), (2,))),
        ("attn/query/kernel", (4, 2, 3), ((), (0,), (1, 2))),
        ("layers/0/attn/query/kernel", (4, 2, 3), ((), (0,), (1, 2))),
        ("layers/attn/query/kernel", (5, 4, 2, 3), ((0,), (1,), (2, 3))),
        ("layers/attn/query/kernel", (5, 4, 6), ((0,), (1,), (2,))),
        ("attn/out/kernel", (2, 3, 4), ((), (0, 1), (2,))),
        ("layers/attn/out/kernel", (5, 2, 3, 4), ((0,), (1, 2), (3,))),
        ("Dense_0/kernel", (4, 5), ((), (0,), (1,))),
        ("blocks/1/fc1/weight", (4, 5), ((), (0,), (1,))),
        ("w", (4, 5), ((), (0,), (1,))),
        ("ws/3/w1", (4, 5), ((), (0,), (1,))),
        ("", (4, 5), ((), (0,), (1,))),
        ("0", (4, 5), ((), (0,), (1,))),
        ("layers/mlp/gate/kernel", (3, 4, 5), ((0,), (1,), (2,))),
    ],
)
def test_matrices(path, shape, expected):
    assert m.matrix_axes(path, np.zeros(shape)) == m.MatrixAxes(*expected)


@pytest.mark.parametrize(
    "path, shape",
    [
        ("embed/embedding", (20, 8)),
        ("patch_embed/kernel", (4, 4, 3, 8)),
        ("transformer/wte", (20, 8)),
        ("wpe", (20, 8)),
        ("pos_embedding", (1, 20, 8)),
        ("lm_head/kernel", (8, 20)),
        ("head/kernel", (8, 20)),
        ("layers/attn_norm/scale", (3, 8)),
        ("layers/ln_1/weight", (3, 8)),
        ("layers/attn/q/bias", (3, 8)),
        ("layers/attn/q_bias", (3, 8)),
        ("layers/mlp/router/kernel", (3, 8, 4)),
        ("layers/mamba/conv1d/kernel", (3, 4, 1, 8)),
        ("b", (3, 8)),
        ("w", (8,)),
        ("temperature", ()),
    ],
)
def test_adamw(path, shape):
    assert m.matrix_axes(path, np.zeros(shape)) is None


@pytest.mark.parametrize(
    "path, shape",
    [
        ("mystery", (4, 5)),
        ("layers/mystery", (3, 8)),
        ("layers/attn/q/kernel", (3, 8)),
        ("attn/q/kernel", (3, 4, 5)),
        ("out/kernel", (3, 4, 5)),
        ("Conv_0/kernel", (3, 3, 4, 5)),
        ("w", (2, 4, 5)),
        ("lora_a", (4, 2)),
        ("q/lora_b", (2, 4)),  # no bias
        ("lm_head/Dense_0/kernel", (4, 5)),  # a hidden layer or the output?
        ("classifier/out_proj/weight", (4, 5)),
        ("patch_embed/Dense_0/kernel", (4, 5)),
        ("embed_proj/kernel", (4, 5)),
        ("PreNormDense_0/norm_mlp/kernel", (4, 5)),
    ],
)
def test_ambiguous_leaves_are_named(path, shape):
    with pytest.raises(ValueError, match=f"'{path}'"):
        m.matrix_axes(path, np.zeros(shape))
    assert "ambiguous" in m.describe({path: np.zeros(shape)})


@pytest.mark.parametrize(
    "path",
    [
        "PreNormBlock_0/Dense_0/kernel",
        "PreNorm_0/qkv/kernel",
        "normalizing_flow/mlp/kernel",
        "score/Dense_0/kernel",
        "time_embed/Dense_0/kernel",
        "TimestepEmbedding_0/linear_1/weight",
        "AdaLayerNormZero_0/linear/weight",
        "NormedLinear_0/kernel",
        "multi_head/query/kernel",
    ],
)
def test_the_owner_decides(path):
    """Names further up do not decide for a hidden matrix; either rule orthogonalises it."""
    assert m.matrix_axes(path, np.zeros((4, 5))) == m.MatrixAxes((), (0,), (1,))
    assert m.labels({path: np.zeros((4, 5))}) == {path: "muon"}
    optim.scale_by_muon().init({path: jnp.zeros((4, 5))})


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("PreNormBlock_0/LayerNorm_0/weight", (4, 5)),
        ("layers/norm_mlp/weight", (3, 5)),
        ("layers/ln_mlp/weight", (3, 5)),
        ("decoder/logits_dense/kernel", (4, 5)),
        ("PatchEmbed_0/Conv_0/kernel", (2, 2, 4, 5)),
        ("embeddings/patch_embeddings/projection/weight", (5, 3, 2, 2)),
        ("embed/table", (4, 5)),
        ("score/weight", (4, 5)),
        ("model.embed_tokens.weight", (4, 5)),
    ],
)
def test_the_owner_decides_for_adamw(path, shape):
    assert m.matrix_axes(path, np.zeros(shape)) is None


NAMELESS = {
    "wq": (4, 4),
    "q": (4, 4),
    "theta": (4, 5),
    "lora_a": (4, 2),
    "lora_b": (2, 4),
    "mlp": {"up": (4, 8)},
    "layers": {"q": (3, 4, 4)},
}


def zeros(shapes):
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_all_2d():
    """Uninformative names: an error that names the option, which makes them matrices."""
    for name, shape in NAMELESS.items():
        with pytest.raises(ValueError, match="matrices='all_2d'"):
            m.labels(zeros({name: shape}))
    tree = zeros(NAMELESS | {"norm": (4,), "embed": {"table": (9, 4)}, "lm_head": (4, 9)})
    labels = m.labels(tree, matrices="all_2d")
    assert [labels.pop(name) for name in ("embed", "lm_head", "norm")] == [
        {"table": "adamw"},
        "adamw",
        "adamw",
    ]
    assert set(jax.tree.leaves(labels)) == {"muon"}
    assert found(tree, matrices="all_2d")["layers/q"] == m.MatrixAxes((0,), (1,), (2,))
    assert "ambiguous" not in m.describe(tree, matrices="all_2d")
    for make in (optim.muon, optim.sift, optim.zo_muon):
        jax.eval_shape(make(0.1, matrices="all_2d").init, tree)
    jax.eval_shape(optim.teon(0.1, matrices="all_2d").init, tree)
    for shape in ((3, 4, 5), (2, 2, 4, 5)):  # not two axes
        with pytest.raises(ValueError, match="'mystery'") as caught:
            m.labels(zeros({"mystery": shape}), matrices="all_2d")
        assert "all_2d" not in str(caught.value)
    for make in (optim.muon, optim.zo_muon):
        with pytest.raises(ValueError, match="all_2d.*'all_3d'"):
            make(0.1, matrices="all_3d").init(tree)


def test_words_in_a_tree():
    """The rules for most leaves, one subtree given explicitly: the fix for an ambiguous leaf."""
    tree = zeros(
        {
            "encoder": {"Dense_0": {"kernel": (4, 4)}, "norm": {"scale": (4,)}},
            "classifier": {"dense": {"kernel": (4, 4)}, "out_proj": {"kernel": (4, 2)}},
            "theta": (4, 4),
        }
    )
    with pytest.raises(ValueError, match="below 'classifier'.*'rules'"):
        m.labels(tree)
    specs = {
        "encoder": "rules",
        "classifier": {"dense": MuonDimensionNumbers(), "out_proj": None},
        "theta": "all_2d",
    }
    assert m.labels(tree, matrices=specs) == {
        "encoder": {"Dense_0": {"kernel": "muon"}, "norm": {"scale": "adamw"}},
        "classifier": {"dense": {"kernel": "muon"}, "out_proj": {"kernel": "adamw"}},
        "theta": "muon",
    }
    assert m.labels(tree, matrices=lambda params: specs) == m.labels(tree, matrices=specs)
    jax.eval_shape(optim.muon(0.1, matrices=specs).init, tree)


HF = {  # as torch keeps them: layout="out_in"
    "model.embed_tokens.weight": (V, D),
    "model.layers.0.self_attn.q_proj.weight": (D, D),
    "model.layers.0.self_attn.q_proj.bias": (D,),
    "model.layers.0.mlp.down_proj.weight": (D, F),
    "model.layers.0.input_layernorm.weight": (D,),
    "model.norm.weight": (D,),
    "lm_head.weight": (V, D),
}
HAIKU = {
    "transformer/h0_attn/query": {"w": (D, D), "b": (D,)},
    "transformer/h0_ln_1": {"scale": (D,), "offset": (D,)},
    "transformer/~/mlp/linear_1": {"w": (D, F)},
    "embed": {"embeddings": (V, D)},
    "lm_head": {"w": (D, V)},
}


def maxtext(stacked):
    """A decoder of MaxText, scanned with param_scan_axis=0 or 1."""

    def leaf(*shape):
        return (L, *shape) if stacked == 0 else (shape[0], L, *shape[1:])

    attention = {n: {"kernel": leaf(D, 2, 4)} for n in ("query", "key", "value")}
    attention["out"] = {"kernel": leaf(2, 4, D)}
    mlp = {"wi_0": {"kernel": leaf(D, F)}, "wo": {"kernel": leaf(F, D)}}
    layers = {"self_attention": attention, "mlp": mlp}
    layers["pre_self_attention_layer_norm"] = {"scale": leaf(D)}
    return {
        "decoder": {"layers": layers, "logits_dense": {"kernel": (D, V)}},
        "token_embedder": {"embedding": (V, D)},
    }


def test_hf_and_haiku_names():
    got = found(zeros(HF), layout="out_in")
    assert set(got) == {k for k in HF if k.endswith("_proj.weight")}
    assert got["model.layers.0.mlp.down_proj.weight"] == m.MatrixAxes((), (1,), (0,))
    assert set(found(zeros(HAIKU))) == {
        "transformer/h0_attn/query/w",
        "transformer/~/mlp/linear_1/w",
    }


def test_maxtext():
    """Scanned along axis 0 it is a decoder like ours; along axis 1 it is refused, not misread."""
    got = found(zeros(maxtext(0)))
    assert got["decoder/layers/self_attention/out/kernel"].sizes((L, 2, 4, D)) == (L, 8, D)
    assert {path.split("/")[-2] for path in got} == {"query", "key", "value", "out", "wi_0", "wo"}
    assert all(axes.stack == (0,) for axes in got.values())
    tree = zeros(maxtext(1))
    with pytest.raises(ValueError, match="wi_0.*param_scan_axis=0.*matrices="):
        m.labels(tree)
    assert m.describe(tree).count("ambiguous") == 6


def test_layout():
    kernel = np.zeros((L, 5, 7))
    axes = m.matrix_axes("layers/up/weight", kernel, layout="out_in")
    assert axes == m.MatrixAxes((0,), (2,), (1,))
    assert axes is not None and axes.sizes(kernel.shape) == (L, 7, 5)
    with pytest.raises(ValueError, match="layout"):
        m.matrix_axes("w", np.zeros((2, 2)), layout="oi")


def test_dimension_numbers_tree_prefix_and_callable():
    tree = {
        "conv": {"kernel": np.zeros((3, 3, 4, 5)), "bias": np.zeros(5)},
        "mlp": {"a": np.zeros((2, 4, 6)), "b": np.zeros((2, 4, 6))},
        "rest": np.zeros((4, 4)),
    }
    specs = {
        "conv": {"kernel": MuonDimensionNumbers((0, 1, 2), -1), "bias": None},
        "mlp": MuonDimensionNumbers(2, 1),
        "rest": None,
    }
    expected = {
        "conv/kernel": m.MatrixAxes((), (0, 1, 2), (3,)),
        "mlp/a": m.MatrixAxes((0,), (2,), (1,)),
        "mlp/b": m.MatrixAxes((0,), (2,), (1,)),
    }
    assert found(tree, matrices=specs) == expected
    assert found(tree, matrices=lambda params: specs) == expected
    labels = m.labels(tree, matrices=specs)
    assert labels["conv"] == {"kernel": "muon", "bias": "adamw"}
    assert "1 x (36 in, 5 out)" in m.describe(tree, matrices=specs)
    with pytest.raises(ValueError, match="'rest'"):
        found(tree, matrices=specs | {"rest": MuonDimensionNumbers(0, 2)})
    with pytest.raises(ValueError, match="'rest'"):
        found(tree, matrices=specs | {"rest": MuonDimensionNumbers(0, 0)})


def test_dimension_numbers_on_a_masked_tree():
    # What a transformation inside optax.partition sees.
    masked = {"a": np.zeros((2, 3)), "b": optax.MaskedNode(), "c": np.zeros((3, 2))}
    specs = {"a": MuonDimensionNumbers(), "b": None, "c": MuonDimensionNumbers(1, 0)}
    assert [a and a.fan_in for a in m.resolve(masked, specs)] == [(0,), (1,)]


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(V, D)(x)
        x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
        return linen.Dense(V, name="lm_head")(linen.Dense(F)(x))


def test_linen():
    shapes = jax.eval_shape(LinenBlock().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    got = found(shapes)
    name = "params/MultiHeadDotProductAttention_0"
    assert set(got) == {
        "params/Dense_0/kernel",
        *(f"{name}/{part}/kernel" for part in ("query", "key", "value", "out")),
    }
    assert got[f"{name}/out/kernel"].sizes((2, 4, D)) == (1, 8, D)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])


def test_nnx_state_and_pure_dict():
    state = nnx.state(NnxBlock(nnx.Rngs(0)), nnx.Param)
    names = {f"attn/{part}/kernel" for part in ("query", "key", "value", "out")}
    names |= {"layers/0/kernel", "layers/1/kernel"}
    assert set(found(state)) == names
    assert set(found(nnx.to_pure_dict(state))) == names
    # The labels are a tree that optax.partition takes.
    optax.partition({"muon": optax.sgd(1.0), "adamw": optax.sgd(1.0)}, m.labels).init(state)


class EquinoxBlock(eqx.Module):
    embed: eqx.nn.Embedding
    attn: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    layers: list

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(V, D, key=key)
        self.attn = eqx.nn.MultiheadAttention(2, D, use_output_bias=True, key=key)
        self.norm = eqx.nn.LayerNorm(D)
        self.layers = [eqx.nn.Linear(D, F, key=key), eqx.nn.Linear(F, D, key=key)]


def test_equinox():
    """Weights are (out, in) there: `layout` inverts the shape factor."""
    params = eqx.filter(EquinoxBlock(jax.random.key(0)), eqx.is_inexact_array)
    got = found(params, layout="out_in")
    names = {f"attn/{part}_proj/weight" for part in ("query", "key", "value", "output")}
    assert set(got) == names | {"layers/0/weight", "layers/1/weight"}
    assert got["layers/0/weight"] == m.MatrixAxes((), (1,), (0,))
    tx = optim.muon(1.0, layout="out_in", shape_scale="spectral", adam_learning_rate=0.1)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    sizes = [float(jnp.linalg.norm(layer.weight, 2)) for layer in updates.layers]
    assert sizes[0] / sizes[1] == pytest.approx(F / D, rel=1e-4)  # sqrt(F/D) over sqrt(D/F)


def test_bare_rule():
    assert m.trailing_axes("anything", np.zeros((2, 3, 4))) == m.MatrixAxes((0,), (1,), (2,))
    assert m.trailing_axes("bias", np.zeros(3)) is None
    for path in ("layers/norm/kernel", "layers/q/bias", "embed/table", "ln/scale", "norm_scale"):
        with pytest.raises(ValueError, match=path):
            m.trailing_axes(path, np.zeros((2, 3)))


def test_describe_decoder():
    text = m.describe(decoder(stack_of_blocks()))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "muon" in lines["layers/mlp/down/kernel"]
    assert f"{L} x ({F} in, {D} out)" in lines["layers/mlp/down/kernel"]
    assert "named embed" in lines["embed/embedding"]
    assert len(lines) == 1 + len(jax.tree.leaves(decoder(stack_of_blocks())))


def test_describe_says_what_an_optimizer_keeps():
    params = {"up": {"kernel": np.zeros((2, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    lines = m.describe(params, optim.muon(0.1)).splitlines()
    assert lines[0].split() == ["leaf", "shape", "optimizer", "rule", "state"]
    assert lines[1].endswith("ScaleByAdamState.mu .nu, 32 bytes")
    assert lines[2].endswith("1 x (2 in, 4 out)  MuonState.mu, 32 bytes")
    assert m.describe(params, optax.sgd(0.1)).count("nothing") == 2
    assert "SiftState.mu .mu_constraint" in m.describe(params, optim.sift(0.1))
