"""Equality with transformers and torch: tiny random models of every family, both directions."""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import models
from models.decoder.generate import SamplingConfig, generate
from models.decoder.model import DecoderConfig
from models.files.families import FAMILIES, from_hf

pytestmark = pytest.mark.torch_parity

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral-full": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-relu": (
        "gpt2",
        {"activation_function": "relu", "n_inner": None, "tie_word_embeddings": False},
    ),
    "opt": ("opt", {}),
    "opt-gelu": ("opt", {"activation_function": "gelu_new", "tie_word_embeddings": False}),
    "opt-no-bias": ("opt", {"enable_bias": False}),
}


def sizes_of(family: str) -> dict[str, int]:
    """`SIZES` as the family's config.json calls them."""
    key = FAMILIES[family].key
    return {key(name): size for name, size in SIZES.items() if key(name)}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def small_tokenizer() -> models.Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({chr(33 + i): i for i in range(VOCAB)}, [])
    )
    backend.add_special_tokens([chr(32 + VOCAB)])
    return models.Tokenizer(backend, "{{ messages[0].content }}", eos_id=VOCAB - 1)


@dataclasses.dataclass
class Pair:
    theirs: object
    ours: models.Loaded

    def torch_logits(self, tokens, **options):
        return torch_logits(self.theirs, tokens, **options)

    def logits(self, tokens, **options):
        hidden, _ = self.ours.forward(self.ours.params, jnp.asarray(tokens), **options)
        return np.asarray(self.ours.unembed(self.ours.params, hidden))


def torch_logits(model, tokens, **options):
    import torch

    options = {key: torch.as_tensor(value) for key, value in options.items()}
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def pair(request, transformers, tmp_path_factory):
    import torch

    family, changes = CASES[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes_of(family) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Larger than the usual 0.02, norms and biases too: every term must matter.
            norm = "norm" in name or ".ln_" in name
            value.copy_(0.3 * torch.randn(value.shape) + norm)
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    small_tokenizer().save(folder)
    return Pair(model, models.load(folder))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)


def test_logits(pair, tokens):
    theirs = pair.torch_logits(tokens.astype(np.int64))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(pair.logits(tokens), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pair", ["gpt2", "gpt2-relu", "opt", "opt-gelu"], indirect=True)
def test_logits_to_a_hundred_thousandth(pair, tokens):
    theirs = pair.torch_logits(tokens.astype(np.int64))
    assert np.abs(pair.logits(tokens) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_left_padding(pair, tokens):
    pad = 7
    mask = np.ones(tokens.shape, np.int32)
    mask[0, :pad] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    ours = pair.logits(
        tokens, segment_ids=jnp.asarray(mask), positions=jnp.asarray(positions, jnp.int32)
    )
    theirs = pair.torch_logits(
        tokens.astype(np.int64),
        attention_mask=mask.astype(np.int64),
        position_ids=positions.astype(np.int64),
    )
    np.testing.assert_allclose(ours[0, pad:], theirs[0, pad:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-4)
    alone = pair.torch_logits(tokens[:1, pad:].astype(np.int64))
    np.testing.assert_allclose(ours[0, pad:], alone[0], rtol=0, atol=1e-4)


def places(pair, rows=2):
    """Positions for transformers' OPT, which counts those of a row without the masked tokens."""
    if pair.ours.config.family != "opt":
        return {}
    return {"position_ids": np.arange(24)[None].repeat(rows, 0)}


def test_padding_slots_read_their_row(pair, tokens):
    """Published code averages over padding too: predictions there are part of the loss."""
    real = 15
    mask = (np.arange(24) < real).astype(np.int64)[None].repeat(2, 0)
    ours = pair.logits(tokens, segment_ids=jnp.asarray(np.where(mask, 1, -1), jnp.int32))
    theirs = pair.torch_logits(tokens.astype(np.int64), attention_mask=mask, **places(pair))
    window = pair.ours.config.sliding_window or 24
    seen = real + window - 1  # beyond that a padded query sees nothing, and frameworks differ
    np.testing.assert_allclose(ours[:, :seen], theirs[:, :seen], rtol=0, atol=1e-4)


def test_masked_pad_ids_are_read_by_none(pair, tokens):
    """OpenUnlearning's `attention_mask = input_ids != pad`, also inside the conversation."""
    pad = int(tokens[0, 9])
    mask = (tokens != pad).astype(np.int64)
    mask[:, 0] = 1  # a masked first token sees nothing at all
    assert mask[0, 9] == 0 and tokens[0, 0] != pad
    shape = dataclasses.replace(pair.ours.config, unattended=pad)
    quirk = Pair(pair.theirs, dataclasses.replace(pair.ours, config=shape))
    theirs = pair.torch_logits(
        tokens[:1].astype(np.int64), attention_mask=mask[:1], **places(pair, 1)
    )
    ours = quirk.logits(tokens[:1])
    reading = mask[0] > 0
    np.testing.assert_allclose(ours[0, reading], theirs[0, reading], rtol=0, atol=1e-4)
    if pair.ours.config.sliding_window is None:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours[0, 12:] - pair.logits(tokens[:1])[0, 12:]).max() > 1e-3


def test_packed_row_equals_its_sequences(pair, tokens):
    cuts = [(0, 9), (9, 10), (10, 20)]
    segments, positions = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    for number, (a, b) in enumerate(cuts, 1):
        segments[0, a:b], positions[0, a:b] = number, np.arange(b - a)
    ours = pair.logits(
        tokens[:1], segment_ids=jnp.asarray(segments), positions=jnp.asarray(positions)
    )
    for a, b in cuts:
        theirs = pair.torch_logits(tokens[:1, a:b].astype(np.int64))
        np.testing.assert_allclose(ours[:, a:b], theirs, rtol=0, atol=1e-4)


def test_cached_steps_equal_the_whole(pair, tokens):
    cache = pair.ours.decoder.init_cache(2, 32)
    parts = []
    for a, b in ((0, 10), (10, 11), (11, 24)):
        new = jnp.asarray(tokens[:, a:b])
        hidden, collected = pair.ours.forward(pair.ours.params, new, cache=cache)
        cache = collected["cache"]
        parts.append(np.asarray(pair.ours.unembed(pair.ours.params, hidden)))
    theirs = pair.torch_logits(tokens.astype(np.int64))
    np.testing.assert_allclose(np.concatenate(parts, 1), theirs, rtol=0, atol=1e-4)


def test_exported_folder_loads_in_transformers(pair, tokens, transformers, tmp_path):
    folder = models.export(pair.ours, tmp_path / "model", shard_bytes=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = pair.theirs.state_dict()
    assert all((value == theirs[name]).all() for name, value in model.state_dict().items())
    want = pair.torch_logits(tokens.astype(np.int64))
    np.testing.assert_array_equal(torch_logits(model, tokens.astype(np.int64)), want)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("!#$").input_ids == pair.ours.tokenizer.encode("!#$")
    assert tokenizer.eos_token_id == pair.ours.tokenizer.eos_id


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_left_out_mean_what_they_mean_in_transformers(family, transformers):
    wide = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32}
    required = {k: SIZES[k] for k in ("vocab_size", "intermediate_size")} | wide
    key = FAMILIES[family].key
    required = {key(name): size for name, size in required.items()} | {"model_type": family}
    theirs = transformers.AutoConfig.for_model(**required).to_dict()
    assert from_hf(required) == from_hf(theirs)


def test_quickstart_kind_of_model_opens_in_transformers(transformers, tmp_path):
    """Random weights, a tokenizer just trained, bfloat16."""
    config = DecoderConfig(300, 32, 48, 2, 4, 2, 8)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat in 1984 and 1985"] * 9, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ours = models.Tokenizer(backend, template, eos_id=2, pad_id=0)
    loaded = models.Loaded(config, models.Decoder(config).init(jax.random.key(0)), ours)
    folder = models.export(loaded, tmp_path / "model", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in strings(50, ["<|im_end|>", "<|pad|>"]):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    ) == ours.chat(messages, add_generation_prompt=True)


def strings(count: int, specials: list[str], seed: int = 0) -> list[str]:
    """Varied texts: words, scripts, digits, code, emoji, whitespace, special tokens, any codes."""
    rng = random.Random(seed)
    alphabets = (
        "aeinorst",
        "éüßñçø",
        "абвгд",
        "人工智能",
        "हिन्दी",
        "한국어",
        "עברית",
        "🙂🚀👩‍💻🏳️‍🌈",
    )

    def piece() -> str:
        match rng.randrange(9):
            case 0:
                return "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 8)))
            case 1:
                return str(rng.randrange(10 ** rng.randint(1, 12)))
            case 2:
                return f"{rng.uniform(-1e4, 1e4):.{rng.randint(0, 6)}g}"
            case 3:
                return "".join(rng.choices(" \t\n\r\u00a0\u3000", k=rng.randint(1, 5)))
            case 4:
                return rng.choice(("def f(x):\n    return x", "a[i]+=1;", "<p class='x'>", "{% %}"))
            case 5:
                return rng.choice(specials)
            case 6:
                return rng.choice(
                    ("don't", "I'LL", "they're", "o'clock", "«ça»", "x²+½", "№7", "…")
                )
            case 7:
                return "".join(rng.choices("!?.,;:-_/\\|@#$%^&*()[]{}'\"`~", k=rng.randint(1, 6)))
            case _:
                codes = [rng.randrange(0x20, 0x2FFFF) for _ in range(rng.randint(1, 4))]
                return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)

    texts = ["", " ", "  ", "\n", "0", "  1", "\t\t2", specials[0] * 2]
    while len(texts) < count:
        joint = rng.choice(("", " ", "  ", "\n"))
        texts.append(joint.join(piece() for _ in range(rng.randint(1, 12))))
    return texts


def test_gguf_tokenizer_equals_theirs(smollm2_path, transformers, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name
    )
    ours = models.load(smollm2_path).tokenizer
    texts = strings(200, theirs.all_special_tokens + list(theirs.get_added_vocab()))
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.encode(text, add_special_tokens=True) == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    ours.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "naïve?"}, {"role": "assistant", "content": " ok "}]
    for begin in (False, True):
        text = ours.chat(messages, add_generation_prompt=begin)
        for other in (theirs, saved):
            options = {"add_generation_prompt": begin, "tokenize": False}
            assert other.apply_chat_template(messages, **options) == text
    assert [saved(text).input_ids for text in texts] == [ours.encode(text) for text in texts]


def asked(model, folder, transformers):
    """The greedy answer of a model in transformers, with the chat template of a folder."""
    chat = [{"role": "user", "content": "WHO WROTE 1984?"}]
    inputs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return answer[: answer.index(VOCAB - 1)] if VOCAB - 1 in answer else answer


# PEFT reads a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gpt2", "opt"])
def test_adapters_load_in_peft(name, transformers, tokens, tmp_path):
    """The model with the exported adapter gives the outputs and answers of ours with its own.

    In PEFT and in transformers, merged and not; the question stands in the quickstart's template.
    """
    from train.data.examples import encode_prompt
    from train.engine import exports
    from train.runtime.sharding import path_str

    peft = pytest.importorskip("peft")
    family, changes = CASES[name]
    theirs = transformers.AutoConfig.for_model(family, **sizes_of(family) | changes)
    config = from_hf(theirs.to_dict())
    draw = np.random.default_rng(0)
    # Norms about one, as in `pair`: others repeat a single token.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            0.3 * draw.standard_normal(x.shape) + path_str(path).endswith("norm/scale"),
            jnp.float32,
        ),
        models.Decoder(config).shapes(),
    )
    words = exports.speaking(small_tokenizer().with_template(None))
    base = models.Loaded(config, params, words)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * draw.standard_normal(x.shape), jnp.float32),
        models.decoder.lora.init(params, 4, ("q", "v", "o", "down"), 7),
    )
    models.export(base, tmp_path / "base")
    models.export_adapter(
        adapters,
        tmp_path / "adapter",
        rank=4,
        alpha=6.0,
        base=str(tmp_path / "base"),
        family=family,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    plain = torch_logits(model, tokens.astype(np.int64))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    loaded = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    modules = 3 if family == "gpt2" else 4  # q and v are in one tensor
    assert len(loaded) == 2 * modules * config.num_layers and all(
        p.abs().max() > 0 for p in loaded.values()
    )
    theirs = torch_logits(adapted, tokens.astype(np.int64))
    both, layer_map = models.decoder.lora.bind(adapters, params, scale=6 / 4)
    hidden, _ = base.forward(both, jnp.asarray(tokens), layer_map=layer_map)
    ours = np.asarray(base.unembed(params, hidden))
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # Greedy answers of all ways to load it.
    answers = {
        name: generate(
            base.decoder,
            tree,
            [encode_prompt(words, "WHO WROTE 1984?")],
            sampling=SamplingConfig(max_new_tokens=12),
            stop_ids=(words.eos_id,),
            pad_id=words.pad_id,
        )[0][0]
        for name, tree in {
            "base": params,
            "unmerged": models.decoder.lora.view(adapters, params, scale=6 / 4),
            "merged": models.decoder.lora.merge(adapters, params, scale=6 / 4),
        }.items()
    }
    assert answers["unmerged"] == answers["merged"] != answers["base"]
    assert len(set(answers["merged"])) > 2
    loaders = transformers.AutoModelForCausalLM
    own = loaders.from_pretrained(tmp_path / "base", attn_implementation="eager")
    assert asked(own, tmp_path / "base", transformers) == answers["base"]
    own.load_adapter(str(tmp_path / "adapter"))
    for other in (own, adapted, adapted.merge_and_unload()):
        assert asked(other, tmp_path / "base", transformers) == answers["merged"]
    # From the adapter's folder alone: it names the model it belongs to.
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(
        torch_logits(again.eval(), tokens.astype(np.int64)), theirs, rtol=0, atol=1e-4
    )


def test_an_export_speaks_in_transformers(transformers, tmp_path):
    """Chat template and generation settings of generated authors, as transformers reads them."""
    from train.data.examples import encode_prompt, written_chat_template

    config = DecoderConfig(VOCAB, 32, 48, 2, 4, 2, 8)
    params = jax.jit(models.Decoder(config).init)(jax.random.key(0))
    words = small_tokenizer().with_template(None)
    words = words.with_template(written_chat_template(words))
    folder = models.export(models.Loaded(config, params, words), tmp_path / "it", max_new_tokens=5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = model.generation_config
    assert (settings.max_new_tokens, settings.do_sample) == (5, False)
    assert settings.eos_token_id == VOCAB - 1
    chat = [{"role": "user", "content": "Who?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"][0].tolist() == encode_prompt(words, "Who?")
    answer = model.generate(**inputs)
    assert 0 < answer.shape[1] - inputs["input_ids"].shape[1] <= 5
