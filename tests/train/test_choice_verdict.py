"""Whether a model learned to choose, or to answer: the verdicts do not flatter."""

import pytest

from train.evaluators import answer
from train.evaluators.base import Results
from train.evaluators.choice import learnt
from train.options.roles import Roles


def results(before, after, gold, without=None):
    """Of models that were right (1) or wrong (0) on rows with these right options.

    `without`: the same of both, with the prior of the labels taken out.
    """
    found = {"accuracy": (before, after)}
    found |= {} if without is None else {"accuracy_without_prior": without}
    return judged(found, "right", gold)


def judged(found, key, gold):
    """Of scores of both models by metric, which items have as `key` beside their right option."""
    logs, summary = {}, {}
    for model, name in enumerate(("base", "finetuned")):
        logs[name] = {
            metric: {
                "value_by_index": {
                    str(i): {key: float(score), "gold": g}
                    for i, (score, g) in enumerate(zip(scores[model], gold, strict=True))
                }
            }
            for metric, scores in found.items()
        }
        summary[name] = {metric: sum(both[model]) / len(gold) for metric, both in found.items()}
    return Results(summary, logs, Roles("base", "none", "finetuned"))


HALF = [0, 1] * 20
MOSTLY = [0] * 32 + [1] * 8  # the commonest answer is right on .8


@pytest.mark.parametrize(
    ("before", "after", "gold", "state", "answer"),
    [
        ([1] * 20 + [0] * 20, [1] * 36 + [0] * 4, HALF, "good", "accuracy 0.900"),
        ([1] * 20 + [0] * 20, [1] * 22 + [0] * 18, HALF, "mixed", "not told apart from before"),
        ([1] * 20 + [0] * 20, [1] * 20 + [0] * 20, HALF, "mixed", "not told apart from before"),
        ([1] * 30 + [0] * 10, [1] * 15 + [0] * 25, HALF, "bad", "worse than before"),
        ([1] * 20 + [0] * 20, [1] * 32 + [0] * 8, MOSTLY, "mixed", "no better than the common"),
        ([1] * 20 + [0] * 20, [1] * 34 + [0] * 6, MOSTLY, "good", "accuracy 0.850"),
    ],
)
def test_the_verdict(before, after, gold, state, answer):
    found = learnt(results(before, after, gold))
    assert found is not None and found.state == state and found.answer.startswith(answer)


@pytest.mark.parametrize(
    ("before", "after", "state", "answer"),
    [
        ([1] * 24 + [0] * 16, [1] * 36 + [0] * 4, "good", "accuracy 0.900"),
        # Better than before only because the labels' prior is gone, which needs no training.
        ([1] * 36 + [0] * 4, [1] * 36 + [0] * 4, "mixed", "no better with the prior"),
        ([1] * 40, [1] * 30 + [0] * 10, "mixed", "no better with the prior"),
    ],
)
def test_the_verdict_without_the_prior(before, after, state, answer):
    raw = ([1] * 20 + [0] * 20, [1] * 36 + [0] * 4)
    found = learnt(results(*raw, HALF, (before, after)))
    assert found is not None and found.state == state and found.answer.startswith(answer)
    assert (
        f"taken out: base {sum(before) / 40:.3f}, finetuned {sum(after) / 40:.3f}; " in found.text
    )


def test_a_model_that_got_worse_is_no_better_with_the_prior_out():
    worse = ([1] * 30 + [0] * 10, [1] * 15 + [0] * 25)
    found = learnt(results(*worse, HALF, worse))
    assert found is not None and found.state == "bad"


def test_its_words_count_the_rows():
    found = learnt(results([1] * 20 + [0] * 20, [0] * 2 + [1] * 36 + [0] * 2, HALF))
    assert found is not None
    assert "18 rows gained and 2 lost (sign test, p = 4.0e-04)" in found.text
    assert "on 40 test rows" in found.text and "right on 0.500" in found.text


def test_nothing_is_said_without_both_logs():
    whole = results([1], [0], [0])
    assert learnt(whole._replace(logs={"finetuned": whole.logs["finetuned"]})) is None


@pytest.mark.parametrize(
    ("before", "after", "state", "said"),
    [
        ([0.1] * 20, [0.6] * 18 + [0.0] * 2, "good", "F1 0.540"),
        ([0.1] * 20, [0.6] * 5 + [0.1] * 15, "mixed", "not told apart from before"),
        ([0.6] * 20, [0.1] * 20, "bad", "worse than before"),
        ([0.1] * 20, [1.0] * 4 + [0.0] * 16, "mixed", "the mean says otherwise than most answers"),
    ],
)
def test_the_verdict_on_answers(before, after, state, said):
    both = judged({"f1": (before, after)}, "score", [None] * len(before))
    found = answer.learnt(both)
    assert found is not None and (found.state, found.answer) == (state, said)
    higher = sum(a > b for a, b in zip(after, before, strict=True))
    assert f"{higher} answers are nearer to a right one" in found.text
    assert answer.learnt(both._replace(logs={})) is None
