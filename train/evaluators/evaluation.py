"""Judging one model: one fused scoring pass, one greedy pass, sampled answers for leak@k.

Every scored text comes from `score` (vocabulary only at labels); the answers to one question share
its prompt. The result is a per-item log in the form of OpenUnlearning's EVAL.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn.metrics import leak_at_k, text, tofu
from jaxlib_unlearn.metrics.likelihood import Scored
from models import Tokenizer, arrays
from models.decoder import Decoder
from models.generate import SamplingConfig, generate
from models.policy import score
from train.config import EvaluateConfig
from train.data import authors
from train.data.batches import score_batches
from train.data.examples import Example, Group, encode_group, encode_prompt, encode_qa
from train.evaluators import readability
from train.runtime import distributed, residency
from train.runtime.sharding import batch_sharding, batch_ways, put_batch
from train.runtime.tracking import progress
from train.tasks.task import Row, Task

VERSION = 3  # part of every cache key: raise it when a number may change
QUANTITIES = ("logp", "match", "mu", "var")


class Model(NamedTuple):
    """A model as the programs hand it around."""

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    sha: str

    def parked(self) -> Model:
        """The model in host memory, where it waits until it is needed."""
        return self._replace(params=residency.parked(self.params))

    def at_hand(self) -> Model:
        """The model in device memory."""
        return self._replace(params=residency.at_hand(self.params))


def num_parameters(params: Any) -> int:
    """Elements of a parameter tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def longest(model: Model, max_length: int) -> int:
    """`max_length`, or the model's context where that is shorter."""
    return min(max_length, model.decoder.config.max_position_embeddings)


_score = jax.jit(score, static_argnums=0)


def score_items(
    model: Model, items: Sequence[Example | Group], mesh: Any, batch_tokens: int, label: str
) -> list[dict[str, np.ndarray]]:
    """Per item, `logp`, `match`, `mu`, `var` and `answer` of its labels, in item order."""
    found: list[dict[str, np.ndarray]] = [{} for _ in items]
    ways = batch_ways(mesh)
    pad = model.tokenizer.pad_id or 0
    with progress(label, len(items)) as advance:
        for batch in score_batches(items, batch_tokens=batch_tokens, row_multiple=ways, pad_id=pad):
            scored = _score(model.decoder, model.params, put_batch(batch, mesh))
            values = {name: arrays.host(scored[name]) for name in QUANTITIES}
            for b, row in enumerate(batch["row_id"]):
                if row >= 0:
                    real = batch["target_mask"][b] > 0
                    found[row] = {name: values[name][b][real] for name in QUANTITIES}
                    found[row]["answer"] = (
                        batch["answer"][b][real] if "answer" in batch else np.zeros(real.sum(), int)
                    )
                    found[row]["targets"] = batch["targets"][b][real]
            advance(int((batch["row_id"] >= 0).sum()))
            distributed.stop_point()
    return found


def _answers(row: Row) -> dict[str, list[str]]:
    """The texts of a row that are scored, by what they are."""
    found = {"answers": [row["answer"]]}
    if "paraphrased_answer" in row:
        found["paraphrased"] = [row["paraphrased_answer"]]
    if "perturbed_answer" in row:
        found["perturbed"] = list(row["perturbed_answer"])
    return found


def score_rows(
    model: Model,
    rows: Sequence[Row],
    system_prompt: str | None,
    max_length: int,
    mesh: Any,
    batch_tokens: int,
    label: str,
) -> dict[str, list[Any]]:
    """`answers`, `paraphrased`, `perturbed` of each row as `Scored` (perturbed: lists of them)."""
    texts = [_answers(row) for row in rows]
    groups = [
        encode_group(
            model.tokenizer,
            row["question"],
            [answer for kind in found.values() for answer in kind],
            system_prompt=system_prompt,
            max_length=max_length,
        )
        for row, found in zip(rows, texts, strict=True)
    ]
    result: dict[str, list[Any]] = {kind: [] for kind in texts[0]} if texts else {}
    for values, found in zip(
        score_items(model, groups, mesh, batch_tokens, label), texts, strict=True
    ):
        start = 0
        for kind, answers in found.items():
            scored = []
            for j in range(start, start + len(answers)):
                mine = values["answer"] == j
                words = model.tokenizer.decode(values["targets"][mine].tolist())
                scored.append(Scored(**{q: values[q][mine] for q in QUANTITIES}, text=words))
            start += len(answers)
            result[kind].append(scored if kind == "perturbed" else scored[0])
    return result


class Answers(NamedTuple):
    """Generated answers of a list of rows: `samples` texts each, their token ids, the prompts.

    Prompts are decoded without special tokens, as OpenUnlearning's logs have them.
    """

    texts: list[list[str]]
    ids: list[list[list[int]]]
    prompts: list[str] = []


def answer_rows(
    model: Model,
    rows: Sequence[Row],
    column: str,
    system_prompt: str | None,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int,
    batch_size: int,
    mesh: Any,
    label: str,
) -> Answers:
    """Answers to the questions in `column`, greedy or sampled; a draw belongs to its row."""
    prompts = [
        encode_prompt(model.tokenizer, row[column], system_prompt=system_prompt) for row in rows
    ]
    stop = () if model.tokenizer.eos_id is None else (model.tokenizer.eos_id,)
    with progress(label, len(prompts) * num_samples) as advance:

        def finished(count: int) -> None:
            advance(count)
            distributed.stop_point()

        ids = generate(
            model.decoder,
            model.params,
            prompts,
            sampling=sampling,
            stop_ids=stop,
            pad_id=model.tokenizer.pad_id or 0,
            seed=seed,
            num_samples=num_samples,
            batch_size=batch_size,
            sharding=batch_sharding(mesh),
            progress=finished,
        )
    return Answers(
        [[model.tokenizer.decode(one).strip() for one in mine] for mine in ids],
        ids,
        [model.tokenizer.decode(prompt) for prompt in prompts],
    )


def judge_nll(
    judge: Model,
    rows: Sequence[Row],
    answers: Answers,
    system_prompt: str | None,
    mesh: Any,
    batch_tokens: int,
) -> list[list[float]]:
    """NLL of every token of each row's first answer under `judge`: fluency as another sees it."""
    items = []
    for row, ids in zip(rows, answers.ids, strict=True):
        prompt = encode_prompt(judge.tokenizer, row["question"], system_prompt=system_prompt)
        eos = [] if judge.tokenizer.eos_id is None else [judge.tokenizer.eos_id]
        items.append(Example(prompt + (list(ids[0]) or eos), len(prompt)))
    scored = score_items(judge, items, mesh, batch_tokens, "fluency")
    return [(-values["logp"].astype(np.float64)).tolist() for values in scored]


def leak_ks(samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `samples`."""
    return tuple(2**i for i in range(samples.bit_length()) if 2**i <= samples)


def evaluate_model(
    model: Model,
    task: Task,
    config: EvaluateConfig,
    *,
    system_prompt: str | None,
    max_length: int,
    mesh: Any,
    seed: int,
    name: str,
    judge: Model | None = None,
) -> dict[str, Any]:
    """The per-item log of a model on every split of a task.

    Args:
        model: who is judged.
        task: its `evaluation` splits.
        config: sampling and batch sizes.
        system_prompt: of the chat template.
        max_length: longest example in tokens.
        mesh: where it runs.
        seed: of the sampled answers.
        name: shown in the progress.
        judge: model whose NLL of the greedy forget answers is measured; None: left out.

    Returns:
        A dict as `metrics.tofu.build_log` makes, with `leak_at_k`, `repeated_bigram_rate`,
        `forget_readability`, `forget_{config.judge}_nll` and, of rows whose facts are known,
        `forget_fact_recall` and `retain_fact_recall` added.
    """
    max_length = longest(model, max_length)
    greedy = SamplingConfig(max_new_tokens=config.max_new_tokens)
    splits: dict[str, tofu.SplitScores] = {}
    forget_answers: Answers | None = None
    added: dict[str, Any] = {}
    for split, rows in task.evaluation.items():
        scored = score_rows(
            model,
            rows,
            system_prompt,
            max_length,
            mesh,
            config.score_tokens,
            f"{name}: score {split}",
        )
        if split == "holdout":
            splits[split] = tofu.SplitScores(scored["answers"])
            continue
        answers = answer_rows(
            model,
            rows,
            "question",
            system_prompt,
            greedy,
            1,
            seed,
            config.generate_rows,
            mesh,
            f"{name}: answer {split}",
        )
        if split == "forget":
            forget_answers = answers
            added |= _readable(rows, answers, scored["answers"], model, config.max_new_tokens)
        if split in ("forget", "retain"):
            added |= _facts(split, rows, answers)
        splits[split] = tofu.SplitScores(
            scored["answers"],
            scored.get("paraphrased"),
            scored.get("perturbed"),
            [texts[0] for texts in answers.texts],
            [row["answer"] for row in rows],
            answers.prompts,
        )
    log = tofu.build_log(splits) | added
    if forget_answers is not None:
        log |= _fluency(task, forget_answers, judge, system_prompt, mesh, config)
        if config.leak_samples:
            log |= _leak(model, task, config, system_prompt, mesh, seed, name)
    return log


def _readable(
    rows: Sequence[Row], answers: Answers, truths: Sequence[Scored], model: Model, limit: int
) -> dict[str, Any]:
    # A model without an end-of-text token is never done; its answers are not held for cut.
    ends = model.tokenizer.eos_id is not None
    entry = readability.log_entry(
        [texts[0] for texts in answers.texts],
        [row["answer"] for row in rows],
        [ends and len(ids[0]) >= limit for ids in answers.ids],
        [len(truth.logp) - 1 > limit for truth in truths],  # all but the end of the text
    )
    return {readability.ENTRY: entry}


def _facts(split: str, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    """Which values of its fact each answer holds; only generated rows say what their fact is."""
    items = {}
    for i, (row, texts) in enumerate(zip(rows, answers.texts, strict=True)):
        if values := authors.values_in(row["answer"]):
            items[str(i)] = {"score": text.fact_recall(texts[0], values), "values": list(values)}
    if not items:
        return {}
    mean = float(np.mean([item["score"] for item in items.values()]))
    return {f"{split}_fact_recall": {"agg_value": mean, "value_by_index": items}}


def _fluency(
    task: Task,
    answers: Answers,
    judge: Model | None,
    system_prompt: Any,
    mesh: Any,
    config: EvaluateConfig,
):
    rates = [text.repeated_bigram_rate([texts[0]]) for texts in answers.texts]
    log: dict[str, Any] = {
        "repeated_bigram_rate": {
            "agg_value": float(np.mean(rates)),
            "value_by_index": {str(i): {"score": float(r)} for i, r in enumerate(rates)},
        }
    }
    if judge is not None:
        losses = judge_nll(
            judge, task.evaluation["forget"], answers, system_prompt, mesh, config.score_tokens
        )
        log[f"forget_{config.judge}_nll"] = {
            "agg_value": float(np.mean([x for item in losses for x in item])),
            "value_by_index": {
                str(i): {"avg_loss": float(np.mean(item)), "tokens": len(item)}
                for i, item in enumerate(losses)
            },
        }
    return log


def _leak(
    model: Model,
    task: Task,
    config: EvaluateConfig,
    system_prompt: Any,
    mesh: Any,
    seed: int,
    name: str,
):
    sampling = SamplingConfig(config.leak_temperature, config.leak_top_p, 0, config.max_new_tokens)
    rows = task.evaluation["forget"]
    answers = answer_rows(
        model,
        rows,
        config.leak_question,
        system_prompt,
        sampling,
        config.leak_samples,
        seed,
        config.generate_rows,
        mesh,
        f"{name}: sample forget",
    )
    scores = [
        [text.rouge(answer, row["answer"])["rougeL_recall"] for answer in texts]
        for texts, row in zip(answers.texts, rows, strict=True)
    ]
    ks = leak_ks(config.leak_samples)
    return {
        "leak_at_k": {
            "agg_value": {str(k): float(np.mean(leak_at_k(np.array(scores), k))) for k in ks},
            "value_by_index": {
                str(i): {"scores": s, "generations": texts}
                for i, (s, texts) in enumerate(zip(scores, answers.texts, strict=True))
            },
        }
    }


def summarize(log: Mapping[str, Any], retain_log: Any, model: Model) -> dict[str, Any]:
    """The flat metrics of a log with leak@k and fluency, and the parameters' number and sha256.

    `retain_log` is the oracle's, or one in its place.
    """
    flat: dict[str, Any] = dict(tofu.summarize(log, retain_log))
    facts = [f"{split}_fact_recall" for split in ("forget", "retain")]
    for name in (*facts, "repeated_bigram_rate", "forget_oracle_nll", "forget_base_nll"):
        if name in log:
            flat[name] = log[name]["agg_value"]
    flat |= readability.summarize(log, retain_log)
    for k, value in log.get("leak_at_k", {"agg_value": {}})["agg_value"].items():
        flat[f"leak_at_{k}"] = value
    flat["num_parameters"] = num_parameters(model.params)
    flat["params_sha256"] = model.sha
    return flat


def curve(
    model: Model,
    task: Task,
    system_prompt: str | None,
    max_length: int,
    mesh: Any,
    batch_tokens: int,
    limit: int,
) -> dict[str, float]:
    """A quick look: mean answer probability on the first `limit` rows of forget and of retain."""
    max_length = longest(model, max_length)
    values = {}
    for split in ("forget", "retain"):
        rows = task.evaluation[split][:limit]
        items = [
            encode_qa(
                model.tokenizer,
                r["question"],
                r["answer"],
                system_prompt=system_prompt,
                max_length=max_length,
            )
            for r in rows
        ]
        scored = score_items(model, items, mesh, batch_tokens, f"curve {split}")
        values[f"{split}_probability"] = float(
            np.mean([np.exp(np.mean(s["logp"])) for s in scored])
        )
    return values
