"""Evaluating a model: one fused pass equals one text at a time, on any mesh, with any padding."""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder.labels import score
from models.decoder.model import Decoder, DecoderConfig
from models.text.prompts import TAGS, PromptFormat
from train.data import authors
from train.data.author_attributes import REFUSALS
from train.data.batches import collate, score_batches
from train.data.examples import Example, encode_prompt, encode_qa
from train.data.task import Task
from train.engine import base_models
from train.evaluators import EVALUATORS, evaluation
from train.evaluators.evaluation import (
    Answers,
    Model,
    curve,
    evaluate_model,
    judge_nll,
    score_rows,
)
from train.evaluators.judging import evaluation_inputs
from train.evaluators.leak import leak_ks
from train.options.config import DataConfig, EvaluateConfig
from train.reporting.verdict import verdicts
from train.runtime import sharding
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.stages import digest, json_stage

LONGEST = 128
CONFIG = EvaluateConfig(max_new_tokens=6, leak_samples=4, generate_rows=16)
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def task():
    """Four authors with three questions; authors and facts are rows of the same kind."""
    splits = authors.generate(0, 4, 3)
    rows = authors.training_rows(splits, 3)
    facts = [{k: r[k] for k in ("question", "answer", "perturbed_answer")} for r in splits["full"]]
    return Task(
        rows["forget10"],
        rows["retain_train"],
        {
            "forget": rows["forget10"],
            "retain": rows["retain_eval"],
            "real_authors": facts[:1],
            "world_facts": facts[:1],
            "holdout": rows["holdout"][:1],
        },
        list(REFUSALS),
        [],
    )


def make_model(task, seed, mesh=None):
    tokenizer = base_models.train_tokenizer(task, 320)
    sizes = (320, 32, 48, 2, 4, 2, 8)
    decoder = Decoder(DecoderConfig(*sizes, tie_embeddings=False, max_position_embeddings=256))
    draw = np.random.default_rng(seed)

    def one(path, leaf):  # every block and token matters, predictions are far from uniform
        if sharding.path_str(path).endswith("scale"):
            return np.ones(leaf.shape, np.float32)
        std = {"embed": 1.0, "lm_head": 0.5}.get(path[0].key, leaf.shape[-2] ** -0.5)
        return np.float32(std) * draw.standard_normal(leaf.shape, np.float32)

    params = jax.tree_util.tree_map_with_path(one, decoder.shapes())
    params = params if mesh is None else sharding.put_params(params, mesh)
    return Model(decoder, params, tokenizer, f"model {seed}")


@pytest.fixture(scope="module")
def one():
    return make_mesh(MeshConfig(1, 1, 1))


@pytest.fixture(scope="module")
def cube():
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def model(task, one):
    return make_model(task, 0, one)


def judged(task, mesh):
    """The whole evaluation with another model as the judge."""
    return evaluate_model(
        make_model(task, 0, mesh),
        task,
        CONFIG,
        system_prompt=SYSTEM,
        max_length=LONGEST,
        mesh=mesh,
        seed=5,
        name="tiny",
        judge=make_model(task, 1, mesh),
    )


@pytest.fixture(scope="module")
def log(task, one):
    return judged(task, one)


@functools.partial(jax.jit, static_argnums=0)
def scored_alone(decoder, params, batch):
    return score(decoder, params, batch)


def alone(model, example):
    """The quantities of one text, in a batch of its own; always one shape."""
    batch = jax.tree.map(jnp.asarray, collate([example], [0], LONGEST, 64))
    values = jax.device_get(scored_alone(model.decoder, model.params, batch))
    count = len(example.tokens) - example.num_prompt
    return {name: value[0, :count] for name, value in values.items()}


def test_fused_pass_equals_one_text_at_a_time(model, task, one):
    rows = task.evaluation["forget"]
    found = score_rows(model, rows, SYSTEM, LONGEST, one, 4096, "")
    assert set(found) == {"answers", "paraphrased", "perturbed"}
    for i, row in enumerate(rows):
        texts = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        mine = [found["answers"][i], found["paraphrased"][i], *found["perturbed"][i]]
        assert len(texts) == len(mine) == 7
        for text, got in zip(texts, mine, strict=True):
            assert got.text.strip() == text
            example = encode_qa(
                model.tokenizer, row["question"], text, system_prompt=SYSTEM, max_length=LONGEST
            )
            expected = alone(model, example)
            assert got.match.dtype == bool and got.match.tolist() == expected["match"].tolist()
            for name in ("logp", "mu", "var"):
                value = getattr(got, name)
                assert value.dtype == np.float32
                np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)


def test_answers_alone_need_no_other_column(model, task, one):
    rows = [{"question": r["question"], "answer": r["answer"]} for r in task.evaluation["forget"]]
    plain = score_rows(model, rows, SYSTEM, LONGEST, one, 4096, "")
    assert list(plain) == ["answers"]
    expected = alone(
        model,
        encode_qa(model.tokenizer, *rows[1].values(), system_prompt=SYSTEM, max_length=LONGEST),
    )
    np.testing.assert_allclose(plain["answers"][1].logp, expected["logp"], rtol=1e-5, atol=1e-5)


def compare(a, b, where=""):
    """Integers, texts and structure exactly, floats to 1e-6 of the larger of the two and 1."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            compare(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            compare(x, y, f"{where}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-6, abs=1e-6), where
    else:
        assert a == b and type(a) is type(b), where


def test_eight_devices_give_the_same_log(log, task, cube):
    compare(judged(task, cube), log)


def test_padding_rows_change_nothing(model, task, one):
    """Batches of two rows, the last half empty, and batches filled up for eight devices."""
    prompts = [encode_prompt(model.tokenizer, r["question"]) for r in task.evaluation["retain"]]
    items = [Example(p + p[:5] + [1], len(p)) for p in (*prompts, prompts[0])][:3]
    longest = max(len(item.tokens) for item in items)
    slots = 2 * -(-longest // 16) * 16
    sizes = [b["row_id"].tolist() for b in score_batches(items, batch_tokens=slots)]
    assert sum(row < 0 for rows in sizes for row in rows) >= 1, sizes
    eight = make_mesh(MeshConfig(8))
    spread = model._replace(params=sharding.put_params(model.params, eight))
    found = {
        "two rows": evaluation.score_items(model, items, one, slots, ""),
        "one row": evaluation.score_items(model, items, one, 1, ""),
        "eight ways": evaluation.score_items(spread, items, eight, 4096, ""),
    }
    for scored in found.values():
        assert len(scored) == len(items)
        for item, values, base in zip(items, scored, found["one row"], strict=True):
            assert values["targets"].tolist() == item.tokens[item.num_prompt :]
            assert np.array_equal(values["match"], base["match"])
            for name in ("logp", "mu", "var"):
                np.testing.assert_allclose(values[name], base[name], rtol=2e-6, atol=2e-6)


def test_curve_is_the_mean_probability_of_the_log(model, task, log, one):
    found = curve(model, task, SYSTEM, LONGEST, one, 4096, 40)
    for split in ("forget", "retain"):
        expected = log[f"{split}_Q_A_Prob"]["agg_value"]
        assert found[f"{split}_probability"] == pytest.approx(expected, rel=1e-5)
    few = curve(model, task, SYSTEM, LONGEST, one, 4096, 1)
    first = log["forget_Q_A_Prob"]["value_by_index"]["0"]["prob"]
    assert few["forget_probability"] == pytest.approx(first, rel=1e-5)


def test_judge_reads_the_answers_given(model, task, one):
    """Under the judge, with the answer's own tokens; an empty answer is only its end of text."""
    rows = task.evaluation["forget"][:3]
    eos = model.tokenizer.eos_id
    ids = [[[40, 41, 42]], [[]], [[43], [44, 45]]]  # only the first sample counts
    answers = Answers([[""] * len(one) for one in ids], ids)
    found = judge_nll(model, rows, answers, SYSTEM, one, 4096)
    assert [len(item) for item in found] == [3, 1, 1]
    for row, mine, tokens in zip(rows, found, ([40, 41, 42], [eos], [43]), strict=True):
        prompt = encode_prompt(model.tokenizer, row["question"], system_prompt=SYSTEM)
        expected = alone(model, Example(prompt + tokens, len(prompt)))["logp"]
        np.testing.assert_allclose(mine, -expected, rtol=1e-5)
        assert all(type(x) is float for x in mine)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(0, ()), (1, (1,)), (2, (1, 2)), (3, (1, 2)), (16, (1, 2, 4, 8, 16)), (20, (1, 2, 4, 8, 16))],
)
def test_leak_ks(samples, expected):
    assert leak_ks(samples) == expected


# What the log may contain beyond the names that other programs use.
EXTRA = {
    f"{split}_{which}_probability"
    for split in ("retain", "real_authors", "world_facts")
    for which in ("paraphrased", "perturbed", "normalised")
}


def test_all_flat_metrics_are_there(log, task, model):
    flat = evaluation.summarize(log, log, model)
    splits = ("forget", "retain", "real_authors", "world_facts")
    assert set(flat) == {
        *("unseen_p", "unseen_rouge", "unseen_probability", "unseen_truth_ratio"),
        "forget_quality",
        "forget_ks",
        *(f"{split}_probability" for split in splits),
        *(f"{split}_rouge" for split in splits),
        *(f"{split}_truth_ratio" for split in splits),
        "forget_paraphrased_probability",
        "forget_perturbed_probability",
        "model_utility",
        "extraction_strength",
        "exact_memorization",
        *(f"mia_{attack}_auc" for attack in ("loss", "zlib", "min_k", "min_k_plus_plus")),
        "privleak",
        *(f"leak_at_{k}" for k in (1, 2, 4)),
        "forget_oracle_nll",
        "repeated_bigram_rate",
        "forget_unreadable",
        "unreadable_rule",
        "forget_fact_recall",
        "retain_fact_recall",
        "num_parameters",
        "params_sha256",
    } | (EXTRA & set(flat))
    numbers = {k: v for k, v in flat.items() if k not in ("params_sha256", "unreadable_rule")}
    assert all(math.isfinite(v) for v in numbers.values())
    assert json.loads(json.dumps(flat)) == flat
    assert flat["forget_quality"] == 1.0 and flat["forget_ks"] == 0.0  # against itself
    assert flat["params_sha256"] == "model 0"
    assert flat["num_parameters"] == sum(x.size for x in jax.tree.leaves(model.params))
    without = evaluation.summarize(log, None, model)
    assert set(flat) - set(without) == {"forget_quality", "forget_ks"}


def test_log_is_per_item_and_its_aggregates_are_means(log, task, model):
    leak = log["leak_at_k"]
    items = [leak["value_by_index"][str(i)] for i in range(3)]
    scores = np.array([item["scores"] for item in items])
    assert scores.shape == (3, 4) and all(len(item["generations"]) == 4 for item in items)
    assert len({text for item in items for text in item["generations"]}) > 4  # draws differ
    assert leak["agg_value"]["1"] == pytest.approx(scores.mean())
    assert leak["agg_value"]["4"] == pytest.approx(scores.max(1).mean())
    nll = log["forget_oracle_nll"]
    items = nll["value_by_index"].values()
    total = sum(item["avg_loss"] * item["tokens"] for item in items)
    assert nll["agg_value"] == pytest.approx(total / sum(item["tokens"] for item in items))
    rate = log["repeated_bigram_rate"]
    assert rate["agg_value"] == pytest.approx(
        np.mean([item["score"] for item in rate["value_by_index"].values()])
    )
    # The prompt as the model read it, not the question alone.
    prompt = encode_prompt(
        model.tokenizer, task.evaluation["retain"][0]["question"], system_prompt=SYSTEM
    )
    shown = log["retain_Q_A_ROUGE"]["value_by_index"]["0"]["input"]
    assert shown == model.tokenizer.decode(prompt) and shown.startswith(SYSTEM)
    assert json.loads(json.dumps(log)) == log


def test_without_judge_samples_and_other_splits(model, task, one):
    only = task._replace(evaluation={"forget": task.evaluation["forget"][:2]})
    config = dataclasses.replace(CONFIG, leak_samples=0)
    found = evaluate_model(
        model, only, config, system_prompt=SYSTEM, max_length=LONGEST, mesh=one, seed=5, name="x"
    )
    assert "leak_at_k" not in found and "forget_oracle_nll" not in found
    assert not any(name.startswith(("retain", "ra_", "wf_", "mia")) for name in found)
    assert {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "repeated_bigram_rate"} <= set(found)
    flat = evaluation.summarize(found, None, model)
    assert "model_utility" not in flat and flat["params_sha256"] == model.sha


def test_empty_answers_are_not_readable(model, task, one, monkeypatch):
    """As when adapters broke the model: no repetition, but no answer either."""
    monkeypatch.setattr(evaluation, "generate", lambda d, p, prompts, **_: [[[]] for _ in prompts])
    only = task._replace(evaluation={"forget": task.evaluation["forget"]})
    config = dataclasses.replace(CONFIG, leak_samples=0)
    found = evaluate_model(
        model, only, config, system_prompt=SYSTEM, max_length=LONGEST, mesh=one, seed=5, name="x"
    )
    items = found["forget_readability"]["value_by_index"]
    assert {(i["readable"], i["reason"]) for i in items.values()} == {(False, "empty")}
    flat = evaluation.summarize(found, None, model)
    assert flat["forget_unreadable"] == 1.0 and flat["repeated_bigram_rate"] == 0.0
    assert flat["forget_fact_recall"] == 0.0
    assert verdicts({"unlearned": flat})[2].state == "bad"


def test_a_cut_is_held_against_an_answer_whose_truth_fits(model, task, one, monkeypatch):
    """Every answer is the beginning of the truth; only the limit on new tokens differs."""
    rows = task.evaluation["forget"]
    truths = [model.tokenizer.encode(row["answer"]) for row in rows]
    monkeypatch.setattr(
        evaluation, "generate",
        lambda d, p, prompts, sampling, **_: [[t[: sampling.max_new_tokens]] for t in truths],
    )  # fmt: skip
    only = task._replace(evaluation={"forget": rows})
    reasons = {}
    for limit in (6, 100):
        config = dataclasses.replace(CONFIG, leak_samples=0, max_new_tokens=limit)
        found = evaluate_model(
            model, only, config, system_prompt=None, max_length=LONGEST, mesh=one, seed=5, name="x"
        )
        items = found["forget_readability"]["value_by_index"]
        reasons[limit] = [item["reason"] for item in items.values()]
    assert reasons == {6: [""] * len(rows), 100: [""] * len(rows)}
    broken = [t[:6] for t in truths]
    monkeypatch.setattr(evaluation, "generate", lambda d, p, prompts, **_: [[t] for t in broken])
    found = evaluate_model(
        model, only, config, system_prompt=None, max_length=LONGEST, mesh=one, seed=5, name="x"
    )
    items = found["forget_readability"]["value_by_index"]
    assert {i["reason"] for i in items.values()} == {"no sentence of the generator"}


# The key of an evaluation.


def changed(task, split, column):
    """The task with one word of one row changed."""
    rows = [dict(row) for row in task.evaluation[split]]
    value = rows[0][column]
    rows[0][column] = [*value[:-1], "x"] if isinstance(value, list) else value + "x"
    return task._replace(evaluation={**task.evaluation, split: rows})


def keys(model, task):
    """Cache keys of one evaluation and of every variation of it."""
    data = DataConfig()
    judge = model._replace(sha="judge")

    def key(model=model, task=task, config=CONFIG, data=data, judge=judge, seed=0):
        return digest(evaluation_inputs(model, task, config, data, judge, seed))

    forget = task.evaluation["forget"]
    yield "as it is", key()
    yield "parameters", key(model=model._replace(sha="other"))
    words = base_models.train_tokenizer(task, 300)
    yield "tokenizer", key(model=model._replace(tokenizer=words))
    formats = {
        "tags": PromptFormat(TAGS["llama2"]),
        "shots": PromptFormat(shots=(("q", "a"),)),
        "template date": PromptFormat(date="26 Jul 2024"),
    }
    for name, format in formats.items():
        yield name, key(model=model._replace(tokenizer=model.tokenizer.formatted(format)))
    decoder = Decoder(dataclasses.replace(model.decoder.config, rope_theta=1e6))
    yield "model", key(model=model._replace(decoder=decoder))
    yield "judge", key(judge=model._replace(sha="other"))
    yield "no judge", key(judge=None)
    yield "seed", key(seed=1)
    yield "system prompt", key(data=dataclasses.replace(data, system_prompt="Hi"))
    yield "longest", key(data=dataclasses.replace(data, max_length=99))
    yield "an answer", key(task=changed(task, "forget", "answer"))
    yield "a wrong answer", key(task=changed(task, "retain", "perturbed_answer"))
    yield "a non-member", key(task=changed(task, "holdout", "question"))
    yield "order", key(task=task._replace(evaluation={**task.evaluation, "forget": forget[::-1]}))
    fewer = {k: v for k, v in task.evaluation.items() if k != "holdout"}
    yield "evaluators", key(task=task._replace(evaluators=task.evaluators[:-1]))
    yield "a split", key(task=task._replace(evaluation=fewer))
    for field in dataclasses.fields(CONFIG):
        value = getattr(CONFIG, field.name)
        if value is None:  # `judge_model`: any folder
            other = Path(__file__).parents[2] / ".ci"
        else:
            other = value + "x" if isinstance(value, str) else value + 1
        yield field.name, key(config=dataclasses.replace(CONFIG, **{field.name: other}))


def test_cache_keys_change_with_everything_they_depend_on(model, task, monkeypatch):
    found = dict(keys(model, task))
    again = dict(keys(model._replace(params=None), copy.deepcopy(task)))
    assert found == again  # by content, not by object
    assert len(set(found.values())) == len(found), found
    monkeypatch.setattr(evaluation, "VERSION", evaluation.VERSION + 1)
    assert dict(keys(model, task))["as it is"] not in found.values()
    monkeypatch.undo()
    leak = EVALUATORS["leak"]
    monkeypatch.setitem(EVALUATORS, "leak", leak._replace(version=leak.version + 1))
    newer = dict(keys(model, task))
    assert newer["as it is"] not in found.values()
    assert newer["evaluators"] == found["evaluators"]  # without the one that changed


def test_an_evaluation_is_computed_once_a_key(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"agg_value": len(calls)}

    path = tmp_path / "evals" / "original.json"
    assert json_stage(path, {"params": "a"}, compute) == {"agg_value": 1}
    assert json_stage(path, {"params": "a"}, compute) == {"agg_value": 1}
    assert json_stage(path, {"params": "b"}, compute) == {"agg_value": 2}
    path.write_text(path.read_text().replace("2", "3"))  # not what was computed
    assert json_stage(path, {"params": "b"}, compute) == {"agg_value": 3} and len(calls) == 3


# What an evaluator asks of texts as they stand.


@pytest.fixture
def context(model, task, one):
    rows = {"forget": task.evaluation["forget"]}
    return evaluation.ModelContext(model, rows, CONFIG, None, LONGEST, one, 0, "tiny")


def test_options_are_the_sums_and_means_of_a_plain_forward_pass(context, model, task):
    """The oracle: every option alone behind its prompt, all logits, one log-softmax."""
    rows = [
        {
            "prompt": row["question"],
            "options": [*dict.fromkeys([row["answer"], "Home", *row["answer"].split()])],
        }
        for row in task.evaluation["forget"]
    ]
    found = context.options(rows)
    for row, got in zip(rows, found, strict=True):
        for j, option in enumerate(row["options"]):
            whole = model.tokenizer.encode(f"{row['prompt']} {option}", add_special_tokens=True)
            start = len(model.tokenizer.encode(row["prompt"], add_special_tokens=True))
            padded = jnp.asarray([whole + [0] * (LONGEST - len(whole))])
            hidden, _ = model.decoder.forward(model.params, padded)
            logits = jax.nn.log_softmax(model.decoder.unembed(model.params, hidden)[0], -1)
            logps = [float(logits[i - 1, whole[i]]) for i in range(start, len(whole))]
            assert got.sums[j] == pytest.approx(sum(logps), rel=1e-5)
            assert got.means[j] == pytest.approx(sum(logps) / len(logps), rel=1e-5)
    # The sum and the mean choose differently here, so neither can stand for the other.
    assert [int(np.argmax(one.sums)) for one in found] != [
        int(np.argmax(one.means)) for one in found
    ]


def test_a_text_is_scored_and_continued_without_a_question(context, model, monkeypatch):
    asked = []
    real = evaluation.generate

    def counting(decoder, params, prompts, **how):
        asked.extend(prompts)
        return real(decoder, params, prompts, **how)

    monkeypatch.setattr(evaluation, "generate", counting)
    texts = ["The author was born", "Home is a quiet street", "The author was born"]
    found = context.generated(texts, 6)
    assert found[0] == found[2] and all(len(one.ids) <= 6 for one in found)
    assert [model.tokenizer.decode(one.ids) for one in found] == [one.text for one in found]
    context.generated(texts[:1], 6)  # known
    assert asked == [model.tokenizer.encode(text, add_special_tokens=True) for text in texts[:2]]
    # Each token of a continuation is the model's first choice after the text before it.
    (scored,) = context.scored([texts[0] + found[0].text], "texts")
    before = len(asked[0]) - 1
    if len(scored["match"]) == before + len(found[0].ids):
        assert scored["match"][before:].all()
    letter = next(c for c in found[0].text if c.strip())
    (stopped,) = context.generated(texts[:1], 6, (letter,))
    assert stopped.text == found[0].text[: found[0].text.index(letter)]


def test_answers_begin_as_each_row_says(context, model, task):
    rows = task.evaluation["forget"]
    starts = [row["answer"].split()[0] for row in rows]
    found = context.answers("forget", starts=starts)
    for row, start, prompt in zip(rows, starts, found.prompts, strict=True):
        assert prompt == model.tokenizer.decode(
            encode_prompt(model.tokenizer, row["question"], start=start)
        )
    assert context.answers("forget", starts=tuple(starts)) is found
    assert context.answers("forget") is context.answers("forget", starts=[""] * len(rows))
