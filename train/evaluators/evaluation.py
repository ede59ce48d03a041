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
from train.data.choice import encode_choices
from train.data.examples import (
    Example,
    Group,
    encode_group,
    encode_prompt,
    encode_qa,
    encode_text,
    num_positions,
)
from train.data.task import Task
from train.data.tofu import is_document
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
        """The learner that trains it."""
        return DecoderLearner(self.decoder)

    def identity(self) -> dict[str, Any]:
        """The inputs of its answers, as JSON values: weights, shapes, tokenizer, prompt format."""
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
    """The answers of a row to be scored, by kind; of a document its text."""
    if is_document(row):
        return {"answers": [row["text"]]}
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
    """`answers`, `paraphrased`, `perturbed` of each row as `Scored` (perturbed: lists of them).

    Of a document every token after the first is scored, as `answers`.
    """
    texts = [_answers(row) for row in rows]
    groups = [
        encode_text(model.tokenizer, row["text"], max_length)
        if is_document(row)
        else encode_group(
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
    starts: Sequence[str] | None = None,
) -> Answers:
    """Answers to the questions in `column`, greedy or sampled; random draws are keyed by row.

    They continue from `starts`, one a row, which are in the prompts and not in the answers.
    """
    starts = [""] * len(rows) if starts is None else starts
    prompts = [
        encode_prompt(model.tokenizer, row[column], system_prompt=system_prompt, start=start)
        for row, start in zip(rows, starts, strict=True)
    ]
    return continue_prompts(
        model, prompts, sampling, num_samples, seed, batch_size, mesh, label, model.tokenizer.eos_id
    )


def continue_prompts(
    model: Model,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    num_samples: int,
    seed: int | jax.Array,
    batch_size: int,
    mesh: Any,
    label: str,
    *stops: int | None,
) -> Answers:
    """The model's continuation of each prompt, which ends before a token of `stops`."""
    stop = tuple(token for token in stops if token is not None)
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


class Generated(NamedTuple):
    """The continuation of a text: as text, and the token ids that the model wrote."""

    text: str
    ids: list[int]

    @classmethod
    def of(cls, words: Tokenizer, ids: list[int], stops: Sequence[str]) -> Generated:
        """The continuation up to the first of `stops`."""
        text = words.decode(ids)
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        return cls(text[: min(ends, default=len(text))], ids)


class Options(NamedTuple):
    """Log-probabilities of a row's options in nats: `(n,)` sums over tokens, and `(n,)` means."""

    sums: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, logps: Sequence[np.ndarray]) -> Options:
        """Sums and means of the options' tokens."""
        parts = [one.astype(np.float64) for one in logps]
        return cls(np.array([one.sum() for one in parts]), np.array([one.mean() for one in parts]))


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
class ModelContext:
    """The context that the evaluators of one model share, which computes each result once.

    See `base.EvaluationContext`.
    """

    model: Model
    rows: Rows
    config: Any  # an `EvaluateConfig`, or options with its limits
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
        starts: str | Sequence[str] = "",
    ) -> Answers:
        """`answer_rows` of a split; greedy without `sampling`. `starts`: one for all, or each."""
        greedy = SamplingConfig(max_new_tokens=self.config.max_new_tokens)
        what = "answer" if sampling is None else "sample"
        each = [starts] * len(self.rows[split]) if isinstance(starts, str) else starts
        return self.once(
            ("answers", split, column, sampling, num_samples, tuple(each)),
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
                starts=each,
            ),
        )

    def generated(
        self, prompts: Sequence[str], max_new_tokens: int, stops: Sequence[str] = ()
    ) -> list[Generated]:
        """The greedy continuation of each text as it stands, without question or chat template.

        Args:
            prompts: texts; equal ones are continued once, also over several calls.
            max_new_tokens: the length limit of a continuation in tokens.
            stops: texts, before the first of which a continuation ends.
        """
        known = self.once(("generated", max_new_tokens, tuple(stops)), dict)
        words = self.model.tokenizer
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            found = continue_prompts(
                self.model,
                [encode_text(words, prompt, self.max_length).tokens for prompt in new],
                SamplingConfig(max_new_tokens=max_new_tokens),
                1,
                self.seed,
                self.config.generate_rows,
                self.mesh,
                f"{self.name}: continue texts",
                words.eos_id,
            )
            for prompt, (ids, *_) in zip(new, found.ids, strict=True):
                known[prompt] = Generated.of(words, ids, stops)
        return [known[prompt] for prompt in prompts]

    def options(self, rows: Sequence[Mapping[str, Any]]) -> list[Options]:
        """The log-probabilities of each row's `options` behind its `prompt`, plain texts.

        lm-eval-harness chooses by the sum, in which a longer option has more factors.
        """
        texts = tuple((row["prompt"], tuple(row["options"])) for row in rows)

        def make() -> list[Options]:
            asked = [{"gold": 0} | dict(row) for row in rows]
            found, _ = encode_choices(self.model.tokenizer, asked, self.max_length)
            scored = self.scored([choice.group for choice in found], "options")
            parts = [
                [values["logp"][values["answer"] == j] for j in range(choice.num_options)]
                for choice, values in zip(found, scored, strict=True)
            ]
            return [Options.of(own) for own in parts]

        return self.once(("options", texts), make)

    def prompt(self, question: str, start: str = "") -> list[int]:
        """The tokens of a question up to its answer, of which `start` is the beginning."""
        words = self.model.tokenizer
        return encode_prompt(words, question, system_prompt=self.system_prompt, start=start)

    def scored(
        self, items: Sequence[str | Example | Group], label: str
    ) -> list[dict[str, np.ndarray]]:
        """`score_items` of texts as they stand, or of examples that an evaluator makes."""
        tokens, what = self.config.score_tokens, f"{self.name}: {label}"
        words = self.model.tokenizer
        made = [
            encode_text(words, item, self.max_length) if isinstance(item, str) else item
            for item in items
        ]
        return self.once(
            ("scored", digest(made)), lambda: score_items(self.model, made, self.mesh, tokens, what)
        )

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
        task: the task, with its `evaluation` splits and its `evaluators`.
        config: the options of sampling and the batch sizes.
        system_prompt: the system prompt of the chat template.
        max_length: the longest example in tokens.
        mesh: the devices.
        seed: the seed of the sampled answers.
        name: the name in the progress bars.
        judge: the model that measures the NLL of the greedy forget answers; None: it is left out.

    Returns:
        {entry: {"agg_value": ..., "value_by_index": {"0": {...}}}}.

    Raises:
        ValueError: an evaluator is unknown, or writes an entry of another one.
    """
    if unknown := set(task.evaluators) - set(EVALUATORS):
        raise ValueError(f"unknown evaluators {sorted(unknown)}; known: {list(EVALUATORS)}")
    context = ModelContext(
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
    """A quick estimate: mean probability of the answers or texts of `limit` rows of each side."""
    max_length = longest(model, max_length)
    values = {}
    for split in (s for s in ("forget", "retain") if s in task.evaluation):
        rows = task.evaluation[split][:limit]
        items = [
            encode_text(model.tokenizer, r["text"], max_length)
            if is_document(r)
            else encode_qa(
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
