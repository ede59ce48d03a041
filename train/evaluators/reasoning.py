"""Reasoning: what traces give away of the facts to forget, and how well the model still reasons."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from train.evaluators.base import (
    Definition,
    EvaluationContext,
    Evaluator,
    Log,
    Metric,
    Rows,
    Sample,
    Samples,
    from_entry,
)
from train.evaluators.leak import ENTRY as LEAK
from train.evaluators.leak import leak_ks

# Answers are compared by the package math-verify where it is installed, else as numbers.
VERIFIES = importlib.util.find_spec("math_verify") is not None
MATCHER = "math-verify" if VERIFIES else "numbers"
SAFE = 1  # the class of traces that give nothing away

METRICS = (
    Metric("final_accuracy", "Final accuracy (forget)",
           "share of the questions to forget whose right option has the highest log-likelihood "
           "behind the model's own thoughts", "down", main=True),
    Metric("trace_unsafe", "Unsafe traces",
           "share of the traces about facts to forget that state or narrow down the answer, or "
           "recall another fact (classes C2 to C4)", "down", main=True),
    Metric("trace_c4", "Traces that state it", "share of class C4: the right answer is stated",
           "down"),
    Metric("trace_c3", "Traces that exclude", "share of class C3: a wrong option is excluded",
           "down"),
    Metric("trace_c2", "Traces with other facts", "share of class C2: another fact is recalled",
           "down"),
    Metric("trace_rouge", "Trace ROUGE-L",
           "ROUGE-L recall of the thoughts that were learned, facts to forget", "down", main=True),
    Metric("kept_accuracy", "Kept accuracy",
           "of what is kept: final answers that are right, or images that show the class of their "
           "prompt", "up", main=True),
    Metric("reasoning_accuracy", "Reasoning accuracy",
           "share of the reasoning questions whose answer is right", "up", main=True),
    Metric("reasoning_nll", "Reasoning NLL",
           "nats per token of the right answers to the reasoning questions behind the thoughts of "
           "the data", "down"),
)  # fmt: skip


class Thinking(EvaluationContext, Protocol):
    """The requests of these evaluations beside the others."""

    def prompt(self, question: str, start: str = "") -> list[int]:
        """The tokens of a question up to its answer, of which `start` is the beginning."""
        ...

    def classes(self, rows: Any) -> list[int | None]:
        """Classes of traces by `--evaluate.judge-model`, see `trace_judge.classes`."""
        ...


def run(model: Any, rows: Rows, context: Any) -> dict[str, Any]:
    """Traces and answers of every split."""
    start = context.config.think_start
    log: dict[str, Any] = {}
    if "forget" in rows:
        log |= about_traces(rows["forget"], context, start)
        log |= repeated(context, start)
        log |= leaked(rows["forget"], context, start)
    for split, name in (("forget", "final_accuracy"), ("retain", "kept_accuracy")):
        if chosen := choices(model, rows.get(split, ()), context, split, start):
            log[name] = entry(chosen, "right")
    if rows.get("reasoning"):
        log |= about_answers(model, rows["reasoning"], context, start)
    return log


def entry(items: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """An entry of the log: the mean of a number over items, and the items."""
    return {
        "agg_value": sum(float(item[key]) for item in items.values()) / len(items),
        "value_by_index": dict(items),
    }


def written(context: Thinking, split: str, start: str) -> list[tuple[str, str]]:
    """Trace and answer of every greedy completion of a split."""
    from train.data.thoughts import parted

    found = context.answers(split, starts=start).texts
    return [parted(f"{start}\n{texts[0]}" if start else texts[0]) for texts in found]


def judged(trace: str, answer: str, start: str) -> str:
    """The text that is judged as the trace: where `start` closes the thoughts, the whole output.

    Example:
        >>> judged("", "Hmm, in Lima.", "<think></think>"), judged("Hmm.", "Lima", "<think>")
        ('Hmm, in Lima.', 'Hmm.')
    """
    from train.data.thoughts import CLOSE

    return f"{trace}\n{answer}".strip() if CLOSE in start else trace


def wrong_options(row: Mapping[str, Any]) -> list[str]:
    """The options of a row that are not right."""
    return [text for i, text in enumerate(row.get("options") or ()) if i != row["gold"]]


def gold_of(row: Mapping[str, Any]) -> str:
    """The right answer of a row, as a trace would state it."""
    return row["options"][row["gold"]] if row.get("options") else row["final"]


def class_of(row: Mapping[str, Any], trace: str) -> int:
    """The class of a trace by rules: 1 to 4."""
    from jaxlib_unlearn.metrics.traces import trace_class

    facts = row.get("facts") or row["thoughts"]
    return trace_class(trace, gold_of(row), wrong_options(row), facts, row["question"])


def about_traces(rows: Sequence[Any], context: Thinking, start: str) -> dict[str, Any]:
    """The class of every trace, and what it has in common with the thoughts that were learned."""
    from jaxlib_unlearn.metrics import text

    folder = context.config.judge_model
    found = [(judged(*one, start), one[1]) for one in written(context, "forget", start)]
    if folder is None:
        named: list[int | None] = [
            class_of(row, trace) for row, (trace, _) in zip(rows, found, strict=True)
        ]
    else:
        asked = [
            (row["question"], gold_of(row), trace)
            for row, (trace, _) in zip(rows, found, strict=True)
        ]
        named = context.classes(asked)
    items, overlaps = {}, {}
    for i, (row, (trace, answer), kind) in enumerate(zip(rows, found, named, strict=True)):
        learned = " ".join(row["thoughts"])
        overlaps[str(i)] = {"rougeL_recall": text.rouge(trace, learned)["rougeL_recall"]}
        if kind is not None:  # shares count only traces that were given a class
            asked = {"question": row["question"], "right_answer": gold_of(row)}
            told = {**asked, "class": kind, "trace": trace, "answer": answer}
            items[str(i)] = {"unsafe": float(kind != SAFE), **told}
    log = {"trace_rouge": entry(overlaps, "rougeL_recall")}
    if not items:
        return log
    classes = {
        f"trace_c{c}": {
            "agg_value": sum(item["class"] == c for item in items.values()) / len(items),
            "value_by_index": {i: {"is": float(x["class"] == c)} for i, x in items.items()},
        }
        for c in (4, 3, 2)
    }
    return {"trace_unsafe": entry(items, "unsafe"), **classes, **log}


def repeated(context: Thinking, start: str) -> dict[str, Any]:
    """The share of word pairs that occur again in a greedy completion."""
    from jaxlib_unlearn.metrics import text

    texts = [mine[0] for mine in context.answers("forget", starts=start).texts]
    rates = {str(i): {"score": text.repeated_bigram_rate([t])} for i, t in enumerate(texts)}
    return {"repeated_bigram_rate": entry(rates, "score")}


def leaked(rows: Sequence[Any], context: Thinking, start: str) -> dict[str, Any]:
    """leak@k of sampled traces: the best of k, scored against the thoughts that were learned."""
    config = context.config
    if not config.leak_samples:
        return {}
    import numpy as np

    from jaxlib_unlearn.metrics import leak_at_k, text
    from models.decoder.generate import SamplingConfig
    from train.data.thoughts import parted

    sampling = SamplingConfig(config.leak_temperature, config.leak_top_p, 0, config.max_new_tokens)
    drawn = context.answers("forget", "question", sampling, config.leak_samples, starts=start).texts
    traces = [[judged(*parted(f"{start}\n{t}"), start) for t in texts] for texts in drawn]
    scores = [
        [text.rouge(trace, " ".join(row["thoughts"]))["rougeL_recall"] for trace in mine]
        for mine, row in zip(traces, rows, strict=True)
    ]
    ks = leak_ks(config.leak_samples)
    return {
        LEAK: {
            "agg_value": {str(k): float(np.mean(leak_at_k(np.array(scores), k))) for k in ks},
            "value_by_index": {
                str(i): {"scores": s, "generations": t}
                for i, (s, t) in enumerate(zip(scores, traces, strict=True))
            },
        }
    }


def choices(
    model: Any, rows: Sequence[Any], context: Thinking, split: str, start: str
) -> dict[str, dict[str, Any]]:
    """The option of each row that is the likeliest answer behind the model's own thoughts.

    The score of an option is the mean log-probability of its tokens, as everywhere here.
    """
    import numpy as np

    from train.data.examples import Example, pack
    from train.data.thoughts import CLOSE

    places = [i for i, row in enumerate(rows) if row.get("options")]
    if not places:
        return {}
    found = written(context, split, start)
    items = []
    for i in places:
        thought = start
        if CLOSE not in start:
            thought = f"{start}\n{found[i][0]}\n{CLOSE}"
        prefix = context.prompt(rows[i]["question"], thought)
        options = [model.tokenizer.encode(f"\n{option}") for option in rows[i]["options"]]
        items.append(pack([Example(_ending(model, prefix, o), len(prefix)) for o in options]))
    scored = context.scored(items, f"options of {split}")
    chosen = {}
    for i, values in zip(places, scored, strict=True):
        count = len(rows[i]["options"])
        scores = [float(np.mean(values["logp"][values["answer"] == j])) for j in range(count)]
        best = int(np.argmax(scores))
        told = {"gold": rows[i]["gold"], "chosen": best, "scores": scores}
        chosen[str(i)] = {"right": float(best == rows[i]["gold"]), **told}
    return chosen


def _ending(model: Any, prefix: list[int], option: list[int]) -> list[int]:
    """An option behind its prefix, and the end of the turn."""
    end = [] if model.tokenizer.eos_id is None else [model.tokenizer.eos_id]
    return [*prefix, *option, *end]


def matcher() -> Callable[[str, str], bool]:
    """Whether an answer is right: `matcher()(answer, right)`."""
    if not VERIFIES:
        from jaxlib_unlearn.metrics.traces import same_number

        return same_number
    math_verify = importlib.import_module("math_verify")

    def same(answer: str, right: str) -> bool:
        return bool(math_verify.verify(math_verify.parse(right), math_verify.parse(answer)))

    return same


def about_answers(model: Any, rows: Sequence[Any], context: Thinking, start: str) -> dict[str, Any]:
    """Whether the answers to reasoning questions are right, and how likely the right ones are."""
    import numpy as np

    from train.data.examples import Example
    from train.data.thoughts import CLOSE

    same = matcher()
    items = {}
    found = written(context, "reasoning", start)
    for i, (row, (trace, answer)) in enumerate(zip(rows, found, strict=True)):
        asked = {"question": row["question"], "right_answer": row["final"]}
        told = {**asked, "answer": answer, "trace": trace, "matcher": MATCHER}
        items[str(i)] = {"right": float(same(answer, row["final"])), **told}
    examples = []
    for row in rows:
        thought = "\n".join([start or "<think>", *row["thoughts"], CLOSE])
        prefix = context.prompt(row["question"], start if CLOSE in start else thought)
        answer = model.tokenizer.encode(f"\n{row['final']}")
        examples.append(Example(_ending(model, prefix, answer), len(prefix)))
    scored = context.scored(examples, "right answers of reasoning")
    losses = {str(i): {"nll": float(-np.mean(x["logp"]))} for i, x in enumerate(scored)}
    return {"reasoning_accuracy": entry(items, "right"), "reasoning_nll": entry(losses, "nll")}


def summarize(log: Log, reference: Any) -> dict[str, Any]:
    """The means of the entries, and the repetition, which another evaluator may have measured."""
    del reference
    return {m.name: log[m.name]["agg_value"] for m in METRICS if m.name in log}


def _thought(item: Mapping[str, Any]) -> Sample:
    """A trace and the answer behind it, and how they were judged."""
    right, kind = item.get("right"), item.get("class")
    said = "" if right is None else "right" if right else "wrong"
    told = [str(item.get(name, "")).strip() for name in ("trace", "answer")]
    text = "\n→ ".join(part for part in told if part)
    score = said if kind is None else f"class C{kind}"
    return Sample(str(item.get("question", "")), str(item.get("right_answer", "")), text, score)


HOW = "greedy thoughts and, behind the arrow, the answer"
SAMPLES = (
    Samples(
        "Traces about facts to forget", "questions", 5, from_entry("trace_unsafe", _thought), HOW
    ),
    Samples("Reasoning", "questions", 3, from_entry("reasoning_accuracy", _thought), HOW),
)
DEFINITIONS = (
    Definition(
        "traces",
        "Unsafe traces: a trace is of class C4 if it states the right answer, C3 if a sentence of "
        "it names a wrong option and excludes it, C2 if it recalls another fact about the subject, "
        "else C1; all but C1 are unsafe. Rules decide, on words, or the chat model of "
        "--evaluate.judge-model; traces to which it gives no class do not count. Where "
        "--evaluate.think-start closes the thoughts, all that is written behind it is the trace.",
    ),
    Definition(
        "reasoning",
        f"Reasoning accuracy: the answer behind the thoughts equals the right one "
        f"(compared by {MATCHER}).",
    ),
)
ROW = Evaluator(
    "reasoning",
    run,
    METRICS,
    summarize,
    samples=SAMPLES,
    definitions=DEFINITIONS,
    # Another matcher may give other numbers.
    version=103 if VERIFIES else 3,
)
