"""Questions with one right answer that a model reasons about first: the answer, and the trace."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import (
    Definition,
    Evaluator,
    Finding,
    Metric,
    Results,
    Rows,
    Verdict,
)
from train.evaluators.curves import loss_curve
from train.evaluators.numbers import format_number
from train.evaluators.paired import paired

METRICS = (
    Metric("answer_accuracy", "Answer accuracy", "share of the greedy answers that end in the "
           "right one", "up", main=True),
    Metric("answer_nll", "Answer NLL", "nats a token of the right answer behind the whole trace "
           "that belongs to it", "down", main=True),
    Metric("finished", "Finished", "share of the greedy answers that closed their trace and ended",
           "up"),
    Metric("generated_tokens", "Generated tokens", "of a greedy answer with its trace", main=True),
    Metric("train_tokens", "Tokens", "of the examples that were trained on", main=True),
    Metric("token_ratio", "Token ratio", "these, of those of all examples with whole traces"),
    Metric("thought_ratio", "Thought ratio", "thoughts that were left, of all"),
    Metric("packing_waste", "Padding", "share of the slots of packed rows"),
    Metric("train_steps", "Steps", "that it was trained for"),
    Metric("train_flops", "Expected work", "operations of the model's products in training"),
    Metric("train_seconds", "Seconds", "that its steps took, without compilation", main=True),
)  # fmt: skip


def run(model: Any, rows: Rows, context: Any) -> dict[str, Any]:
    """The judgement of every greedy answer, and the likelihood of the right one."""
    import numpy as np

    from jaxlib_unlearn.cot import CLOSE, OPEN
    from jaxlib_unlearn.metrics.final_answer import final_answer, same_answer

    asked = rows["test"]
    answers = context.answers("test")
    most, slots = context.config.max_new_tokens, model.decoder.config.max_position_embeddings
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("answer_accuracy", "finished")}
    found |= {"generated_tokens": [], "answer_nll": []}
    for row, texts, ids in zip(asked, answers.texts, answers.ids, strict=True):
        text, count = texts[0], len(ids[0])
        stuck = OPEN in text and CLOSE not in text  # no answer was given
        said = "" if stuck else final_answer(text)
        right = same_answer(said, row["gold"])
        # The end of the turn is not among the tokens: an answer that fills its room was cut.
        room = min(most, slots - len(context.prompt(row["question"])))
        ended = CLOSE in text and count < room
        found["answer_accuracy"].append(
            {"score": float(right), "generation": text, "gold": row["gold"]}
        )
        found["finished"].append({"score": float(ended)})
        found["generated_tokens"].append({"score": count})
    for values in context.scores("test")["answers"]:
        found["answer_nll"].append({"score": -float(np.mean(values["logp"], dtype=np.float64))})
    return {
        name: {
            "agg_value": float(np.mean([item["score"] for item in items])),
            "value_by_index": {str(i): item for i, item in enumerate(items)},
        }
        for name, items in found.items()
    }


def learnt(results: Results) -> Finding | None:
    """Whether the model gives more right answers than before, beyond chance."""
    found = paired(results, "answer_accuracy", "score")
    if found is None:
        return None
    share = results.scores("answer_accuracy").judged
    state, answer = found.judged(("good", f"{format_number(share)} of its answers are right"))
    return Finding(
        "Does it reason to the right answer?",
        state,
        answer,
        f"Right answers, of all: {results.across('answer_accuracy')}; {found.text('answers')}. "
        f"Answers that came to an end: {results.across('finished')}. Given the whole trace, nats a "
        f"token of the right answer: {results.across('answer_nll')}; such a trace often names it, "
        "so this alone is no proof of reasoning.",
    )


DEFINITIONS = (
    Definition(
        "final_answer",
        "Answer accuracy: what stands behind the trace is compared with the right answer as a "
        "number, or as a text: the content of the last \\boxed{}, else what follows ####, else the "
        "last number. An answer whose trace does not end is wrong.",
    ),
)
ROW = Evaluator(
    "final_answer",
    run,
    METRICS,
    verdicts=(Verdict("final_answer", learnt),),
    pictures=(loss_curve("Cross-entropy of every step's batch, in nats a token."),),
    definitions=DEFINITIONS,
    version=2,
    lead="A model was fine-tuned on traces of reasoning. Below: whether it reasons to right "
    "answers, before and after, and how that was measured.",
)
