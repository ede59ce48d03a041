"""GPT-2 and OPT: against a float64 reference that reads the files by itself, and what they promise.

Round trips of these families are in `test_weights`, equality with transformers in `test_parity`,
their layout on meshes in `tests/train/test_sharding`.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import models
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.optim.matrices import labels
from models.decoder import lora
from models.decoder.generate import SamplingConfig, generate, row_keys, sample_tokens
from models.decoder.model import Decoder, DecoderConfig
from models.decoder.selection import select
from models.files.families import FAMILIES, from_hf, new_config, to_hf
from models.files.weights import flatten

VOCAB, WIDTH, MLP, LAYERS, HEADS, CONTEXT = 41, 24, 40, 3, 4, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "context": CONTEXT,
}
NAMES = ("gpt2", "opt")
CONFIGS = {name: new_config(name, **SIZES) for name in NAMES}


def word_tokenizer(size: int = VOCAB) -> models.Tokenizer:
    vocab = {f"w{i}": i for i in range(size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return models.Tokenizer(backend, "{{ messages[0].content }}", eos_id=size - 1)


def random_params(config: DecoderConfig, scale: float = 0.3):
    draw = np.random.default_rng(0)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.asarray(
            scale * draw.standard_normal(leaf.shape) + name.endswith("scale"), jnp.float32
        )

    return jax.tree_util.tree_map_with_path(one, Decoder(config).shapes())


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    config = CONFIGS[request.param]
    return models.Loaded(config, random_params(config), word_tokenizer())


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (2, 12)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, **options):
    hidden, found = decoder.forward(params, tokens, **options)
    return decoder.unembed(params, hidden), found


def logits(loaded, tokens, **options):
    found, collected = run(loaded.decoder, loaded.params, jnp.asarray(tokens), **options)
    return np.asarray(found), collected


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def attention(q, k, v):
    """Causal, one head and one query at a time."""
    out = np.zeros_like(q)
    size = WIDTH // HEADS
    for h in range(HEADS):
        s = slice(h * size, (h + 1) * size)
        for t in range(len(q)):
            score = k[: t + 1, s] @ q[t, s] / np.sqrt(size)
            weight = np.exp(score - score.max())
            out[t, s] = weight / weight.sum() @ v[: t + 1, s]
    return out


def gpt2_reference(t, row):
    """From the tensors of a file, as Conv1D reads them: `x @ W + b`."""
    x = t["transformer.wte.weight"][row] + t["transformer.wpe.weight"][: len(row)]
    for i in range(LAYERS):

        def part(name, x, i=i):
            at = f"transformer.h.{i}.{name}"
            return x @ t[f"{at}.weight"] + t[f"{at}.bias"]

        def normed(name, x, i=i):
            at = f"transformer.h.{i}.{name}"
            return norm(x, t[f"{at}.weight"], t[f"{at}.bias"])

        q, k, v = np.split(part("attn.c_attn", normed("ln_1", x)), 3, -1)
        x = x + part("attn.c_proj", attention(q, k, v))
        y = part("mlp.c_fc", normed("ln_2", x))
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + part("mlp.c_proj", y)
    x = norm(x, t["transformer.ln_f.weight"], t["transformer.ln_f.bias"])
    return x @ t["transformer.wte.weight"].T


def opt_reference(t, row):
    """From the tensors of a file, as torch's Linear reads them: `x @ W.T + b`."""
    places = np.arange(len(row)) + 2
    top = "model.decoder"
    x = t[f"{top}.embed_tokens.weight"][row] + t[f"{top}.embed_positions.weight"][places]
    for i in range(LAYERS):

        def part(name, x, i=i):
            at = f"{top}.layers.{i}.{name}"
            return x @ t[f"{at}.weight"].T + t[f"{at}.bias"]

        def normed(name, x, i=i):
            at = f"{top}.layers.{i}.{name}"
            return norm(x, t[f"{at}.weight"], t[f"{at}.bias"])

        y = normed("self_attn_layer_norm", x)
        q, k, v = (part(f"self_attn.{n}_proj", y) for n in "qkv")
        x = x + part("self_attn.out_proj", attention(q, k, v))
        x = x + part("fc2", np.maximum(part("fc1", normed("final_layer_norm", x)), 0))
    x = norm(x, t[f"{top}.final_layer_norm.weight"], t[f"{top}.final_layer_norm.bias"])
    return x @ t[f"{top}.embed_tokens.weight"].T


REFERENCES = {"gpt2": gpt2_reference, "opt": opt_reference}


def shapes_in_files(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them, written down by hand."""
    d, f = WIDTH, MLP
    if family == "gpt2":
        found = {"wte": (VOCAB, d), "wpe": (CONTEXT, d)}
        found = {f"transformer.{name}.weight": shape for name, shape in found.items()}
        linear = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, f)}
        linear["mlp.c_proj"] = (f, d)
        norms, block, last = ("ln_1", "ln_2"), "transformer.h.{}", "transformer.ln_f"
        width = {name: shape[1] for name, shape in linear.items()}
    else:
        found = {"embed_tokens": (VOCAB, d), "embed_positions": (CONTEXT + 2, d)}
        found = {f"model.decoder.{name}.weight": shape for name, shape in found.items()}
        linear = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
        linear |= {"fc1": (f, d), "fc2": (d, f)}
        norms, block = ("self_attn_layer_norm", "final_layer_norm"), "model.decoder.layers.{}"
        last = "model.decoder.final_layer_norm"
        width = {name: shape[0] for name, shape in linear.items()}
    for name in [f"{block.format(i)}.{norm}" for i in range(LAYERS) for norm in norms] + [last]:
        found |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    for i in range(LAYERS):
        for name, shape in linear.items():
            at = f"{block.format(i)}.{name}"
            found |= {f"{at}.weight": shape, f"{at}.bias": (width[name],)}
    return found


def write(folder, family, change=lambda tensors: tensors, **keys):
    """A folder as another program writes it."""
    draw = np.random.default_rng(2)
    tensors = {
        name: (0.3 * draw.standard_normal(shape) + ("norm" in name or ".ln_" in name)).astype("f4")
        for name, shape in shapes_in_files(family).items()
    }
    folder.mkdir()
    save_file(change(tensors), folder / "model.safetensors")
    raw = {"model_type": family, "vocab_size": VOCAB}
    if family == "gpt2":
        raw |= {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
        raw |= {"n_inner": MLP, "n_ctx": CONTEXT, "activation_function": "gelu_new"}
    else:
        raw |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        raw |= {"max_position_embeddings": CONTEXT, "ffn_dim": MLP, "word_embed_proj_dim": WIDTH}
        raw |= {"_remove_final_layer_norm": False, "do_layer_norm_before": True}
    (folder / "config.json").write_text(json.dumps(raw | keys))
    word_tokenizer().save(folder)
    return tensors


@pytest.mark.parametrize("family", NAMES)
def test_a_file_of_the_family_equals_a_float64_reference(family, tokens, tmp_path):
    stored = write(tmp_path / "model", family)
    loaded = models.load(tmp_path / "model")
    assert loaded.config == CONFIGS[family]
    found, _ = logits(loaded, tokens)
    wide = {name: value.astype(np.float64) for name, value in stored.items()}
    for row, ours in zip(tokens, found, strict=True):
        wanted = REFERENCES[family](wide, row)
        assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()
    models.export(loaded, tmp_path / "export")
    back = load_file(tmp_path / "export" / "model.safetensors")
    assert back.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def without_prefix(family):
    prefix = {"gpt2": "transformer.", "opt": "model."}[family]
    return lambda tensors: {name.removeprefix(prefix): x for name, x in tensors.items()}


@pytest.mark.parametrize("family", NAMES)
def test_published_files_leave_out_the_prefix_and_hold_masks(family, tmp_path):
    """As `openai-community/gpt2` and `facebook/opt-*` are published."""

    def change(tensors):
        tensors = without_prefix(family)(tensors)
        if family == "gpt2":
            mask = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.float32))
            tensors |= {f"h.{i}.attn.bias": mask for i in range(LAYERS)}
            tensors |= {f"h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(LAYERS)}
        return tensors | {"lm_head.weight": tensors[next(iter(tensors))]}

    write(tmp_path / "plain", family)
    write(tmp_path / "published", family, change)
    one, two = (models.load(tmp_path / name) for name in ("plain", "published"))
    assert one.config == two.config
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)

    def differ(tensors):
        tensors = change(tensors)
        return tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}

    write(tmp_path / "other", family, differ)
    with pytest.raises(UserError, match=r"lm_head.weight differs from .*\.weight; set tie_word"):
        models.load(tmp_path / "other")


def test_wrong_tensors_are_named_as_the_file_names_them(tmp_path):
    def change(tensors):
        tensors = without_prefix("gpt2")(tensors)
        del tensors["h.1.attn.c_attn.weight"]
        tensors["h.2.attn.c_attn.bias"] = np.zeros(2 * WIDTH, np.float32)
        return tensors

    write(tmp_path / "model", "gpt2", change)
    with pytest.raises(UserError) as caught:
        models.load(tmp_path / "model")
    message = str(caught.value)
    assert "missing: h.1.attn.c_attn.weight;" in message  # once, not for q, k and v
    assert f"wrong shape: h.2.attn.c_attn.bias ({2 * WIDTH},) instead of ({3 * WIDTH},)" in message


def test_a_fused_tensor_is_split_on_every_device(tmp_path):
    stored = write(tmp_path / "model", "gpt2")
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def where(path, shape):
        last = ("a", "b") if len(shape) == 3 else ("b",) if shape[-1] == WIDTH else (None,)
        spec = jax.sharding.PartitionSpec(*(None,) * (len(shape) - len(last)), *last)
        return jax.sharding.NamedSharding(mesh, spec)

    back = models.load(tmp_path / "model", shardings=where)
    for i, name in enumerate("qkv"):
        part = slice(i * WIDTH, (i + 1) * WIDTH)
        leaf = back.params["layers"]["attn"][name]
        assert leaf["kernel"].sharding.is_equivalent_to(where("", leaf["kernel"].shape), 3)
        for layer in range(LAYERS):
            at = f"transformer.h.{layer}.attn.c_attn"
            np.testing.assert_array_equal(leaf["kernel"][layer], stored[f"{at}.weight"][:, part])
            np.testing.assert_array_equal(leaf["bias"][layer], stored[f"{at}.bias"][part])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, r"do_layer_norm_before False \(norms after each"),
        ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim 12 is not hidden_size 24"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms without scale and bias"),
        ("opt", {"_remove_final_layer_norm": True}, "no norm after the last block"),
        ("opt", {"activation_function": "gelu"}, "activation_function 'gelu' is not supported"),
        ("opt", {"enable_bias": 1}, "enable_bias is 1, neither true nor false"),
        ("opt", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_att.* 5"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"add_cross_attention": True}, "attention to an encoder"),
        ("gpt2", {"n_embd": 25}, "n_embd 25 is not a multiple of n_head 4"),
        ("gpt2", {"n_layer": 10**6}, "n_layer is 1000000, more than the 10000"),
        ("gpt2", {"layer_norm_epsilon": 2.0}, "layer_norm_epsilon is 2.0, more than the 1"),
        ("gpt2", {"n_inner": "40"}, "n_inner is '40', not a positive int"),
        ("gpt2", {"n_head": None}, "n_head is None"),
        ("gpt2", {"n_position": 99, "n_positions": ...}, "'n_position' is unknown, and 'n_positio"),
    ],
)
def test_variants_that_the_decoder_lacks_are_refused(family, changes, message):
    raw = {**to_hf(CONFIGS[family]), **changes}
    with pytest.raises(UserError, match=message) as caught:
        from_hf({key: value for key, value in raw.items() if value is not ...}, "DIR/config.json")
    assert "\n" not in str(caught.value) and "DIR/config.json" in str(caught.value)


def test_what_a_config_leaves_out():
    small = from_hf({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2})
    assert (small.intermediate_size, small.max_position_embeddings) == (32, 1024)
    assert small.tie_embeddings and small.activation == "gelu_new" and small.norm_eps == 1e-5
    raw = {"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    wide = from_hf(raw | {"num_attention_heads": 2, "word_embed_proj_dim": None})
    assert (wide.intermediate_size, wide.max_position_embeddings) == (3072, 2048)
    assert wide.position_offset == 2 and wide.qkv_bias and wide.activation == "relu"
    assert not {"head_dim", "rope_theta", "num_key_value_heads", ""} & to_hf(wide).keys()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gtp2", {}, "'gtp2' is not supported; supported: llama, mistral, qwen2, qwen3, gpt2, opt"),
        ("gpt2", {"num_heads": 5}, "hidden size 24, 5 heads and 5 key-value heads must divide"),
        ("gpt2", {"num_kv_heads": 2}, "no way to write num_kv_heads=2"),
        ("gpt2", {"norm": "rms"}, "no way to write norm='rms'"),
        ("opt", {"position_offset": 0}, "no way to write position_offset=0"),
        ("llama", {"activation": "relu"}, "no way to write activation='relu'"),
    ],
)
def test_a_new_config_that_no_file_could_hold_is_refused(family, changes, message):
    with pytest.raises(UserError, match=message):
        new_config(family, **SIZES | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_config_of_every_family_runs(family):
    config = new_config(family, **SIZES | {"intermediate_size": None})
    assert config.intermediate_size == 4 * WIDTH and from_hf(to_hf(config)) == config
    decoder = Decoder(config)
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    hidden, _ = jax.eval_shape(decoder.forward, params, jnp.zeros((2, CONTEXT), jnp.int32))
    assert hidden.shape == (2, CONTEXT, WIDTH)


def test_unknown_words_are_refused():
    shape = DecoderConfig(16, 8, 16, 2, 2, 1, 4)
    for name in ("norm", "positions", "mlp", "activation"):
        with pytest.raises(ValueError, match=f"{name} is one of .*, got 'none'"):
            Decoder(dataclasses.replace(shape, **{name: "none"}))


def test_cache_equals_no_cache(loaded, tokens):
    whole, _ = logits(loaded, tokens)
    cache, found = loaded.decoder.init_cache(2, CONTEXT), []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        part, collected = logits(loaded, tokens[:, first:last], cache=cache)
        cache = collected["cache"]
        found.append(part)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=1e-5, atol=1e-4)


@functools.partial(jax.jit, static_argnames="temperature")
def draw(scores, keys, step, temperature):
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return sample_tokens(scores, keys, temperature, 1.0, top_k=0, greedy=False)


def test_generation_with_its_cache_equals_the_whole_row_every_time(loaded):
    """Prompts of several lengths, left-padded, each shared by its samples."""
    prompts, new, samples, heat = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]], 6, 3, 8.0
    answers = generate(
        loaded.decoder,
        loaded.params,
        prompts,
        sampling=SamplingConfig(heat, max_new_tokens=new),
        stop_ids=(),
        pad_id=0,
        seed=5,
        num_samples=samples,
        prompt_buckets=(8,),
    )
    for i, prompt in enumerate(prompts):
        keys = row_keys(5, jnp.full((samples,), i, jnp.uint32), jnp.arange(samples))
        rows = np.zeros((samples, CONTEXT), np.int32)
        rows[:, : len(prompt)] = prompt
        for step in range(new):
            at = len(prompt) + step
            rows[:, at] = draw(logits(loaded, rows)[0][:, at - 1], keys, step, heat)
        assert answers[i] == rows[:, len(prompt) : at + 1].tolist()
    assert len({tuple(answer) for found in answers for answer in found}) == len(prompts) * samples


def test_an_answer_ends_where_the_positions_do(loaded):
    options = {"sampling": SamplingConfig(max_new_tokens=20), "stop_ids": (), "pad_id": 0}
    prompts = [[1] * 10, [2] * (CONTEXT - 1)]
    answers = generate(loaded.decoder, loaded.params, prompts, **options)
    assert [len(found[0]) for found in answers] == [CONTEXT - 10, 1]


def test_padding_and_packing_change_nothing(loaded, tokens):
    alone, _ = logits(loaded, tokens)
    padded = np.concatenate([np.full((2, 4), 3, np.int32), tokens], 1)
    positions = np.broadcast_to(np.maximum(np.arange(16) - 4, 0), (2, 16)).astype(np.int32)
    segments = np.broadcast_to(np.arange(16) >= 4, (2, 16)).astype(np.int32)
    found, _ = logits(loaded, padded, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(found[:, 4:], alone, rtol=1e-5, atol=1e-4)
    joined = tokens.reshape(1, -1)  # longer than the positions: they begin anew in each row
    positions = np.tile(np.arange(12), 2)[None].astype(np.int32)
    segments = np.repeat([1, 2], 12)[None].astype(np.int32)
    found, _ = logits(loaded, joined, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(found.reshape(alone.shape), alone, rtol=1e-5, atol=1e-4)


def test_every_leaf_is_trained_and_only_positions_that_occur(loaded, tokens):
    def loss(params):
        hidden, _ = loaded.forward(params, jnp.asarray(tokens))
        return jnp.mean(jnp.square(loaded.unembed(params, hidden)))

    found = flatten(jax.jit(jax.grad(loss))(loaded.params))
    # The softmax does not change when all scores of a query do.
    assert [p for p, x in found.items() if np.abs(x).max() < 1e-5] == ["layers/attn/k/bias"]
    rows = np.abs(found["positions/embedding"]).max(-1) > 0
    offset = loaded.config.position_offset
    assert rows.tolist() == [offset <= i < offset + 12 for i in range(CONTEXT + offset)]


def test_a_trained_position_table_needs_the_gradient_of_all_blocks(loaded):
    shapes = loaded.decoder.shapes()
    assert select(shapes, ["positions"]).train_from == 0
    assert select(shapes, ["final_norm"]).train_from == LAYERS


def test_half_precision(loaded, tokens):
    dtype = "bfloat16"
    decoder = Decoder(dataclasses.replace(loaded.config, dtype=dtype))
    hidden, _ = jax.eval_shape(decoder.forward, loaded.params, jnp.asarray(tokens))
    assert hidden.dtype == dtype
    found, _ = run(decoder, loaded.params, jnp.asarray(tokens))
    full, _ = logits(loaded, tokens)
    assert np.abs(found - full).max() < 0.1 * np.abs(full).max()


def test_muon_takes_the_kernels_of_blocks_and_nothing_else(loaded):
    found = flatten(labels(loaded.decoder.shapes()))
    matrices = {path for path, label in found.items() if label == "muon"}
    names = [f"attn/{name}" for name in "qkvo"] + ["mlp/up", "mlp/down"]
    assert matrices == {f"layers/{name}/kernel" for name in names}
    assert found["positions/embedding"] == found["embed/embedding"] == "adamw"
    untied = Decoder(dataclasses.replace(loaded.config, tie_embeddings=False))
    assert flatten(labels(untied.shapes()))["lm_head/kernel"] == "adamw"


# More tokens than positions.

TOO_LONG = "17 tokens, more than the 16 positions that the model has learned; use at most 16"


def test_rows_longer_than_the_positions_are_refused(loaded):
    with pytest.raises(UserError, match=f"a row of tokens: {TOO_LONG}"):
        jax.eval_shape(loaded.forward, loaded.params, jnp.zeros((1, CONTEXT + 1), jnp.int32))
    options = {"sampling": SamplingConfig(), "stop_ids": (), "pad_id": 0}
    with pytest.raises(UserError, match=f"prompt 1 and the first token of .*: {TOO_LONG}"):
        generate(loaded.decoder, loaded.params, [[1], [1] * CONTEXT], **options)
    rotary = Decoder(new_config("llama", **SIZES))
    jax.eval_shape(rotary.forward, rotary.shapes(), jnp.zeros((1, CONTEXT + 1), jnp.int32))


# Adapters.


def adapters_of(loaded, targets, rank=2):
    draw = np.random.default_rng(3)
    made = lora.init(loaded.params, rank, targets, 7)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), made)


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("q", "k", "v", "o", "up", "down")])
def test_adapters_in_files_are_the_ones_of_the_model(targets, loaded, tmp_path):
    """`base + alpha / r B A` of what PEFT is told equals the merged model, tensor by tensor."""
    family, alpha, rank = loaded.config.family, 3.0, 2
    adapters = adapters_of(loaded, targets, rank)
    options = {"rank": rank, "alpha": alpha, "base": "x", "family": family}
    folder = models.export_adapter(adapters, tmp_path / "adapter", **options)
    assert models.export_adapter(adapters, folder, **options) == folder  # replaces its own
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is (family == "gpt2")
    merged = lora.merge(adapters, loaded.params, scale=alpha / rank)
    tensors = {}
    for name, params in (("base", loaded.params), ("merged", merged)):
        models.export(dataclasses.replace(loaded, params=params), tmp_path / name)
        tensors[name] = load_file(tmp_path / name / "model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    moved = set()
    for key in (key for key in found if key.endswith("lora_A.weight")):
        module = re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", key)[1]
        (target,) = [t for t in settings["target_modules"] if module.endswith(f".{t}")]
        r = settings.get("rank_pattern", {}).get(target, settings["r"])
        a = settings.get("alpha_pattern", {}).get(target, settings["lora_alpha"])
        first, second = found[key], found[key.replace("lora_A", "lora_B")]
        assert first.shape[0] == second.shape[1] == r
        change = a / r * second @ first
        change = change.T if settings["fan_in_fan_out"] else change
        name = f"{module}.weight"
        wanted = tensors["merged"][name] - tensors["base"][name]
        np.testing.assert_allclose(change, wanted, rtol=1e-4, atol=1e-5)
        moved.add(name)
    differ = {n for n, x in tensors["base"].items() if (x != tensors["merged"][n]).any()}
    assert moved == differ
