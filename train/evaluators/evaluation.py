"""Evaluating one model: its scores and answers, each computed once, and the resulting log.

Texts are scored by `score`, which computes logits only at labels; the answers to one question share
its prompt. The result is a per-item log in the format of OpenUnlearning's EVAL.json.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_unlearn.metrics.likelihood import Scored
from models import Tokenizer, arrays
from models.bounds import check_positions
from models.decoder.generate import SamplingConfig, generate
from models.decoder.labels import score
from models.decoder.learner import DecoderLearner
from models.decoder.model import Decoder
from train.data.batches import score_batches
from train.data.examples import (
    Example,
    Group,
    encode_group,
    encode_prompt,
    encode_qa,
    num_positions,
)
from train.data.task import Task
from train.evaluators import EVALUATORS, chosen, trace_judge
from train.evaluators.base import Rows, means
from train.options.config import EvaluateConfig, to_json
from train.runtime import distributed, residency
from train.runtime.sharding import batch_sharding, batch_ways, put_batch
from train.runtime.stages import digest
from train.runtime.tracking import progress

# Part of every cache key, beside the evaluators' versions: raise it when a value may change.
VERSION = 3
QUANTITIES = ("logp", "match", "mu", "var")


class Model(NamedTuple):
    """A decoder with its parameters, tokenizer and the sha256 of the parameters."""

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    sha: str

    @property
    def learner(self) -> DecoderLearner:
        """How it is trained."""
        return DecoderLearner(self.decoder)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as JSON values: weights, shapes, tokenizer, prompt format."""
        words = self.tokenizer
        return {
            "params": self.sha,
            "model": to_json(self.decoder.config),
            "tokenizer": digest([words.backend.to_str(), words.chat_template, words.eos_id]),
            "format": words.format,
        }

    def to_host(self) -> Model:
        """The model with its parameters in host memory."""
        return self._replace(params=residency.to_host(self.params))

    def to_device(self) -> Model:
        """The model with its parameters in device memory."""
        return self._replace(params=residency.to_device(self.params))


def num_parameters(params: Any) -> int:
    """Number of elements of a parameter tree."""
    return sum(x.size for x in jax.tree.leaves(params))


def longest(model: Model, max_length: int) -> int:
    """`max_length` in tokens, or the model's context where that is shorter.

    Raises:
        UserError: it is more than the positions that the model has learned.
    """
    check_positions(model.decoder.config.learned_positions, max_length, "max-length")
    return min(max_length, model.decoder.config.max_position_embeddings)


_score = jax.jit(score, static_argnums=0)


def score_items(
    model: Model,
    items: Sequence[Example | Group],
    mesh: Any,
    batch_tokens: int,
    label: str,
    label_multiple: int = 16,
) -> list[dict[str, np.ndarray]]:
    """`logp`, `match`, `mu`, `var`, `answer` and `targets` at the labels of each item, in order."""
    learned = model.decoder.config.learned_positions
    for i, item in enumerate(items):
        check_positions(learned, num_positions(item), f"{label}, row {i}")
    found: list[dict[str, np.ndarray]] = [{} for _ in items]
    ways = batch_ways(mesh)
    pad = model.tokenizer.pad_id or 0
    with progress(label, len(items)) as advance:
        for batch in score_batches(
            items,
            batch_tokens=batch_tokens,
            row_multiple=ways,
            label_multiple=label_multiple,
            pad_id=pad,
        ):
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


def _answers(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The answers of a row to be scored, by kind."""
    found = {"answers": [row["answer"]]}
    if "paraphrased_answer" in row:
        found["paraphrased"] = [row["paraphrased_answer"]]
    if "perturbed_answer" in row:
        found["perturbed"] = list(row["perturbed_answer"])
    return found


def score_rows(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
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
    """Generated answers to a list of rows: texts and token ids by row and sample, and the prompts.

    Prompts are decoded without special tokens, as in OpenUnlearning's logs.
    """

    texts: list[list[str]]
    ids: list[list[list[int]]]
    prompts: list[str] = []


def answer_rows(
    model: Model,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    system_prompt: str | None,
    sampling: SamplingConfig,
    num_samples: int,
    seed: int | jax.Array,
    batch_size: int,
    mesh: Any,
    label: str,
    start: str = "",
) -> Answers:
    """Answers to the questions in `column`, greedy or sampled; random draws are keyed by row.

    They continue from `start`, which is in the prompts and not in the answers.
    """
    prompts = [
        encode_prompt(model.tokenizer, row[column], system_prompt=system_prompt, start=start)
        for row in rows
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
    rows: Sequence[Mapping[str, Any]],
    answers: Answers,
    system_prompt: str | None,
    mesh: Any,
    batch_tokens: int,
) -> list[list[float]]:
    """NLL in nats, under `judge`, of every token of each row's first answer: a fluency measure."""
    items = []
    for row, ids in zip(rows, answers.ids, strict=True):
        prompt = encode_prompt(judge.tokenizer, row["question"], system_prompt=system_prompt)
        eos = [] if judge.tokenizer.eos_id is None else [judge.tokenizer.eos_id]
        items.append(Example(prompt + (list(ids[0]) or eos), len(prompt)))
    scored = score_items(judge, items, mesh, batch_tokens, "fluency")
    return [(-values["logp"].astype(np.float64)).tolist() for values in scored]


@dataclass
class Context:
    """What the evaluators of one model share, each result computed once; see `base.Context`."""

    model: Model
    rows: Rows
    config: Any  # an `EvaluateConfig`, or what has its limits
    system_prompt: str | None
    max_length: int
    mesh: Any
    seed: int
    name: str
    judge: Model | None = None
    log: dict[str, Any] = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, memoised under `key`."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    def scores(self, split: str) -> dict[str, list[Any]]:
        """`score_rows` of a split: one pass over all of its answers."""
        return self.once(
            ("scores", split),
            lambda: score_rows(
                self.model,
                self.rows[split],
                self.system_prompt,
                self.max_length,
                self.mesh,
                self.config.score_tokens,
                f"{self.name}: score {split}",
            ),
        )

    def answers(
        self,
        split: str,
        column: str = "question",
        sampling: SamplingConfig | None = None,
        num_samples: int = 1,
        start: str = "",
    ) -> Answers:
        """`answer_rows` of a split; greedy without `sampling`."""
        greedy = SamplingConfig(max_new_tokens=self.config.max_new_tokens)
        what = "answer" if sampling is None else "sample"
        return self.once(
            ("answers", split, column, sampling, num_samples, start),
            lambda: answer_rows(
                self.model,
                self.rows[split],
                column,
                self.system_prompt,
                sampling or greedy,
                num_samples,
                self.seed,
                self.config.generate_rows,
                self.mesh,
                f"{self.name}: {what} {split}",
                start=start,
            ),
        )

    def prompt(self, question: str, start: str = "") -> list[int]:
        """The tokens of a question up to its answer, of which `start` is the beginning."""
        words = self.model.tokenizer
        return encode_prompt(words, question, system_prompt=self.system_prompt, start=start)

    def scored(self, items: Sequence[Example | Group], label: str) -> list[dict[str, np.ndarray]]:
        """`score_items` of examples that an evaluator makes."""
        tokens, what = self.config.score_tokens, f"{self.name}: {label}"
        return score_items(self.model, items, self.mesh, tokens, what)

    def classes(self, rows: Sequence[tuple[str, str, str]]) -> list[int | None]:
        """`trace_judge.classes` of questions, right answers and traces."""
        folder, size = self.config.judge_model, self.config.generate_rows
        if folder is None:
            raise ValueError("no judge model in this evaluation")
        with progress(f"{self.name}: classes of traces", len(rows)) as advance:
            return trace_judge.classes(folder, rows, size, advance)

    def judged(self, split: str) -> list[list[float]]:
        """`judge_nll` of a split's greedy answers."""
        if self.judge is None:
            raise ValueError("no judge in this evaluation")
        judge, answers = self.judge, self.answers(split)
        return self.once(
            ("judged", split),
            lambda: judge_nll(
                judge,
                self.rows[split],
                answers,
                self.system_prompt,
                self.mesh,
                self.config.score_tokens,
            ),
        )


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
    """The per-item log of a model: the entries of the task's evaluators, in table order.

    Args:
        model: the model to evaluate.
        task: its `evaluation` splits and its `evaluators`.
        config: sampling and batch sizes.
        system_prompt: of the chat template.
        max_length: longest example in tokens.
        mesh: devices to run on.
        seed: of the sampled answers.
        name: shown in the progress bars.
        judge: model whose NLL of the greedy forget answers is measured; None: left out.

    Returns:
        {entry: {"agg_value": ..., "value_by_index": {"0": {...}}}}.

    Raises:
        ValueError: an unknown evaluator, or one that writes an entry of another.
    """
    if unknown := set(task.evaluators) - set(EVALUATORS):
        raise ValueError(f"unknown evaluators {sorted(unknown)}; known: {list(EVALUATORS)}")
    context = Context(
        model,
        task.evaluation,
        config,
        system_prompt,
        longest(model, max_length),
        mesh,
        seed,
        name,
        judge,
    )
    for row in chosen(task.evaluators):
        added = row.run(model, task.evaluation, context)
        if twice := set(added) & set(context.log):
            raise ValueError(f"evaluator {row.name} writes {sorted(twice)}, which is there already")
        context.log |= added
    return context.log


def summarize(log: Mapping[str, Any], retain_log: Any, model: Model) -> dict[str, Any]:
    """The flat metrics of a log, and the number and sha256 of the model's parameters.

    `retain_log` is the log of the reference model, or of one in its place. Every evaluator reads
    the entries that it finds: what was not measured is absent.
    """
    flat: dict[str, Any] = {}
    shared = set()
    for row in EVALUATORS.values():
        if row.summarize is None:
            flat |= means(log, row.metrics)
        elif row.summarize not in shared:  # several rows may share a function
            shared.add(row.summarize)
            flat |= row.summarize(log, retain_log)
    for row in EVALUATORS.values():
        flat |= {} if row.derive is None else row.derive(log, retain_log)
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
    """A quick estimate: mean answer probability on the first `limit` forget and retain rows."""
    max_length = longest(model, max_length)
    values = {}
    for split in (s for s in ("forget", "retain") if s in task.evaluation):
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
