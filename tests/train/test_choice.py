"""Rows with options: the loss against float64 loops, whatever lies beside a row; bad rows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_unlearn import losses, objectives
from jaxlib_unlearn.errors import UserError
from models import Tokenizer
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder, DecoderConfig
from train.data.choice import choice_stream, encode_choices, joined
from train.data.stream import Packable, Positioned
from train.data.streams import batches_of, pack_streams
from train.engine.step import Losses

ROW, OPTIONS = objectives.resolve("choice", objectives.LEARNING)


def words() -> Tokenizer:
    """A letter is a token; `^` begins a text and `b` and `c` are one token where they meet."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocab = {"^": 0, " ": 1, "?": 2, "bc": 3}
    vocab |= {letter: 4 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="^ $A", pair="^ $A $B", special_tokens=[("^", 0)]
    )
    return Tokenizer(backend, bos_id=0)


def random_rows(count, seed=0):
    """Prompts and options of any length; some rows have two options, some three."""
    draw = np.random.default_rng(seed)

    def text(low, high):
        return "".join(draw.choice(list("defghijk"), int(draw.integers(low, high))))

    rows = []
    for _ in range(count):
        options = [" " + "abc"[k] + text(0, 4) for k in range(int(draw.integers(2, 4)))]
        gold = int(draw.integers(len(options)))
        rows.append({"prompt": text(1, 20), "options": options, "gold": gold})
    return rows


RANDOM = random_rows(8)
CONFIG = DecoderConfig(32, 8, 16, 2, 2, 1, 4)
LEARNER = DecoderLearner(Decoder(CONFIG))


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(LEARNER.decoder.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x if x.std() == 0 else 4 * x, drawn)  # norms stay 1


@jax.jit
def logits_of(params, tokens):
    return LEARNER.decoder.unembed(params, LEARNER.decoder.forward(params, tokens)[0])


def stream(rows=RANDOM, batch_size=8):
    return choice_stream(encode_choices(words(), rows, 64)[0], 0, batch_size)


def alone(params, row):
    """Loops: each option is a text of its own, its label's log-probabilities one by one."""
    tokenizer, scores = words(), []
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    for option in row["options"]:
        own = tokenizer.encode(option)
        # No token sees those behind it: filled up, the texts share a program.
        tokens = jnp.array([(prompt + own + 64 * [0])[:64]])
        logits = np.asarray(logits_of(params, tokens)[0], np.float64).tolist()
        found = []
        for i, token in enumerate(own):
            z = logits[len(prompt) + i - 1]
            total = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
            found.append(z[token] - total)
        scores.append(sum(found) / len(found))
    return math.log(sum(math.exp(s) for s in scores)) - scores[row["gold"]]


def value_and_grad(params, batch, accumulate=1, learner=LEARNER):
    batches = {"train": {name: jnp.asarray(x) for name, x in batch.items()}}

    @jax.jit
    def both(params):
        made = Losses(learner, ROW, OPTIONS, params, None, batches, accumulate)
        metrics, (grads,) = made.gradients(params)
        return metrics["loss"], grads

    loss, grads = both(params)
    return float(loss), grads


def whole(made, rows=None, shape=None):
    rows = np.arange(len(made)) if rows is None else np.asarray(rows)
    return made.batch(rows, shape or made.shape(rows), 0)


@pytest.fixture(scope="module")
def wanted(params):
    return float(np.mean([alone(params, row) for row in RANDOM]))


ORDER = [3, 1, 7, 0, 2, 6, 5, 4]
LAYOUTS = {
    "padded, in another order": lambda: (whole(stream(), ORDER, (80, 19)), 1),
    "two micro-batches": lambda: (whole(stream()), 2),
    "four rows in one": lambda: (whole(stream().packed(4, 8), ORDER), 1),
    "two rows in one, two micro-batches": lambda: (whole(stream().packed(2, 8)), 2),
}


def test_the_loss_is_that_of_a_float64_loop(params, wanted):
    assert value_and_grad(params, whole(stream()))[0] == pytest.approx(wanted, rel=1e-6)


def test_what_lies_beside_a_row_changes_nothing(params, float64):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    wide = DecoderLearner(Decoder(dataclasses.replace(CONFIG, dtype="float64")))
    plain = value_and_grad(params, whole(stream()), learner=wide)
    for name, layout in LAYOUTS.items():
        loss, grads = value_and_grad(params, *layout(), learner=wide)
        assert loss == pytest.approx(plain[0], rel=1e-12), name
        off = optax.tree.norm(optax.tree.sub(grads, plain[1]))
        assert off.dtype == np.float64 and off <= 1e-12 * optax.tree.norm(plain[1]), name


def test_the_layouts_are_what_they_say():
    shapes = [make()[0]["tokens"].shape[0] for make in LAYOUTS.values()]
    assert shapes == [8, 8, 2, 4]
    made = stream()
    assert isinstance(made, Packable) and isinstance(made, Positioned)
    texts = [row["prompt"] + option for row in RANDOM for option in row["options"]]
    # Nothing is predicted from the last token of an option.
    assert made.longest == max(len(words().encode(text, True)) for text in texts) - 1
    packed = pack_streams({"train": made}, 8, 8, 64)["train"]
    assert packed is not made and packed.identity() == made.identity()
    assert pack_streams({"train": made}, 8, 8, 0)["train"] is made
    # A prompt is stored once, whatever the number of options.
    row = made.rows[0].group
    assert (
        len(row.tokens) < len(words().encode(RANDOM[0]["prompt"])) * len(RANDOM[0]["options"]) + 9
    )


def test_every_row_is_in_an_epoch_once():
    made = pack_streams({"train": stream(random_rows(12), 4)}, 4, 4, 60)
    make = batches_of(made, "train", 1, 4)
    seen = [make(step)["train"]["row_id"].tolist() for step in range(3)]
    assert sorted(sum(seen, [])) == list(range(12))


def test_what_makes_a_stream_another():
    plain = stream().identity()
    for change in ({"gold": 0}, {"gold": 1}, {"prompt": "d"}, {"options": [" a", " b", " cd"]}):
        rows = [RANDOM[0] | change, *RANDOM[1:]]
        assert (stream(rows).identity() == plain) == (rows == RANDOM)


def test_scores_and_padding_rows():
    log_probs = jnp.array([[-1.0, -3.0, -5.0, jnp.nan]])
    scores = losses.option_scores(log_probs, jnp.array([[0, 0, 2, -1]]), 3)
    assert scores.tolist() == [[-2.0, 0.0, -5.0]]
    present = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])

    def loss(scores):
        total, rows = losses.choice(scores, present, jnp.array([2, -1]))
        return total / rows

    value, grad = jax.value_and_grad(loss)(jnp.concatenate([scores, scores]))
    assert float(value) == pytest.approx(math.log(1 + math.exp(3.0)))
    assert grad[0, 1] == 0 and not grad[1].any()
    p = 1 / (1 + math.exp(-3.0))
    np.testing.assert_allclose(grad[0], [p, 0, -p], rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"options": [" a", " a"]}], "row 1: the options ' a' and ' a' are the same tokens"),
        ([{}, {"options": [" a", "a"]}], "row 2: the options ' a' and 'a' are the same tokens"),
        ([{"options": [" a", ""], "prompt": "d "}], "row 1: the option '' has no tokens"),
        ([{"options": [" a", " " + "d" * 9]}], "an option alone fills the 8 tokens"),
    ],
)
def test_options_that_cannot_be_told_apart(rows, message):
    full = [{"prompt": "d", "options": [" a", " b"], "gold": 0} | row for row in rows]
    with pytest.raises(UserError) as error:
        encode_choices(words(), full, 8, "train")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_long_prompt_loses_its_beginning():
    rows = [{"prompt": "defghijk", "options": [" a", " abd"], "gold": 0}]
    (row,), num_cut = encode_choices(words(), rows, 8)
    tokens = words().encode("hijk")
    assert num_cut == 1 and row.group.tokens[:5] == [0, *tokens[1:], row.group.tokens[4]]
    (row,), num_cut = encode_choices(words(), rows, 13)
    assert num_cut == 0 and row.group.tokens[: 1 + 8] == [0, *words().encode("defghijk")]


def test_an_option_that_merges_with_the_prompt_is_tokenised_alone():
    assert joined("b", "c") == "b c" and joined("b ", "c") == "b c" and joined("", "c") == "c"
    rows = [{"prompt": "d b", "options": ["c", "d"], "gold": 0}]
    (row,), _ = encode_choices(words(), rows, 30)
    assert row.group.targets == words().encode(" c") + words().encode(" d")
