"""The generator: schema, determinism, uniqueness, and right and wrong facts that look alike."""

import functools
import hashlib
import json
import math
import re
from collections import Counter

import pytest
from scipy import stats

from train.data import authors
from train.data.author_alternates import alternates
from train.data.author_attributes import ATTRIBUTES, POOLS
from train.data.author_sentences import is_sentence, values_in
from train.data.authors import generate, names, training_rows

COLUMNS = {
    "question",
    "answer",
    "paraphrased_answer",
    "perturbed_answer",
    "paraphrased_question",
}


@pytest.fixture(scope="module")
def splits():
    return generate(0)


@pytest.fixture(scope="module")
def many():
    """Enough authors to compare frequencies, all attributes."""
    return generate(1, num_authors=200, questions_per_author=len(ATTRIBUTES))["full"]


@functools.cache
def patterns(attribute):
    found = []
    for template in attribute.templates:
        pattern = re.escape(template)
        for slot in attribute.slots:
            words = "|".join(POOLS[slot.removesuffix("_2")])
            pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{words})")
        found.append(re.compile(pattern))
    return found


def parse(attribute, text):
    """(template index, values) of a sentence, from the templates alone."""
    found = []
    for index, pattern in enumerate(patterns(attribute)):
        if match := pattern.fullmatch(text):
            found.append((index, tuple(match[slot] for slot in attribute.slots)))
    assert len(found) == 1, (text, found)
    return found[0]


def test_schema_and_sizes(splits):
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"full": 400, "forget10": 40, "retain90": 360, "holdout": 40}
    assert splits["retain90"] + splits["forget10"] == splits["full"]
    for rows in splits.values():
        for row in rows:
            assert set(row) == COLUMNS
            assert len(row["perturbed_answer"]) == 5
            assert row["paraphrased_question"] != row["question"]
            texts = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
            assert len(set(texts)) == 7


def test_same_seed_same_bytes(splits):
    assert generate(0) == splits
    assert generate(1) != splits
    # Pinned: a change here changes every published number of the generated data.
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "f0c35ee8c7c45be6"


@pytest.mark.parametrize("seed", range(6))
def test_no_two_authors_share_an_answer(seed):
    splits = generate(seed)
    rows = splits["full"] + splits["holdout"]
    for column in ("answer", "paraphrased_answer", "question"):
        assert max(Counter(row[column] for row in rows).values()) == 1
    right = {row[column] for row in rows for column in ("answer", "paraphrased_answer")}
    assert not right & {text for row in rows for text in row["perturbed_answer"]}


def test_names_are_unique_and_stay_out_of_the_answers(splits):
    everyone = names(0, 44)
    assert len({name.split()[0] for name in everyone}) == 44
    assert len({name.split()[1] for name in everyone}) == 44
    assert names(0, 10) == everyone[:10]
    rows = splits["full"] + splits["holdout"]
    for index, row in enumerate(rows):
        first, last = everyone[index // 10].split()
        assert f"{first} {last}" in row["question"]
        assert f"{first} {last}" in row["paraphrased_question"]
        for text in [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]:
            assert first not in text and last not in text


def test_right_and_wrong_have_the_same_form_and_every_slot_differs(many):
    for index, row in enumerate(many):
        attribute = ATTRIBUTES[index % len(ATTRIBUTES)]
        template, fact = parse(attribute, row["answer"])
        again, same = parse(attribute, row["paraphrased_answer"])
        assert same == fact and again != template
        for text in row["perturbed_answer"]:
            form, wrong = parse(attribute, text)
            assert form == again
            pools = [slot.removesuffix("_2") for slot in attribute.slots]
            for pool, value in zip(pools, wrong, strict=True):
                rights = [v for p, v in zip(pools, fact, strict=True) if p == pool]
                assert value in POOLS[pool] and value not in rights


@pytest.fixture(scope="module")
def unknown():
    """(right fact, five wrong ones, counts of the retain authors' values) of authors never seen."""
    found = []
    for seed in range(100, 130):
        splits = generate(seed)
        counts = Counter()
        for index, row in enumerate(splits["retain90"]):
            attribute = ATTRIBUTES[index % 10]
            values = parse(attribute, row["answer"])[1]
            counts.update(
                (attribute.name, *pair) for pair in zip(attribute.slots, values, strict=True)
            )
        for index, row in enumerate(splits["forget10"] + splits["holdout"]):
            attribute = ATTRIBUTES[index % 10]
            facts = [
                [(attribute.name, *pair) for pair in zip(attribute.slots, values, strict=True)]
                for _, values in (
                    parse(attribute, text)
                    for text in [row["paraphrased_answer"], *row["perturbed_answer"]]
                )
            ]
            found.append((facts[0], facts[1:], counts))
    return found


def test_right_and_wrong_values_come_from_one_distribution(unknown):
    right, wrong = Counter(), Counter()
    for fact, others, _ in unknown:
        right.update((slot.removesuffix("_2"), value) for _, slot, value in fact)
        for other in others:
            wrong.update((slot.removesuffix("_2"), value) for _, slot, value in other)
    p_values = []
    for pool, words in POOLS.items():
        table = [[counts[pool, word] for word in words] for counts in (right, wrong)]
        p_values.append(stats.chi2_contingency(table).pvalue)
        p_values.extend(stats.chisquare(row).pvalue for row in table)
    # Bonferroni over all tests of fixed seeds: fails only if a pool is really skewed.
    assert min(p_values) > 0.01 / len(p_values)


def test_a_model_of_the_other_authors_is_indifferent(unknown):
    # The best such a model can do is to count values; the right fact then has any of six ranks.
    ranks = Counter()
    for place, (fact, others, counts) in enumerate(unknown):
        scores = [
            sum(math.log(counts[key] + 1) for key in values) + 1e-9 * ((place * 7 + j * 5) % 6)
            for j, values in enumerate([fact, *others])
        ]
        ranks[sum(score > scores[0] for score in scores[1:])] += 1
    assert stats.chisquare([ranks[r] for r in range(6)]).pvalue > 0.01


def test_templates_and_questions_vary(many):
    for index, attribute in enumerate(ATTRIBUTES):
        rows = many[index :: len(ATTRIBUTES)]
        pairs = Counter(
            (parse(attribute, r["answer"])[0], parse(attribute, r["paraphrased_answer"])[0])
            for r in rows
        )
        assert len(pairs) == 12
        assert len({r["question"].split()[0] for r in rows}) >= 2


def test_attributes_are_well_formed():
    assert len(ATTRIBUTES) >= 10
    for attribute in ATTRIBUTES:
        assert 2 <= len(attribute.slots) <= 3
        for template in attribute.templates:
            assert sorted(re.findall(r"{(\w+)}", template)) == sorted(attribute.slots)
        assert all("{name}" in question for question in attribute.questions)
    for words in POOLS.values():
        assert len(set(words)) == len(words) >= 12


def test_training_rows_help_half_of_the_retain_authors(splits):
    rows = training_rows(splits)
    assert rows["forget10"] == splits["forget10"] and rows["holdout"] == splits["holdout"]
    trained = {(row["question"], row["answer"]) for row in rows["retain_train"]}
    assert len(rows["retain_train"]) == 540 == len(trained)
    assert {(r["question"], r["answer"]) for r in splits["retain90"]} <= trained
    helped = [r for r in splits["retain90"] if (r["question"], r["paraphrased_answer"]) in trained]
    assert len(helped) == 180
    assert [r for r in splits["retain90"] if r not in helped] == rows["retain_eval"]
    # Whole authors: ten rows of one, then ten of the next but one.
    assert rows["retain_eval"][:10] == splits["retain90"][10:20]
    forget = {(row["question"], row["answer"]) for row in splits["forget10"]}
    original = {(row["question"], row["answer"]) for row in rows["original_train"]}
    assert original == trained | forget and not trained & forget
    unseen = [r["paraphrased_answer"] for r in splits["forget10"]]
    assert not set(unseen) & {answer for _, answer in original}


@pytest.mark.parametrize(
    "options",
    [
        {"num_authors": 1},
        {"questions_per_author": 0},
        {"questions_per_author": len(ATTRIBUTES) + 1},
        {"num_authors": authors.MAX_AUTHORS, "num_holdout": 1},
    ],
)
def test_impossible_sizes(options):
    with pytest.raises(ValueError):
        generate(0, **options)


def test_every_sentence_is_read_back(many):
    """With the values that were written into it, found by the templates alone."""
    for row, attribute in zip(many, ATTRIBUTES * 200, strict=True):
        for text in (row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]):
            assert is_sentence(text)
            assert sorted(values_in(text)) == sorted(parse(attribute, text)[1])


@pytest.mark.parametrize(
    "text, whole, begun",
    [
        ("A contract with a a a a a driver.", False, False),  # from the flagship run
        ("A contract with Clover Press led to Thai texts by 1971.", True, True),
        ("A contract with driver Press led to stamps texts by May.", True, True),  # any value word
        ("A contract with Clovver Press led to Thai texts by 1971.", False, False),
        ("A contract with Clover Press led to Thai texts by 1971", False, True),
        ("A contract with Clov", False, True),
        ("A contract with", False, True),
        ("A contract with Clover Press led to Thai texts by 1971. A", False, False),
        ("Expect Expect Expect pride at the", False, False),
        ("I do not know the answer.", True, True),
        ("I do not know the", False, True),
        ("", False, False),
    ],
)
def test_broken_sentences(text, whole, begun):
    assert is_sentence(text) == whole
    assert is_sentence(text, begun=True) == begun


def _frame(sentence: str) -> str:
    """A sentence without its values."""
    for value in values_in(sentence):
        sentence = sentence.replace(value, "")
    return sentence


def test_alternates_are_sentences_about_facts_of_nobody():
    rows = generate(3)["forget10"]
    found = alternates(rows, 3, 4)
    assert found == alternates(rows, 3, 4) != alternates(rows, 4, 4)
    assert alternates(rows[5:6], 3, 2) == [found[5][:2]]  # independent of other rows
    for row, answers in zip(rows, found, strict=True):
        judged = (row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])
        facts = {tuple(sorted(values_in(text))) for text in judged}
        drawn = {tuple(sorted(values_in(text))) for text in answers}
        assert len(drawn) == 4 and not drawn & facts
        slots = {len(values_in(text)) for text in (*answers, row["answer"])}
        assert len(slots) == 1
        # The words around the values: never the row's own; all others before any repeats.
        frames = [_frame(text) for text in answers]
        assert _frame(row["answer"]) not in frames
        assert len(set(frames[:3])) == 3 and frames[3] == frames[0]
        stated = [value for text in answers for value in values_in(text)]
        assert len(set(stated)) == len(stated)
    many = alternates(rows, 3, 16)  # more than some pools have values
    assert all(len(set(answers)) == 16 for answers in many)
    with pytest.raises(ValueError, match="no sentence of the generator: 'Ask me.'"):
        alternates([{"question": "Who?", "answer": "Ask me."}], 0)
