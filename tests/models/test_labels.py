"""Values at the labels: as from full logits in float64, in chunks, in groups, with any padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxlib_unlearn import objectives
from jaxlib_unlearn.objectives import Questions
from jaxlib_unlearn.objectives import options_of as objective_of
from models.decoder import labels
from models.decoder.asked import AskedDecoder
from models.decoder.labels import head_of, label_chunk, score, target_log_prob
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from models.learner import Frozen
from train.data import references
from train.data.batches import collate
from train.data.examples import Example, encode_group, encode_qa
from train.engine.step import Losses

# A prime vocabulary: an array whose size it divides has a vocabulary axis, whatever its shape.
VOCAB, LENGTH, WIDTH, ROWS = 97, 48, 16, 4
CONFIG = DecoderConfig(VOCAB, 16, 24, 2, 4, 2, 4)
SCORE = jax.jit(score, static_argnums=0)
LOG_PROBS = jax.jit(
    lambda params, batch, heat: AskedDecoder(
        TIED, params, options={"attention_temperature": jnp.broadcast_to(heat, 2)}
    ).log_probs(batch)
)
TIED, UNTIED = Decoder(CONFIG), Decoder(dataclasses.replace(CONFIG, tie_embeddings=False))


def sharp(decoder, seed):
    """Parameters with which every block and token matters and predictions are far from uniform."""
    draw = np.random.default_rng(seed)

    def one(path, leaf):
        if jax.tree_util.keystr(path).endswith("['scale']"):
            return 1 + 0.1 * draw.standard_normal(leaf.shape, np.float32)
        std = 0.8 if leaf.shape[0] == VOCAB else leaf.shape[-2] ** -0.5
        return jnp.array(std * draw.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(one, decoder.shapes())


def examples_of(seed=0, rows=ROWS):
    """Examples of unequal lengths, prompts and answers; the longest fill 40 slots and 14 labels."""
    draw = np.random.default_rng(seed)
    sizes = [(26, 14), (3, 1), (12, 9), (20, 5)][:rows]
    return [Example(draw.integers(2, VOCAB, p + a).tolist(), p) for p, a in sizes]


@pytest.fixture(scope="module")
def params():
    return sharp(TIED, 0)


@pytest.fixture(scope="module")
def examples():
    return examples_of()


@pytest.fixture(scope="module")
def batch(examples):
    return device(collate(examples, range(len(examples)), LENGTH, WIDTH))


def device(batch):
    return jax.tree.map(jnp.asarray, batch)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(decoder, params, tokens):
    return decoder.forward(params, tokens)[0]


def scored(params, batch):
    return SCORE(TIED, params, batch)


def full_log_softmax(decoder, params, tokens):
    """One text: log-probabilities at every slot, the head and softmax in float64.

    Attention is causal, so what fills the row after the text (one shape: one compilation) and the
    default segments do not matter.
    """
    filled = jnp.array([tokens + [7] * (64 - len(tokens))])
    hidden = hidden_states(decoder, params, filled)[:, : len(tokens)]
    head = (
        np.asarray(params["embed"]["embedding"]).T
        if decoder.config.tie_embeddings
        else np.asarray(params["lm_head"]["kernel"])
    )
    logits = np.asarray(hidden[0], np.float64) @ head.astype(np.float64)
    return (
        logits
        - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1))[:, None]
        - (logits.max(-1, keepdims=True))
    )


def expected_scores(decoder, params, example):
    """The four quantities of every label, a loop over the labels."""
    found = {"logp": [], "match": [], "mu": [], "var": []}
    table = full_log_softmax(decoder, params, example.tokens)
    for t in range(example.num_prompt, len(example.tokens)):
        log_p, p = table[t - 1], np.exp(table[t - 1])
        mu = np.sum(p * log_p)
        found["logp"].append(log_p[example.tokens[t]])
        found["match"].append(np.argmax(log_p) == example.tokens[t])
        found["mu"].append(mu)
        found["var"].append(np.sum(p * log_p**2) - mu**2)
    return found


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("decoder", [TIED, UNTIED], ids=["tied", "untied"])
def test_log_probs_and_score_equal_full_logits(decoder, chunked, examples, batch, monkeypatch):
    if chunked:
        monkeypatch.setattr(labels, "LOGITS_BYTES", 4 * ROWS * VOCAB * 3)  # holds 3, takes 2
        assert label_chunk(ROWS, WIDTH, VOCAB) == 2
    params = sharp(decoder, 1)
    values, log_probs = jax.jit(
        lambda p, b: (score(decoder, p, b), AskedDecoder(decoder, p).log_probs(b))
    )(params, batch)
    assert log_probs.dtype == jnp.float32
    for b, example in enumerate(examples):
        expected = expected_scores(decoder, params, example)
        count = len(expected["logp"])
        close(log_probs[b, :count], expected["logp"])
        assert np.all(log_probs[b, count:] == 0)
        assert values["match"][b, :count].tolist() == expected["match"]
        for name in ("logp", "mu", "var"):
            close(values[name][b, :count], expected[name], 3e-5)


def test_match_sees_right_and_wrong_labels(params, examples, batch):
    """Greedy continuations match everywhere; a random label almost nowhere."""
    table = full_log_softmax(TIED, params, examples[0].tokens)
    best = table[examples[0].num_prompt - 1].argmax()
    answer = Example([*examples[0].tokens[: examples[0].num_prompt], int(best)], 26)
    both = device(collate([answer, *examples[1:]], range(ROWS), LENGTH, WIDTH))
    match = np.asarray(scored(params, both)["match"])
    assert match[0, 0] and np.mean(match[1:]) < 0.2
    assert np.mean(np.asarray(scored(params, batch)["match"])) < 0.2


@pytest.mark.parametrize("reference", [False, True, "pair"])
def test_reduce_logits_hands_over_the_logits(params, examples, batch, reference, monkeypatch):
    """The student's logits, and with `reference` those of the frozen head on the cached states.

    A pair: first the states with the options of the row's reference, then those without.
    """
    teacher = sharp(TIED, 7)
    heat = jnp.array([1.0, 3.0])
    states = jax.jit(references.reference_values, static_argnums=(0, 1))
    batch = {
        **batch,
        "ref_hidden": states(TIED, "hidden", teacher, {"attention_temperature": heat}, batch),
        "ref_plain_hidden": states(TIED, "hidden", teacher, {}, batch),
    }

    def pick(logits, *rest):
        *frozen, targets = rest
        assert logits.shape[:-1] == targets.shape and logits.shape[-1] == VOCAB
        return (target_log_prob(logits, targets), *(target_log_prob(f, targets) for f in frozen))

    def reduced(params, frozen, batch):
        questions = Questions({"x": ("log_probs",)})
        context = DecoderLearner(TIED).context(params, Frozen(frozen), {"x": batch}, questions)
        if not reference:
            return context.model.reduce_logits(batch, pick)
        return context.compare(batch, pick, plain=reference == "pair")

    whole = jax.jit(reduced)(params, head_of(teacher), batch)
    monkeypatch.setattr(labels, "LOGITS_BYTES", 1)  # not even one column fits: chunks of one
    assert label_chunk(ROWS, WIDTH, VOCAB) == 1
    pieces = jax.jit(lambda *args: reduced(*args))(params, head_of(teacher), batch)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), whole, pieces)
    real = np.asarray(batch["target_mask"]) > 0
    close(whole[0][real], LOG_PROBS(params, batch, 1.0)[real])
    if reference:
        close(whole[1][real], LOG_PROBS(teacher, batch, heat)[real])
        assert np.abs(np.asarray(whole[1] - whole[0])[real]).mean() > 0.1
    if reference == "pair":
        close(whole[2][real], LOG_PROBS(teacher, batch, 1.0)[real])


def test_options_reach_forward(params, batch):
    plain, smooth = (LOG_PROBS(params, batch, jnp.full(2, heat)) for heat in (1.0, 50.0))
    real = np.asarray(batch["target_mask"]) > 0
    close(plain[real], scored(params, batch)["logp"][real])
    assert np.abs(smooth - plain).max() > 0.1


@pytest.mark.parametrize(("limit", "expected"), [(16, 16), (15, 8), (8, 8), (7, 4), (1, 1), (0, 1)])
def test_label_chunk_is_the_largest_divisor_that_fits(limit, expected, monkeypatch):
    monkeypatch.setattr(labels, "LOGITS_BYTES", 4 * ROWS * VOCAB * limit)
    assert label_chunk(ROWS, 16, VOCAB) == expected


class Letters:
    """A character tokenizer without a template."""

    has_chat_template, eos_id = False, 1

    def encode(self, text, add_special_tokens=False):
        return [2 + ord(c) % (VOCAB - 2) for c in text]

    def chat(self, messages, add_generation_prompt=False):
        raise NotImplementedError


def test_group_equals_separate_texts(params):
    answers = ["He wrote it.", "No", "In 1984, in Oslo", "No"]
    options = {"max_length": 60}
    groups = [
        encode_group(Letters(), "Who?", answers, **options),
        encode_group(Letters(), "Where was it made?", answers[1:3], **options),
    ]
    batch = device(collate(groups, [0, 1], 96, 48))
    values = scored(params, batch)
    for b, (question, mine) in enumerate([("Who?", answers), ("Where was it made?", answers[1:3])]):
        for j, answer in enumerate(mine):
            at = np.asarray(batch["answer"][b]) == j
            expected = expected_scores(
                TIED, params, encode_qa(Letters(), question, answer, **options)
            )
            assert np.sum(at) == len(answer) + 2  # a space before, the end of the turn after
            for name in ("logp", "mu", "var"):
                close(values[name][b, at], expected[name], 3e-5)
            assert values["match"][b, at].tolist() == expected["match"]


def test_padding_on_either_side_changes_nothing(params, examples, batch):
    shift = np.array([LENGTH - len(e.tokens) for e in examples])
    slots = np.arange(LENGTH)[None] - shift[:, None]  # where a slot's token was before
    real = slots >= 0
    rows = np.arange(ROWS)[:, None]
    left = {
        **batch,
        "tokens": jnp.where(real, batch["tokens"][rows, slots], 5),
        "positions": jnp.maximum(slots, 0),
        "segment_ids": jnp.array(real, jnp.int32),
        "label_index": batch["label_index"] + shift[:, None],
    }
    wide = device(collate(examples, range(ROWS), 64, 32, batch_size=6, pad_id=9))
    base = scored(params, batch)
    labels = np.asarray(batch["target_mask"]) > 0
    for other in (left, wide):
        values = scored(params, other)
        for name in ("logp", "mu", "var"):
            assert np.isfinite(values[name]).all()  # padding rows too: NaN times 0 is NaN
            close(values[name][:ROWS, :WIDTH][labels], base[name][labels], 2e-6)


# The vocabulary axis in traced programs.


def shapes_in(jaxpr):
    """Shapes of all values in a jaxpr and in every jaxpr that its equations hold."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for var in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars):
        yield getattr(var.aval, "shape", ())
    for eqn in jaxpr.eqns:
        for var in (*eqn.invars, *eqn.outvars):
            yield getattr(var.aval, "shape", ())
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
        ):
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
                yield from shapes_in(value)


def slots_with_logits(fn, *args):
    """The most slots that any array of `fn` holds a vocabulary for, parameters' own aside."""
    own = {x.shape for x in jax.tree.leaves(sharp(TIED, 0))}
    sizes = [
        int(np.prod(shape)) // VOCAB
        for shape in shapes_in(jax.make_jaxpr(fn)(*args))
        if np.prod(shape) % VOCAB == 0 and shape not in own and len(shape)
    ]
    return max(size for size in sizes if size)


def training(name, accumulate=1, **options):
    """Loss and gradient of an objective on batches with all caches, and its arguments."""
    row, config = objectives.resolve(objective_of(name, **options))
    params = sharp(TIED, 0)
    plain = device(collate(examples_of(), range(ROWS), LENGTH, WIDTH))
    plain["ref_log_probs"] = jnp.zeros((ROWS, WIDTH))
    plain["ref_hidden"] = jnp.zeros((ROWS, WIDTH, CONFIG.hidden_size))
    batches = {stream: plain for stream in row.streams}

    def run(params, frozen, batches):
        losses = Losses(DecoderLearner(TIED), row, config, params, frozen, batches, accumulate)
        return losses.gradients(params)

    return run, (params, head_of(params), batches)


PROGRAMS = {
    "train nll": lambda: training("nll"),
    "train asu": lambda: training("asu", retain="kl"),
    "train asu in parts": lambda: training("asu", 2, retain="kl"),
    "train npo": lambda: training("npo"),
    "train npo on logits": lambda: training("npo", compat="raw_logits"),
    "train dpo": lambda: training("dpo"),
    "score": lambda: (
        lambda params, batch: score(TIED, params, batch),
        (sharp(TIED, 0), device(collate(examples_of(), range(ROWS), LENGTH, WIDTH))),
    ),
    "reference logps": lambda: reference("logps"),
    "reference hidden": lambda: reference("hidden"),
}


def reference(kind):
    batch = device(collate(examples_of(), range(ROWS), LENGTH, WIDTH))
    heat = {"attention_temperature": jnp.ones(2)}
    return (
        lambda params, batch: references.reference_values(TIED, kind, params, heat, batch),
        (sharp(TIED, 0), batch),
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_batch_by_length_by_vocabulary_array(name, monkeypatch):
    fn, args = PROGRAMS[name]()
    if name == "reference hidden":
        shapes = list(shapes_in(jax.make_jaxpr(fn)(*args)))
        assert len(shapes) > 50
        assert not any(np.prod(s) % VOCAB == 0 and s != (VOCAB, 16) for s in shapes if len(s))
        return
    assert slots_with_logits(fn, *args) <= ROWS * WIDTH < ROWS * LENGTH
    # With less memory allowed, no more than a chunk of the labels.
    monkeypatch.setattr(labels, "LOGITS_BYTES", 4 * ROWS * VOCAB * 2)
    fn, args = PROGRAMS[name]()
    assert slots_with_logits(fn, *args) <= ROWS * 2


def test_the_search_finds_full_logits():
    """The check above would find them: also flattened, inside a scan, and in a gradient alone."""
    params = sharp(TIED, 0)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def naive(params):
        logits = TIED.unembed(params, TIED.forward(params, tokens)[0])
        return jax.nn.logsumexp(logits, -1).sum()

    def flat(params):
        hidden = TIED.forward(params, tokens)[0].reshape(ROWS * LENGTH, -1)
        body = lambda c, _: (c + TIED.unembed(params, hidden).sum(), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(body), 0.0, None, 2)[0]

    for fn in (naive, jax.grad(naive), jax.jit(flat), jax.grad(flat)):
        assert slots_with_logits(fn, params) >= ROWS * LENGTH


@pytest.mark.parametrize("name", ["train asu", "train npo"])
def test_gradient_through_chunks(name, monkeypatch):
    fn, args = PROGRAMS[name]()
    (metrics, whole) = jax.jit(lambda *a: fn(*a))(*args)
    monkeypatch.setattr(labels, "LOGITS_BYTES", 4 * ROWS * VOCAB * 4)
    (chunked_metrics, pieces) = jax.jit(lambda *a: fn(*a))(*args)
    assert float(metrics["loss"]) == pytest.approx(float(chunked_metrics["loss"]), rel=1e-6)
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(whole)))
    off = np.sqrt(
        sum(
            np.sum(np.square(a - b))
            for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True)
        )
    )
    assert size > 0 and off <= 1e-6 * size
