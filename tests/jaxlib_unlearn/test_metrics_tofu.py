"""TOFU logs: published aggregates to the last printed digit, and build -> write -> read."""

import json
import math

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics import likelihood, privacy, tofu
from jaxlib_unlearn.metrics.eval_log import PREFIXES, parse_log
from jaxlib_unlearn.metrics.likelihood import Scored
from jaxlib_unlearn.metrics.tofu import SplitScores

# Official logs of the original TOFU code, Llama-2-7b: the card's table.
OFFICIAL = {
    "full": dict(
        retain_probability=0.989527, retain_rouge=0.985655, retain_truth_ratio=0.474699,
        real_authors_probability=0.455482, real_authors_rouge=0.933000,
        real_authors_truth_ratio=0.596229, world_facts_probability=0.418562,
        world_facts_rouge=0.882479, world_facts_truth_ratio=0.539033,
        forget_probability=0.990939, forget_rouge=0.985450, forget_truth_ratio=0.515985,
        model_utility=0.6226774,
    ),
    "retain90": dict(
        retain_probability=0.988897, retain_rouge=0.975811, retain_truth_ratio=0.470977,
        real_authors_probability=0.434087, real_authors_rouge=0.923000,
        real_authors_truth_ratio=0.570681, world_facts_probability=0.414326,
        world_facts_rouge=0.897436, world_facts_truth_ratio=0.544198,
        forget_probability=0.147563, forget_rouge=0.408244, forget_truth_ratio=0.674019,
        model_utility=0.6137450,
    ),
}  # fmt: skip


# --- published numbers


@pytest.fixture(scope="module")
def official(shared):
    folder = shared / "data" / "tofu_eval_logs"
    if not folder.is_dir():
        pytest.skip("the official TOFU logs are not among the reference data")
    return {name: tofu.load_log(folder / f"llama2-7b_{name}.json") for name in OFFICIAL}


@pytest.mark.parametrize("model", OFFICIAL)
def test_official_aggregates(official, model):
    summary = tofu.summarize(official[model])
    for name, value in OFFICIAL[model].items():
        digits = 7 if name == "model_utility" else 6
        assert summary[name] == pytest.approx(value, abs=0.51 * 10**-digits), name
    assert tofu.model_utility(official[model]) == summary["model_utility"]
    assert len(tofu.utility_components(official[model])) == 9
    counts = {name: len(official[model].items[f"{name}_rouge"]) for name in PREFIXES}
    assert counts == {"forget": 300, "retain": 300, "real_authors": 100, "world_facts": 117}


def test_official_forget_quality(official):
    test = tofu.forget_quality(official["full"], official["retain90"])
    assert test.p_value == pytest.approx(1.834066e-21, rel=1e-6)
    assert test.statistic == pytest.approx(0.3966667, abs=1e-7)
    summary = tofu.summarize(official["full"], official["retain90"])
    assert (summary["forget_ks"], summary["forget_quality"]) == test
    assert "privleak" not in summary and "mia_min_k_auc" not in summary


@pytest.fixture(scope="module")
def reference(shared):
    file = shared / "papers" / "benchmarks_reference.json"
    if not file.is_file():
        pytest.skip("the reference numbers are not among the reference data")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def fixture_1b(reference):
    """Losses and min-k scores of the 400 items under the 1B models."""
    return reference["fixture_tofu_1b_forget10"]


def eval_json(model):
    def losses(values):
        items = {str(i): {"avg_loss": v, "prob": np.exp(-np.asarray(v)).tolist()}
                 for i, v in enumerate(values)}  # fmt: skip
        return {"agg_value": None, "value_by_index": items}

    sides = {
        side: {"value_by_index": {str(i): {"score": s} for i, s in enumerate(model[key])}}
        for side, key in (("forget", "min_k_score_forget"), ("holdout", "min_k_score_holdout"))
    }
    return {
        "forget_Q_A_Prob": losses(model["answer_avg_loss"]),
        "forget_Q_A_PARA_Prob": losses(model["paraphrased_avg_loss"]),
        "forget_Q_A_PERT_Prob": losses(model["perturbed_avg_loss"]),
        "mia_min_k": sides,
    }


def test_fixture(fixture_1b):
    full, retain = eval_json(fixture_1b["full"]), eval_json(fixture_1b["retain90"])
    summary = tofu.summarize(full, retain)
    assert summary["forget_quality"] == pytest.approx(3.905471e-22, rel=1e-4)
    assert summary["forget_ks"] == pytest.approx(0.35, abs=1e-12)
    assert summary["forget_truth_ratio"] == pytest.approx(0.4755639, abs=2e-7)
    assert summary["mia_min_k_auc"] == pytest.approx(0.99665, abs=1e-7)
    assert summary["privleak"] == pytest.approx(-99.45739, abs=1e-5)
    assert summary["forget_probability"] == pytest.approx(0.8805, abs=5e-5)
    assert summary["forget_paraphrased_probability"] == pytest.approx(0.1004, abs=5e-5)
    assert summary["forget_perturbed_probability"] == pytest.approx(0.0413, abs=5e-5)
    assert "model_utility" not in summary
    other = tofu.summarize(retain)
    assert other["forget_truth_ratio"] == pytest.approx(0.6274598, abs=2e-7)
    assert other["mia_min_k_auc"] == pytest.approx(0.3826125, abs=1e-7)
    assert other["privleak"] == pytest.approx(23.4775, abs=1e-5)
    for name, expected in (("full", 0.6849836), ("retain90", 0.5673484)):
        model = fixture_1b[name]
        ratio = likelihood.truth_ratio(model["paraphrased_avg_loss"], model["perturbed_avg_loss"])
        assert np.mean(1 / (1 + ratio)) == pytest.approx(expected, abs=2e-7)


def test_published_utility_and_privleak(reference):
    names = [
        f"{prefix}_{quantity}"
        for prefix, prob in (("retain", "Q_A_Prob"), ("ra", "Q_A_Prob_normalised"),
                             ("wf", "Q_A_Prob_normalised"))
        for quantity in (prob, "Q_A_ROUGE", "Truth_Ratio")
    ]  # fmt: skip
    for models in reference["tofu_aggregates"].values():
        for name, row in models.items():
            utility = tofu.model_utility(components([row[n] for n in names]))
            assert utility == pytest.approx(row["model_utility"], abs=2e-7)
            forget = name.partition("@")[2]
            retain = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
            reference_auc = models[retain[forget]]["mia_min_k"] if forget else 0.5
            leak = privacy.privleak(row["mia_min_k"], reference_auc)
            assert leak == pytest.approx(row["privleak"], abs=1e-4)


# --- build, write, read


def scored(rng, bias=0.0, tokens=8):
    logp = -rng.exponential(1.0 + bias, tokens).astype(np.float32)
    return Scored(logp, rng.random(tokens) < 0.6, logp - 1, np.ones(tokens, np.float32), "a text")


def split_scores(rng, n=6, wrong=3, paraphrased=True, bias=0.0):
    return SplitScores(
        answers=[scored(rng, bias, 4 + i % 3) for i in range(n)],
        paraphrased=[scored(rng, 0.5) for _ in range(n)] if paraphrased else None,
        perturbed=[[scored(rng, 1.0) for _ in range(wrong)] for _ in range(n)],
        generations=["the author was born in Lisbon"] * n,
        references=[f"the author number {i} was born in Porto" for i in range(n)],
        prompts=["Where?"] * n,
    )


def splits(seed, bias=0.0):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (extra [train])")
    rng = np.random.default_rng(seed)
    return {
        "forget": split_scores(rng, wrong=5, bias=bias),
        "retain": split_scores(rng, wrong=5),
        "real_authors": split_scores(rng, paraphrased=False),
        "world_facts": split_scores(rng, paraphrased=False),
        "holdout": SplitScores([scored(rng, 1.0) for _ in range(5)]),
    }


def test_names_are_those_of_open_unlearning():
    log = tofu.build_log(splits(0))
    by_split = {
        p: {f"{p}_Q_A_Prob", f"{p}_Q_A_PERT_Prob", f"{p}_Q_A_ROUGE"} for p in PREFIXES.values()
    }
    assert set(log) == set().union(*by_split.values()) | {
        "forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob", "forget_truth_ratio", "retain_Truth_Ratio",
        "ra_Truth_Ratio", "wf_Truth_Ratio", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised",
        "extraction_strength", "exact_memorization", "mia_loss", "mia_zlib", "mia_min_k",
        "mia_min_k_plus_plus", "privleak", "model_utility",
    }  # fmt: skip
    item = log["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert {"rouge1_recall", "rougeL_recall", "rougeL_f1", "input", "ground_truth"} < set(item)
    assert len(log["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["avg_loss"]) == 5
    assert set(log["mia_zlib"]) == {"forget", "holdout", "auc", "agg_value"}


def test_round_trip(tmp_path):
    mine, retain = tofu.build_log(splits(0)), tofu.build_log(splits(1, bias=2.0))
    file = tmp_path / "EVAL.json"
    file.write_text(json.dumps(mine, allow_nan=False))
    read = tofu.load_log(file)
    summary = tofu.summarize(mine, retain)
    assert tofu.summarize(read, retain) == summary
    from_losses = {name: table for name, table in mine.items() if "ruth_" not in name}
    assert tofu.summarize(from_losses, retain) == summary
    from_scores = {name: table for name, table in mine.items() if "PERT" not in name}
    del summary["forget_perturbed_probability"]
    assert tofu.summarize(from_scores, retain) == summary
    aggregates = {
        "forget_Q_A_Prob": "forget_probability", "forget_Q_A_PARA_Prob":
        "forget_paraphrased_probability", "forget_Q_A_PERT_Prob": "forget_perturbed_probability",
        "ra_Q_A_Prob_normalised": "real_authors_probability", "wf_Q_A_ROUGE": "world_facts_rouge",
        "forget_truth_ratio": "forget_truth_ratio", "retain_Truth_Ratio": "retain_truth_ratio",
        "ra_Truth_Ratio": "real_authors_truth_ratio", "wf_Truth_Ratio": "world_facts_truth_ratio",
        "extraction_strength": "extraction_strength", "exact_memorization": "exact_memorization",
        "mia_min_k_plus_plus": "mia_min_k_plus_plus_auc", "model_utility": "model_utility",
    }  # fmt: skip
    summary = tofu.summarize(read, retain)
    for metric, name in aggregates.items():
        assert mine[metric]["agg_value"] == pytest.approx(summary[name], rel=1e-12), metric
    assert mine["privleak"]["agg_value"] == tofu.summarize(read)["privleak"]
    auc = {one: log["mia_min_k"]["auc"] for one, log in (("mine", mine), ("retain", retain))}
    assert summary["privleak"] == privacy.privleak(auc["mine"], auc["retain"])


def test_definitions_of_the_built_items():
    data = splits(3)
    log = parse_log(tofu.build_log(data))
    forget, authors = data["forget"], data["real_authors"]
    loss = likelihood.avg_loss
    wrong = [np.mean([loss(x) for x in items]) for items in forget.perturbed]
    paraphrased = [loss(x) for x in forget.paraphrased]
    ratios = np.exp(np.array(paraphrased) - wrong)
    np.testing.assert_allclose(log.items["forget_truth_ratio"], ratios, rtol=1e-6)
    right = np.exp([-loss(x) for x in authors.answers])
    others = [sum(likelihood.probability(x) for x in items) for items in authors.perturbed]
    np.testing.assert_allclose(
        log.items["real_authors_probability"], right / (right + others), rtol=1e-6
    )
    wrong = [np.mean([loss(x) for x in items]) for items in authors.perturbed]
    np.testing.assert_allclose(
        log.items["real_authors_truth_ratio"], np.exp(-np.log(right) - wrong), rtol=1e-6
    )


def test_partial_logs():
    rng = np.random.default_rng(4)
    log = tofu.build_log({"retain": SplitScores([scored(rng) for _ in range(3)])})
    assert set(log) == {"retain_Q_A_Prob", "model_utility_of_1"}
    assert set(tofu.utility_components(log)) == {"retain_probability"}
    assert set(tofu.summarize(log)) == {"retain_probability", "model_utility_of_1"}
    assert tofu.model_utility(log) == pytest.approx(log["retain_Q_A_Prob"]["agg_value"])
    forget = tofu.build_log({"forget": SplitScores([scored(rng) for _ in range(3)])})
    assert set(tofu.summarize(forget)) == {
        "forget_probability", "extraction_strength", "exact_memorization"}  # fmt: skip
    with pytest.raises(UserError, match="no utility metrics"):
        tofu.model_utility(forget)
    with pytest.raises(UserError, match="no truth ratios"):
        tofu.forget_quality(forget, forget)


@pytest.mark.parametrize("count", range(1, 10))
def test_only_all_nine_parts_are_called_model_utility(count):
    log = components([0.4] * 9)
    log = log._replace(items={name: log.items[name] for name in tofu.UTILITY[:count]})
    named = {name for name in tofu.summarize(log) if name.startswith("model_utility")}
    assert named == {"model_utility" if count == 9 else f"model_utility_of_{count}"}


def test_privleak_in_the_file_is_that_of_the_summary():
    mine, retain = tofu.build_log(splits(0)), tofu.build_log(splits(1, bias=2.0))
    assert mine["mia_min_k"]["auc"] != 0.5 != retain["mia_min_k"]["auc"]
    for reference in (retain, None):
        log = tofu.with_reference(mine, reference)
        leak = tofu.summarize(mine, reference)["privleak"]
        assert log["privleak"]["agg_value"] == leak
        assert tofu.summarize(log, reference) == tofu.summarize(mine, reference)
        assert {k: v for k, v in log.items() if k != "privleak"} == {
            k: v for k, v in mine.items() if k != "privleak"
        }
    assert tofu.with_reference(mine, retain)["privleak"] != mine["privleak"]
    plain = {"forget_Q_A_Prob": mine["forget_Q_A_Prob"]}
    assert tofu.with_reference(plain, retain) == plain


def test_items_without_labels_are_left_out(tmp_path):
    rng = np.random.default_rng(5)
    empty = Scored(*(np.zeros(0, np.float32),) * 4, "")
    item = scored(rng)
    wrong = [[item, empty], [item, item], [empty, empty]]
    data = SplitScores([item, empty, empty], [item, item, item], wrong)
    log = tofu.build_log({"forget": data, "holdout": SplitScores([empty, item])})
    text = json.dumps(log, allow_nan=False)
    assert "null" not in text
    assert list(log["forget_Q_A_Prob"]["value_by_index"]) == ["0"]
    assert list(log["exact_memorization"]["value_by_index"]) == ["0"]
    assert log["forget_Q_A_Prob"]["agg_value"] == pytest.approx(likelihood.probability(item))
    assert log["exact_memorization"]["agg_value"] == likelihood.exact_memorization(item)
    strength = likelihood.extraction_strength(item)
    assert log["extraction_strength"]["agg_value"] == pytest.approx(strength / 3)
    # An item keeps its number in every metric for which it has a value.
    assert list(log["forget_Q_A_PARA_Prob"]["value_by_index"]) == ["0", "1", "2"]
    assert list(log["forget_Q_A_PERT_Prob"]["value_by_index"]) == ["0", "1"]
    assert list(log["forget_truth_ratio"]["value_by_index"]) == ["0", "1"]
    assert log["mia_min_k"]["holdout"]["value_by_index"]["0"]["score"] == 0
    read = parse_log(json.loads(text))
    np.testing.assert_allclose(read.items["forget_truth_ratio"], [1, 1], atol=1e-6)
    assert tofu.build_log({"retain": SplitScores([empty])}) == {}


def test_build_log_rejects_bad_splits():
    rng = np.random.default_rng(6)
    item = scored(rng)
    with pytest.raises(ValueError, match="unknown split"):
        tofu.build_log({"train": SplitScores([item])})
    with pytest.raises(ValueError, match="different lengths"):
        tofu.build_log({"forget": SplitScores([item], [item, item])})
    with pytest.raises(UserError, match="split retain: no items"):
        tofu.build_log({"retain": SplitScores([])})
    nan = item._replace(logp=np.full(3, np.nan, np.float32))
    for scores, where in (
        (SplitScores([item, nan]), "split retain, item 1: a log-probability of its answer is"),
        (SplitScores([item], [nan]), "item 0: a log-probability of its paraphrased answer is"),
        (SplitScores([item], perturbed=[[item, nan]]), "item 0: .* of its wrong answer 1 is"),
    ):
        with pytest.raises(UserError, match=where + " not finite; the model has diverged"):
            tofu.build_log({"retain": scores})


# --- aggregates


def flat_log(values):
    return tofu.EvalLog("test", {name: np.array([v, v]) for name, v in values.items()}, {})


def components(values):
    """A log whose nine utility components take the given values."""
    names = tofu.UTILITY
    pairs = zip(names, values, strict=True)
    return flat_log({n: 1 - v if n.endswith("truth_ratio") else v for n, v in pairs})


def test_model_utility_is_the_harmonic_mean():
    values = np.random.default_rng(7).uniform(0.1, 1, 9)
    assert tofu.model_utility(components(values)) == pytest.approx(9 / np.sum(1 / values))
    assert tofu.model_utility(components([0.4] * 9)) == pytest.approx(0.4)
    for index in range(9):
        zero = [0.4] * 9
        zero[index] = 0.0
        assert tofu.model_utility(components(zero)) == 0


def test_forget_quality_properties():
    rng = np.random.default_rng(8)
    first, second = rng.uniform(0.2, 1.5, 40), rng.uniform(0.4, 2.0, 40)

    def quality(a, b):
        logs = (tofu.EvalLog("test", {"forget_truth_ratio": x}, {}) for x in (a, b))
        return tofu.forget_quality(*logs)

    assert quality(first, first).p_value == 1
    base = quality(first, second)
    np.testing.assert_allclose(quality(1 / first, 1 / second), base, rtol=1e-9)
    assert quality(rng.permutation(first), rng.permutation(second)) == base
    apart = quality(first, first + 10)
    assert math.log10(apart.p_value) == pytest.approx(math.log10(1.86e-23), abs=0.002)
    with pytest.raises(UserError, match="39 forget items against 40"):
        quality(first, second[:39])


# --- files of others


def test_open_unlearning_variants():
    items = {"0": {"score": 0.5}, "1": None, "2": {"score": 2.0}, "10": {"score": 4.0}}
    log = parse_log({
        "forget_truth_ratio": {"agg_value": 0.4, "value_by_index": items},
        "mia_min_k": {"agg_value": 0.7, "auc": 0.7},
        "model_utility": {"agg_value": 0.6},
    })  # fmt: skip
    np.testing.assert_array_equal(log.items["forget_truth_ratio"], [0.5, 2.0, 4.0])
    assert log.auc == {"min_k": 0.7}
    assert tofu.summarize(log)["privleak"] == pytest.approx(-40)


def test_metrics_of_other_programs_are_read_and_kept(tmp_path):
    def table(key, *values):
        items = {str(i): {key: value, "input": "text"} for i, value in enumerate(values)}
        return {"agg_value": float(np.mean(values)), "value_by_index": items}

    def attack(inside, outside):
        return {"forget": table("score", *inside), "holdout": table("score", *outside), "auc": 0.0}

    muse = {
        "forget_knowmem_ROUGE": table("rougeL_f1", 0.2, 0.4),
        "retain_knowmem_ROUGE": table("rougeL_f1", 0.5, 0.7),
        "forget_verbmem_ROUGE": table("rougeL_f1", 0.1, 0.1),
        "forget_gibberish": table("score", 0.9, 0.7),
        "extraction_strength": table("score", 0.25, 0.75),
        "mia_gradnorm": attack([1.0, 4.0], [2.0, 3.0]),
        "mia_reference": {"agg_value": 0.75, "auc": 0.75},
        "privleak": {"agg_value": -4.72},
    }
    file = tmp_path / "MUSE_EVAL.json"
    file.write_text(json.dumps(muse))
    assert tofu.summarize(tofu.load_log(file)) == pytest.approx({
        "forget_knowmem_rouge": 0.3, "retain_knowmem_rouge": 0.6, "forget_verbmem_rouge": 0.1,
        "forget_gibberish": 0.8, "extraction_strength": 0.5, "mia_gradnorm_auc": 0.5,
        "mia_reference_auc": 0.75, "privleak": -4.72,
    })  # fmt: skip
    # Next to min-k scores the stated privleak has another reference, so it is computed instead.
    both = tofu.summarize({**muse, "mia_min_k": attack([1.0, 2.0], [3.0, 4.0])})
    assert both["privleak"] == pytest.approx(-100)
    gibberish = {"forget_Q_A_gibberish": table("score", 0.5)}
    assert tofu.summarize(gibberish) == {"forget_q_a_gibberish": 0.5}


PROB = '{"forget_Q_A_Prob": {"value_by_index": {"0": {"prob": %s}}}}'


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "check the path"),
        ("{", "not JSON"),
        ("[1, 2]", "not an evaluation log"),
        ('{"accuracy": 1.0}', "not an evaluation log"),
        ('{"forget_Q_A_Prob": 0.5}', "not a summary"),
        ('{"forget_Q_A_Prob": {"agg_value": 0.5}}', "not a summary"),
        ('{"forget_Q_A_Prob": {"value_by_index": {"0": {"loss": 1}}}}', "per-item prob"),
        ('{"forget_Q_A_Prob": {"value_by_index": {"0": {"prob": NaN}}}}', "prob of item 0 is not"),
        ('{"forget_Q_A_PERT_Prob": {"value_by_index": {"0": {"prob": [1], "avg_loss": [1]}, "7": '
         '{"prob": [1, NaN], "avg_loss": [1, 1]}}}}', "forget_Q_A_PERT_Prob prob of item 7 is not"),
        ('{"eval_log.json": {"avg_gt_loss": {"0": 1, "3": Infinity}}}', "avg_gt_loss, .*item 3"),
        ('{"mia_loss": {"forget": {"value_by_index": {"a": 1}}, "holdout": {"value_by_index": '
         '{"a": 1}}}}', "mia_loss has no readable"),
        ('{"eval_log.json": {"avg_gt_loss": {"0": 1.0}}}', "average_perturb_loss"),
        ('{"eval_log.json": 3}', "not an evaluation log"),
        ("[" * 99999, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ('{"forget_Q_A_Prob": {}, "forget_Q_A_Prob": {}}', "stands twice"),
        (PROB % '"0.5"', "per-item prob"),
        (PROB % "true", "per-item prob"),
        (PROB % "1e400", "prob of item 0 is not finite"),
        (PROB % "[]", "per-item prob"),
        (PROB % "[0.5, 0.4]", "is not one number per item"),
        (PROB % "1.5", "probability has a value that is not between 0 and 1"),
        (PROB % "-0.5", "probability has a value that is not between 0 and 1"),
        ('{"forget_Q_A_Prpb": {}}', "'forget_Q_A_Prpb' is unknown, and 'forget_Q_A_Prob' is abs"),
        ('{"mia_loss": []}', "mia_loss is not a table of items"),
        ('{"forget_Q_A_Prob": {"value_by_index": {}}}', "is not a table of items"),
        ('{"eval_log.json": {"avg_gt_loss": {"0": -1}, "average_perturb_loss": {"0": [1.0]}}}',
         "item 0 has the loss -1"),
    ],
)  # fmt: skip
def test_broken_files_end_in_one_line(tmp_path, content, message):
    file = tmp_path / "log.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tofu.load_log(file)
    assert "\n" not in str(caught.value) and "log.json" in str(caught.value)


def test_binary_file_is_a_user_error(tmp_path):
    file = tmp_path / "log.json"
    file.write_bytes(b"\x80\x04\x95")
    with pytest.raises(UserError, match="not JSON"):
        tofu.load_log(file)
