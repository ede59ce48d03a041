"""The decoder against a float64 reference, and its guarantees on caches, packing and smoothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder.attention import LEAF_STRIDE
from models.decoder.layers import RopeScaling
from models.decoder.model import REMAT, Decoder, DecoderConfig
from train.costs.flops import flops

TINY = DecoderConfig(61, 32, 48, 3, 4, 2, 8)
DECODER = Decoder(TINY)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def params():
    return jax.jit(DECODER.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocab_size)


@functools.partial(jax.jit, static_argnames=("decoder", "layer_map", "hidden_at", "depth"))
def forward(params, tokens, decoder=DECODER, **options):
    return decoder.forward(params, tokens, **options)


def reference(config, params, tokens, positions, segments, temperature=1.0):
    """Final hidden states in float64, one row, head and query at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    c = config
    temperature = np.broadcast_to(temperature, (c.num_layers,))

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * scale

    def linear(x, part, layer):
        return x @ part["kernel"][layer] + (part["bias"][layer] if "bias" in part else 0.0)

    def turn(x, position):
        half = c.head_dim // 2
        freq = c.rope_theta ** (-np.arange(half) / half)
        if c.rope_scaling is not None:
            freq = freq / c.rope_scaling.factor
        pair = (x[:half] + 1j * x[half:]) * np.exp(1j * position * freq)
        return np.concatenate([pair.real, pair.imag])

    def sees(segment, position, q, k):
        leaf, group = np.divmod(abs(segment), LEAF_STRIDE)
        near = c.sliding_window is None or position[q] - position[k] < c.sliding_window
        same = group[q] == group[k] and leaf[k] in (0, leaf[q])
        return k <= q and segment[k] > 0 and same and near

    rows = []
    for row, position, segment in zip(tokens, positions, segments, strict=True):
        segment = np.where(row == c.unattended, -abs(segment), segment)
        x = p["embed"]["embedding"][row]
        for i in range(c.num_layers):
            layers = p["layers"]
            attn, mlp = layers["attn"], layers["mlp"]
            y = norm(x, layers["attn_norm"]["scale"][i])
            q, k, v = (linear(y, attn[n], i).reshape(len(row), -1, c.head_dim) for n in "qkv")
            if c.qk_norm:
                q = norm(q, attn["q_norm"]["scale"][i])
                k = norm(k, attn["k_norm"]["scale"][i])
            out = np.zeros_like(q)
            for t in range(len(row)):
                keys = [s for s in range(len(row)) if sees(segment, position, t, s)]
                for h in range(c.num_heads if keys else 0):
                    g = h // (c.num_heads // c.num_kv_heads)
                    turned = np.array([turn(k[s, g], position[s]) for s in keys])
                    score = turned @ turn(q[t, h], position[t]) / np.sqrt(c.head_dim)
                    weight = np.exp((score - score.max()) / temperature[i])
                    out[t, h] = weight / weight.sum() @ v[keys, g]
            x = x + linear(out.reshape(len(row), -1), attn["o"], i)
            y = norm(x, layers["mlp_norm"]["scale"][i])
            gate = linear(y, mlp["gate"], i)
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, mlp["up"], i), mlp["down"], i)
        rows.append(norm(x, p["final_norm"]["scale"]))
    return np.stack(rows)


VARIANTS = {
    "llama": {},
    "multi-head, scaled": {"num_kv_heads": 4, "rope_scaling": RopeScaling("linear", 4.0)},
    "qwen2": {"qkv_bias": True, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "tie_embeddings": False},
    "mistral": {"sliding_window": 4},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, (1.0, 2.3, 1e8)])
def test_equals_a_float64_reference(name, temperature, tokens):
    decoder = Decoder(dataclasses.replace(TINY, **VARIANTS[name]))
    keys = iter(jax.random.split(jax.random.key(5), 100))
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), decoder.init(jax.random.key(2))
    )
    # One row padded on the left, one with a shared prefix and two answers, then a second group.
    segments = np.array(
        [[0] * 3 + [1] * 9, [1] * 4 + [1 + LEAF_STRIDE] * 3 + [1 + 2 * LEAF_STRIDE] * 2 + [2] * 3]
    )
    positions = np.array([[0, 0, 0, *range(9)], [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2]])
    options = {"positions": jnp.array(positions), "segment_ids": jnp.array(segments)}
    heat = jnp.array(temperature)
    hidden, _ = forward(params, tokens, decoder, attention_temperature=heat, **options)
    expected = reference(
        decoder.config, params, np.asarray(tokens), positions, segments, temperature
    )
    real = segments > 0
    close(hidden[real], expected[real], 2e-5)
    head = (
        params["embed"]["embedding"].T
        if decoder.config.tie_embeddings
        else params["lm_head"]["kernel"]
    )
    close(
        decoder.unembed(params, hidden)[real], expected[real] @ np.asarray(head, np.float64), 1e-4
    )


@pytest.mark.parametrize("cached", [False, True])
def test_tokens_that_are_read_by_none(cached, params, tokens):
    """Ends of turns that a padding mask hides, and padding that attends to its row."""
    tokens = np.array(tokens)
    pad = int(tokens[0, 3])
    tokens[1, [4, 7]] = pad
    segments = np.array([[1] * 12, [1] * 9 + [-1] * 3])
    assert (tokens[:, 0] != pad).all()
    decoder = Decoder(dataclasses.replace(TINY, unattended=pad))
    positions = np.tile(np.arange(12), (2, 1))
    expected = reference(decoder.config, params, tokens, positions, segments)
    parts, cache = [], decoder.init_cache(2, 12) if cached else None
    for piece in (slice(0, 5), slice(5, 12)) if cached else (slice(0, 12),):
        new = {"segment_ids": jnp.array(segments[:, piece]), "cache": cache}
        hidden, found = forward(params, jnp.array(tokens[:, piece]), decoder, **new)
        parts.append(hidden)
        cache = found.get("cache")
    close(np.concatenate(parts, 1), expected, 2e-5)
    # The model differs, but only after the first such token.
    plain, _ = forward(params, jnp.array(tokens), segment_ids=jnp.array(segments))
    close(plain[0, :3], expected[0, :3], 2e-5)
    assert np.abs(np.asarray(plain)[:, 8:] - expected[:, 8:]).max() > 1e-3


@pytest.mark.parametrize("pieces", [(12,), (5, 7), (9, 1, 1, 1)])
def test_cache_equals_no_cache(params, tokens, pieces):
    whole, _ = forward(params, tokens)
    cache, found, start = DECODER.init_cache(2, 16), [], 0
    for piece in pieces:
        hidden, collected = forward(params, tokens[:, start : start + piece], cache=cache)
        cache, start = collected["cache"], start + piece
        found.append(hidden)
    assert int(cache["index"]) == 12
    close(jnp.concatenate(found, 1), whole)


def test_a_cached_step_respects_left_padding(params, tokens):
    alone, _ = forward(params, tokens[1:, :7])
    padded = jnp.concatenate([jnp.full((1, 5), 9), tokens[1:, :6]], 1)
    positions = jnp.maximum(jnp.arange(11) - 5, 0)[None]
    segments = (jnp.arange(11) >= 5).astype(jnp.int32)[None]
    _, collected = forward(
        params,
        padded,
        positions=positions,
        segment_ids=segments,
        cache=DECODER.init_cache(1, 12),
    )
    last, _ = forward(params, tokens[1:, 6:7], positions=jnp.array([[6]]), cache=collected["cache"])
    close(last[:, 0], alone[:, -1])


def test_left_padding_changes_nothing(params, tokens):
    alone, _ = forward(params, tokens)
    padded = jnp.concatenate([jnp.full((2, 4), 3), tokens], 1)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(16) - 4, 0), (2, 16))
    segments = jnp.broadcast_to((jnp.arange(16) >= 4).astype(jnp.int32), (2, 16))
    hidden, _ = forward(params, padded, positions=positions, segment_ids=segments)
    close(hidden[:, 4:], alone)
    assert np.isfinite(np.asarray(hidden)).all()  # rows of the mask without any key


def test_packing_equals_separate_rows(params, tokens):
    packed, _ = forward(
        params,
        tokens[:1],
        positions=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]),
        segment_ids=jnp.array([[1] * 5 + [2] * 3 + [3] * 4]),
    )
    for start, end in ((0, 5), (5, 8), (8, 12)):
        alone, _ = forward(params, tokens[:1, start:end])
        close(packed[:, start:end], alone)


def test_leaves_behind_a_shared_prefix_equal_separate_sequences(params, tokens):
    group, prefix = 7, 4
    leaf = np.array([0] * 4 + [1] * 3 + [2] * 5)
    hidden, _ = forward(
        params,
        tokens[:1],
        positions=jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]]),
        segment_ids=jnp.array([group + LEAF_STRIDE * leaf]),
    )
    for start, end in ((4, 7), (7, 12)):
        alone, _ = forward(params, jnp.concatenate([tokens[:1, :prefix], tokens[:1, start:end]], 1))
        close(hidden[:, start:end], alone[:, prefix:])
        close(hidden[:, :prefix], alone[:, :prefix])


def test_a_sliding_window_forgets(params, tokens):
    decoder = Decoder(dataclasses.replace(TINY, num_layers=1, sliding_window=3))
    one = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    before, _ = forward(one, tokens, decoder)
    after, _ = forward(one, tokens.at[:, 0].set(60), decoder)
    changed = np.abs(np.asarray(before - after)).max((0, 2)) > 0
    assert changed.tolist() == [True] * 3 + [False] * 9


def test_a_tuple_of_stacks_equals_one_stack(params, tokens):
    cut = {}
    for at in (1, 2):
        parts = tuple(
            jax.tree.map(lambda x, s=s: x[s], params["layers"]) for s in (slice(at), slice(at, 3))
        )
        cut[at] = parts
    heat = jnp.array([1.0, 2.0, 3.0])
    options = {"attention_temperature": heat, "hidden_at": (0, 2)}
    whole, collected = forward(params, tokens, **options)
    for parts in cut.values():
        hidden, found = forward(params | {"layers": parts}, tokens, **options)
        close(hidden, whole, 1e-6)
        for i in (0, 2):
            close(found["hidden"][i], collected["hidden"][i], 1e-6)
    cached, _ = forward(params | {"layers": cut[1]}, tokens, cache=DECODER.init_cache(2, 12))
    close(cached, forward(params, tokens)[0])


def test_hidden_at_and_depth(params, tokens):
    _, whole = forward(params, tokens, hidden_at=(0, 1, 2))
    final = params["final_norm"]["scale"]
    for depth in (1, 2, 3):
        hidden, found = forward(params, tokens, hidden_at=(depth - 1,), depth=depth)
        close(found["hidden"][depth - 1], whole["hidden"][depth - 1], 1e-6)
        x = np.asarray(whole["hidden"][depth - 1], np.float64)
        close(hidden, x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps) * final)
    fewer = Decoder(dataclasses.replace(TINY, num_layers=2))
    first = params | {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    close(forward(first, tokens, fewer)[0], forward(params, tokens, depth=2)[0], 1e-6)


@pytest.mark.parametrize(
    "options", [{"hidden_at": (3,)}, {"hidden_at": (1,), "depth": 1}, {"depth": 4}]
)
def test_blocks_outside_the_model_are_refused(params, tokens, options):
    with pytest.raises(ValueError, match="outside 0"):
        DECODER.forward(params, tokens, **options)


def gradient(decoder, params, tokens, **options):
    def loss(params):
        hidden, _ = decoder.forward(params, tokens, **options)
        return jnp.mean(jnp.square(decoder.unembed(params, hidden)))

    return jax.jit(jax.grad(loss))(params)


def test_train_from_cuts_the_gradient_below_it(params, tokens):
    full = gradient(DECODER, params, tokens)
    part = gradient(DECODER, params, tokens, train_from=2)
    for a, b in zip(jax.tree.leaves(full["layers"]), jax.tree.leaves(part["layers"]), strict=True):
        assert not np.asarray(b[:2]).any() and np.asarray(a[:2]).any()
        close(b[2], a[2], 1e-6)
    close(
        DECODER.forward(params, tokens, train_from=2)[0], DECODER.forward(params, tokens)[0], 1e-6
    )
    top = gradient(DECODER, params, tokens, train_from=3)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(top["layers"]))
    assert np.asarray(top["final_norm"]["scale"]).any()


def test_remat_has_the_same_gradient(tokens):
    config = dataclasses.replace(TINY, qk_norm=True, **VARIANTS["biases"])
    params = Decoder(config).init(jax.random.key(0))
    plain = gradient(Decoder(config), params, tokens)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(plain["layers"]))
    for remat in ("dots", "full"):
        other = gradient(Decoder(config, remat), params, tokens)
        jax.tree.map(lambda a, b: close(a, b, 1e-6), plain, other)


@pytest.mark.fused
def test_remat_trades_memory_for_products():
    """Each policy keeps less than the one before it, and computes more products twice."""
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    temporaries, products = {}, {}
    for remat in REMAT:
        for layers in (4, 8):
            config = DecoderConfig(64, 64, 192, layers, 4, 2, 16)
            decoder = Decoder(config, remat)

            def loss(params, tokens, decoder=decoder):
                return jnp.mean(jnp.square(decoder.forward(params, tokens)[0]))

            args = (decoder.shapes(), tokens)
            memory = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
            temporaries[remat, layers] = memory.temp_size_in_bytes
            products[remat] = flops(jax.grad(loss), *args)
    assert products["none"] < products["dots"] < 1.1 * products["none"] < products["full"]
    kept = {r: (temporaries[r, 8] - temporaries[r, 4]) / 4 / (4 * tokens.size) for r in REMAT}
    # Floats per token and block: the block's input; then also the outputs of q, k, v, o, gate and
    # up (down's is not needed); then everything that is not linear in between.
    assert kept["full"] == pytest.approx(64, rel=0.02)
    assert kept["dots"] == pytest.approx(64 + (64 + 2 * 32 + 64 + 2 * 192), rel=0.02)
    assert kept["none"] > 2 * kept["dots"]
    assert temporaries["none", 8] > temporaries["dots", 8] > temporaries["full", 8]


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat is one of none, dots, full, got 'all'"):
        Decoder(TINY, "all")


def scaled(params, **factors):
    attn = dict(params["layers"]["attn"])
    for name, factor in factors.items():
        attn[name] = jax.tree.map(lambda x, f=factor: x * f, attn[name])
    return params | {"layers": params["layers"] | {"attn": attn}}


def test_three_forms_of_smoothing_agree(params, tokens):
    segments = jnp.array([[0] * 3 + [1] * 9, [1] * 12])
    for heat in (2.3, 100.0):
        hidden, _ = forward(params, tokens, segment_ids=segments, attention_temperature=heat)
        both = scaled(params, q=heat**-0.5, k=heat**-0.5)
        query = scaled(params, q=1 / heat)
        for other in (both, query):
            close(
                hidden[segments > 0], forward(other, tokens, segment_ids=segments)[0][segments > 0]
            )


def test_endless_temperature_averages_what_is_visible(params, tokens):
    segments = jnp.array([[0] * 3 + [1] * 9, [1] * 12])
    options = {"segment_ids": segments, "attention_temperature": 1e8}
    hidden, _ = forward(params, tokens, **options)
    other = scaled(params, q=-3.0)  # queries no longer matter ...
    close(hidden[segments > 0], forward(other, tokens, **options)[0][segments > 0])
    changed, _ = forward(params, tokens.at[0, 1].set(60), **options)  # ... but the mask does
    np.testing.assert_array_equal(hidden[0, 3:], changed[0, 3:])


def test_smoothing_starts_at_its_layer(params, tokens):
    plain_hidden, plain = forward(params, tokens, hidden_at=(0, 1, 2))
    ones = jnp.ones((3,))
    same, _ = forward(params, tokens, attention_temperature=ones, hidden_at=(0, 1, 2))
    np.testing.assert_array_equal(same, plain_hidden)
    heat = ones.at[1].set(5.0)
    _, smooth = forward(params, tokens, attention_temperature=heat, hidden_at=(0, 1, 2))
    np.testing.assert_array_equal(smooth["hidden"][0], plain["hidden"][0])
    for i in (1, 2):
        assert np.abs(smooth["hidden"][i] - plain["hidden"][i]).max() > 1e-3


def test_a_sweep_of_temperatures_compiles_once(params, tokens):
    traces = []

    @jax.jit
    def run(params, heat):
        traces.append(1)
        return DECODER.forward(params, tokens, attention_temperature=heat)[0]

    for heat in (1.0, 2.0, 3.5):
        run(params, jnp.float32(heat))
    assert len(traces) == 1


def perturbation(layer, index):
    key = jax.random.fold_in(jax.random.key(9), index)
    leaves, tree = jax.tree.flatten(layer)
    keys = jax.random.split(key, len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def test_layer_map_equals_a_mapped_stack(params, tokens):
    plain, _ = forward(params, tokens)
    identity, _ = forward(params, tokens, layer_map=lambda layer, index: layer)
    np.testing.assert_array_equal(identity, plain)
    mapped, _ = forward(params, tokens, layer_map=perturbation)
    stack = jax.vmap(perturbation)(params["layers"], jnp.arange(3))
    close(mapped, forward(params | {"layers": stack}, tokens)[0])
    cut = tuple(
        jax.tree.map(lambda x, s=s: x[s], params["layers"]) for s in (slice(1), slice(1, 3))
    )
    close(forward(params | {"layers": cut}, tokens, layer_map=perturbation)[0], mapped)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


def test_forward_never_projects_to_the_vocabulary(params, tokens):
    jaxpr = jax.make_jaxpr(DECODER.forward)(params, tokens)
    shapes = list(shapes_in(jaxpr.jaxpr))
    assert (2, 12, 32) in shapes and (2, 12, 48) in shapes  # the search enters the scan
    assert not any(TINY.vocab_size in shape for shape in shapes)


def test_bfloat16_compute(params, tokens):
    decoder = Decoder(dataclasses.replace(TINY, dtype="bfloat16"))
    hidden, found = forward(params, tokens, decoder, hidden_at=(1,))
    assert hidden.dtype == found["hidden"][1].dtype == jnp.bfloat16
    logits = decoder.unembed(params, hidden)
    assert logits.dtype == jnp.float32
    close(hidden.astype(jnp.float32), forward(params, tokens)[0], 0.15)


def test_shapes_describe_init(params):
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), DECODER.shapes())
    drawn = DECODER.init(jax.random.key(0))
    std = {name: float(drawn["layers"]["attn"][name]["kernel"].std()) for name in "qkvo"}
    assert std["q"] == pytest.approx(32**-0.5, rel=0.05)
    assert std["k"] == pytest.approx(32**-0.5, rel=0.05)
    assert std["v"] == pytest.approx(0.02, rel=0.05)
    assert std["o"] == pytest.approx(0.02 / 6**0.5, rel=0.05)
