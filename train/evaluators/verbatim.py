"""Verbatim recall: how much of a text a model writes by itself after the text's beginning."""

from __future__ import annotations

from typing import Any

from train.evaluators.base import (
    REFERENCE,
    Definition,
    EvaluationContext,
    Evaluator,
    Finding,
    Metric,
    Pair,
    Picture,
    Results,
    Rows,
    Samples,
    Verdict,
    generations,
)
from train.evaluators.kept import kept as kept_by

SPLITS = ("forget", "retain")
NEAR = 0.1
METRICS = (
    Metric("forget_verbatim", "Forget verbatim recall",
           "ROUGE-L F1 of how it continues the start of a text against the text, documents to "
           "forget", "near", REFERENCE, main=True, compare=1),
    Metric("retain_verbatim", "Retain verbatim recall",
           "the same of documents to keep", "up", main=True, compare=4),
)  # fmt: skip


def run(model: Any, rows: Rows, context: EvaluationContext) -> dict[str, Any]:
    """The greedy continuation of each row's `prompt` against its `continuation`.

    Both are cut to `--evaluate.max-new-tokens`, and what is written to as many tokens as the truth.
    """
    import numpy as np

    from jaxlib_unlearn.metrics import text

    words, limit = model.tokenizer, context.config.max_new_tokens
    log = {}
    for split in (name for name in SPLITS if name in rows):
        truths = [words.encode(row["continuation"])[:limit] for row in rows[split]]
        longest = max(map(len, truths))
        found = context.generated([row["prompt"] for row in rows[split]], longest)
        items = {}
        for i, (row, truth, written) in enumerate(zip(rows[split], truths, found, strict=True)):
            right, answer = words.decode(truth), words.decode(written.ids[: len(truth)])
            score = text.rouge(answer, right, use_stemmer=False)["rougeL_f1"]
            items[str(i)] = {"rougeL_f1": score, "input": row["prompt"]}
            items[str(i)] |= {"ground_truth": right, "generation": answer}
        mean = float(np.mean([item["rougeL_f1"] for item in items.values()]))
        log[f"{split}_verbatim"] = {"agg_value": mean, "value_by_index": items}
    return log


def forgot(results: Results) -> Finding:
    """Verbatim recall of the documents to forget, compared with the reference's."""
    question, s = "Did it forget?", results.scores("forget_verbatim")
    if s.judged is None:
        return Finding(question, "unknown", "not measured", "No verbatim recall in this run.")
    text = f"Verbatim recall of the documents to forget: {results.across('forget_verbatim')}."
    if s.start is not None and s.start < 0.5:
        text += " The original did not know them well to begin with, so this says little."
        return Finding(question, "mixed", "hardly known before", text)
    if s.reference is None:
        return Finding(question, "unknown", "no oracle", text)
    text += f" The limit is {NEAR} from the oracle, which never saw them."
    if abs(s.judged - s.reference) <= NEAR:
        return Finding(question, "good", "forgotten", text)
    if s.judged < s.reference:
        return Finding(question, "mixed", "recalls less than the oracle", text)
    half = s.start is not None and s.judged <= (s.start + s.reference) / 2
    level = ("mixed", "partly forgotten") if half else ("bad", "not forgotten")
    return Finding(question, *level, text)


def kept(results: Results) -> Finding:
    """Verbatim recall of the documents to keep."""
    return kept_by(results, [("retain_verbatim", "verbatim recall")], "the documents to keep")


def draw(results: Results) -> Any:
    """Bar chart of the recall of documents to forget and to keep."""
    from train.evaluators import plots

    return plots.shares(
        results.summary,
        "verbatim",
        "documents",
        "recall of a text from its start, %",
        results.roles,
    )


PICTURE = Picture(
    "verbatim.png",
    "Verbatim recall",
    draw,
    lambda results: (
        f"Bars, a pair per model. Documents to forget: {results.across('forget_verbatim')}; "
        f"documents to keep: {results.across('retain_verbatim')}."
    ),
    "How much of the second half of a text a model writes after the first. The oracle, which never "
    "saw the documents to forget, gets the words right that such texts share.",
    "No verbatim recall in this run.",
)
SAMPLES = tuple(
    Samples(
        f"Documents to {verb}", "starts", n, generations(entry, "rougeL_f1"), forget=n == 5,
        how="greedy continuations",
    )
    for verb, n, entry in (("forget", 5, "forget_verbatim"), ("keep", 3, "retain_verbatim"))
)  # fmt: skip
ROW = Evaluator(
    "verbatim",
    run,
    METRICS,
    verdicts=(Verdict("forgot", forgot), Verdict("kept", kept)),
    pictures=(PICTURE,),
    pairs=(
        Pair(
            "forget_verbatim",
            "retain_verbatim",
            "Forget against retain, documents",
            "Runs to the left recall less of the documents to forget, runs further up more of "
            "those to keep. The oracle shows how far to the left is far enough.",
        ),
    ),
    samples=SAMPLES,
    definitions=(
        Definition(
            "verbatim",
            "Verbatim recall: ROUGE-L F1 (without stemming) of the greedy continuation of a text's "
            "first half against its second, cut to as many tokens; mean over texts (VerbMem of "
            "MUSE, arXiv 2407.06460).",
        ),
    ),
)
