"""Whether a model learned to choose: the verdict does not flatter."""

import pytest

from train.evaluators.base import Results
from train.evaluators.choice import learnt
from train.evaluators.roles import Roles


def results(before, after, gold):
    """Of models that were right (1) or wrong (0) on rows with these right options."""
    models = {"base": before, "finetuned": after}
    logs = {
        name: {
            "accuracy": {
                "value_by_index": {
                    str(i): {"right": float(r), "gold": g}
                    for i, (r, g) in enumerate(zip(right, gold, strict=True))
                }
            }
        }
        for name, right in models.items()
    }
    summary = {name: {"accuracy": sum(right) / len(gold)} for name, right in models.items()}
    return Results(summary, logs, Roles("base", "none", "finetuned"))


HALF = [0, 1] * 20
MOSTLY = [0] * 32 + [1] * 8  # the commonest answer is right on .8


@pytest.mark.parametrize(
    ("before", "after", "gold", "state", "answer"),
    [
        ([1] * 20 + [0] * 20, [1] * 36 + [0] * 4, HALF, "good", "accuracy 0.900"),
        ([1] * 20 + [0] * 20, [1] * 22 + [0] * 18, HALF, "mixed", "not told apart from before"),
        ([1] * 20 + [0] * 20, [1] * 20 + [0] * 20, HALF, "mixed", "not told apart from before"),
        ([1] * 30 + [0] * 10, [1] * 15 + [0] * 25, HALF, "bad", "it got worse"),
        ([1] * 20 + [0] * 20, [1] * 32 + [0] * 8, MOSTLY, "mixed", "no better than the common"),
        ([1] * 20 + [0] * 20, [1] * 34 + [0] * 6, MOSTLY, "good", "accuracy 0.850"),
    ],
)
def test_the_verdict(before, after, gold, state, answer):
    found = learnt(results(before, after, gold))
    assert found is not None and found.state == state and found.answer.startswith(answer)


def test_its_words_count_the_rows():
    found = learnt(results([1] * 20 + [0] * 20, [0] * 2 + [1] * 36 + [0] * 2, HALF))
    assert found is not None
    assert "18 rows gained and 2 lost (sign test, p = 4.0e-04)" in found.text
    assert "on 40 test rows" in found.text and "right on 0.500" in found.text


def test_nothing_is_said_without_both_logs():
    whole = results([1], [0], [0])
    assert learnt(whole._replace(logs={"finetuned": whole.logs["finetuned"]})) is None
