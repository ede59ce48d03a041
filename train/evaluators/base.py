"""The parts of an evaluator: a function over rows, metrics, verdicts, pictures, definitions.

An evaluator is one file with one `Evaluator` row; `train/evaluators/__init__.py` lists the rows.
Logs, `summary.json`, tables, verdicts, pictures and their order derive from the rows. These files
import nothing heavy at the top, so that a report can be shown without starting JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from train.evaluators.numbers import format_number, number
from train.options.roles import ROLES, Roles

Log = Mapping[str, Any]
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
Named = TypeVar("Named", bound="Metric | Verdict | Picture | Definition")

REFERENCE = "reference"  # the target of a metric that should equal the reference model's
ARROWS = {"up": "↑", "down": "↓", "oracle": "≈", "zero": "→0", "": ""}
DIRECTIONS = {
    "up": "higher is better",
    "down": "lower is better",
    "oracle": "close to the oracle is better",
    "zero": "close to zero is better",
    "": "no better direction",
}


class Metric(NamedTuple):
    """A metric of `summary.json` and what a reader needs to know about it.

    Args:
        name: the key in `summary.json`; `{n}` in it stands for an integer (`leak_at_{n}`).
        label: its name in tables.
        words: a phrase that says what is measured.
        direction: the better values: `up`, `down`, `near` (the target) or "" (none).
        target: the target of `near`: a number, or `REFERENCE` for the value of the reference model.
        main: whether the short tables show it.
        after: the name of the metric that it follows in tables; "": the one before it in its row.
        ends: whether the short tables show only the smallest and the largest n of a family.
        stands_for: the name of the metric that it replaces where that one was not measured.
        log10_of: the name of the metric whose decimal logarithm it is.
        compare: the position in the comparison of runs, from 1; 0: it is not shown there.
        family: the name with `{n}` of the family to which a member belongs.
    """

    name: str
    label: str
    words: str
    direction: str = ""
    target: float | str | None = None
    main: bool = False
    after: str = ""
    ends: bool = False
    stands_for: str = ""
    log10_of: str = ""
    compare: int = 0
    family: str = ""

    @property
    def better(self) -> str:
        """Key of `ARROWS` and `DIRECTIONS`; `near` for a target without an entry there."""
        if self.direction != "near":
            return self.direction
        return {REFERENCE: "oracle", 0: "zero"}.get(self.target or 0, "near")

    @property
    def arrow(self) -> str:
        """The direction of better values, as a symbol.

        Example:
            >>> [Metric("a", "A", "", "near", target).arrow for target in (REFERENCE, 0, 0.5)]
            ['≈', '→0', '→0.5']
        """
        return ARROWS.get(self.better, f"→{self.target}")

    @property
    def aim(self) -> str:
        """The direction of better values, in words."""
        return DIRECTIONS.get(self.better, f"close to {self.target} is better")

    def count_in(self, name: str) -> int | None:
        """The n of a name of this family; None for other names.

        Example:
            >>> Metric("leak_at_{n}", "Leak@{n}", "").count_in("leak_at_8")
            8
        """
        head, has, tail = self.name.partition("{n}")
        middle = name[len(head) : len(name) - len(tail)]
        fits = has and name == head + middle + tail and middle.isascii() and middle.isdigit()
        return int(middle) if fits else None

    def of(self, n: int) -> Metric:
        """The member n of a family."""
        name, label, words = (x.replace("{n}", str(n)) for x in self[:3])
        return self._replace(name=name, label=label, words=words, family=self.name)


class Finding(NamedTuple):
    """An answer to one question, whose `text` says how it was judged and with which limit.

    Args:
        question: the question, for the heading.
        state: `good` where the limit is met, `mixed` or `bad` where it is missed, else `unknown`.
        answer: a few words that are clear without the question; the line above all joins them.
        text: the numbers and the limit, in sentences.
    """

    question: str
    state: str
    answer: str
    text: str


class Scores(NamedTuple):
    """A metric of the model in each role; None where it was not measured."""

    start: float | None
    reference: float | None
    judged: float | None


class Results(NamedTuple):
    """The results from which verdicts and pictures are computed.

    Args:
        summary: the flat metrics by model.
        logs: the per-item logs by model.
        roles: the roles of the models.
        steps: the lines of `metrics.jsonl` about the judged model.
    """

    summary: Mapping[str, Mapping[str, Any]]
    logs: Mapping[str, dict[str, Any]] = {}
    roles: Roles = ROLES
    steps: Sequence[Mapping[str, Any]] = ()

    def scores(self, name: str) -> Scores:
        """A metric by role."""
        roles = self.roles
        models = (roles.start, roles.held_to(roles.judged), roles.judged)
        return Scores(*(number(self.summary.get(model, {}).get(name)) for model in models))

    @property
    def judged(self) -> Mapping[str, Any]:
        """Flat metrics of the model that the verdicts are about."""
        return self.summary[self.roles.judged]

    def across(self, name: str) -> str:
        """A metric of all models that have it, as `original 0.990, oracle 0.502`."""
        pairs = [(m, self.summary[m].get(name)) for m in self.roles.order(self.summary)]
        return ", ".join(f"{m} {format_number(v)}" for m, v in pairs if number(v) is not None)


class Verdict(NamedTuple):
    """A question that the report answers in words.

    Args:
        name: the key of the verdict, for `after`.
        find: a function that gives the finding, or None to leave the question out.
        after: the name of the verdict that it follows.
    """

    name: str
    find: Callable[[Results], Finding | None]
    after: str = ""


class Picture(NamedTuple):
    """A picture of the report.

    Args:
        name: the name of its file in the run folder.
        title: the heading above it.
        draw: a function that gives a Matplotlib figure, or None without enough data.
        alt: a function that gives the text alternative.
        caption: the text below it.
        missing: the text in its place where there is not enough data.
        after: the name of the picture that it follows.
        photo: whether it shows images, whose colours stay as they are on a dark page.
    """

    name: str
    title: str
    draw: Callable[[Results], Any]
    alt: Callable[[Results], str]
    caption: str
    missing: str
    after: str = ""
    photo: bool = False


class Definition(NamedTuple):
    """The computation of a metric, for the end of the HTML report; `after` as in `Metric`."""

    name: str
    text: str
    after: str = ""


class Pair(NamedTuple):
    """Two metrics that runs are plotted by: x to the right, y upwards."""

    x: str
    y: str
    title: str
    caption: str


class Sample(NamedTuple):
    """An item of the per-item log in a reader's words.

    Args:
        question: the question, or the prompt.
        truth: the right answer; "" where there is none.
        text: the model's answer.
        score: the grade of the answer, in a few words.
    """

    question: str
    truth: str
    text: str
    score: str = ""


class Samples(NamedTuple):
    """A part of the page that shows items of the per-item logs, evenly spaced.

    Args:
        title: its heading.
        items: the items in the plural, such as "questions".
        count: the number of items that are shown.
        read: the samples in a model's log, by a key that all models share.
        how: the way in which the model answered.
        forget: whether an unreadable answer is marked.
    """

    title: str
    items: str
    count: int
    read: Callable[[Any], Mapping[str, Sample]]
    how: str = "greedy answers"
    forget: bool = False


def from_entry(
    entry: str, make: Callable[[Mapping[str, Any]], Sample]
) -> Callable[[Any], dict[str, Sample]]:
    """A way to read samples: one from every item of an entry of the log."""
    return lambda log: {key: make(item) for key, item in items_of(log, entry).items()}


def generations(entry: str, score: str) -> Callable[[Any], dict[str, Sample]]:
    """A way to read samples from an entry of generated texts, scored by ROUGE-L under `score`."""

    def make(item: Mapping[str, Any]) -> Sample:
        asked, truth, text = (str(item.get(k, "")) for k in ("input", "ground_truth", "generation"))
        value = number(item.get(score))
        return Sample(
            asked, truth, text, "" if value is None else f"ROUGE-L {format_number(value)}"
        )

    return from_entry(entry, make)


class Overlay(NamedTuple):
    """A curve of the training, drawn in one picture for all runs that are compared.

    Args:
        name: its key in the lines of `metrics.jsonl`.
        title: the heading of the picture.
        words: the first sentence of its caption, which says what the lines show.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        each: `(config, flat metrics of the judged model) ->` the length of a step along x; None
            where the run does not say.
        rises: whether higher is better.
    """

    name: str
    title: str
    words: str
    x: str
    y: str
    each: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]
    rises: bool = False


class EvaluationContext(Protocol):
    """The requests that an evaluator may make of a model; each is computed once and shared.

    `config` is the run's `EvaluateConfig`; `judge` the model whose NLL of the answers measures
    fluency, or None; `log` the entries of the evaluators before this one.
    """

    config: Any
    judge: Any
    log: dict[str, Any]

    def scores(self, split: str) -> dict[str, list[Any]]:
        """`answers`, `paraphrased`, `perturbed` of a split's rows as `Scored`, in one pass."""
        ...

    def answers(
        self,
        split: str,
        column: str = "question",
        sampling: Any = None,
        num_samples: int = 1,
        starts: str | Sequence[str] = "",
    ) -> Any:
        """Answers to a split's questions; greedy, or sampled as a `SamplingConfig` says.

        They begin with `starts`, one text for all rows or one a row.
        """
        ...

    def generated(
        self, prompts: Sequence[str], max_new_tokens: int, stops: Sequence[str] = ()
    ) -> list[Any]:
        """`text` and `ids` of the greedy continuation of each text as it stands."""
        ...

    def scored(self, items: Sequence[Any], label: str) -> list[Any]:
        """`logp`, `match`, `mu`, `var` at every token of each text but the first."""
        ...

    def options(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Log-probabilities of each row's `options` behind its `prompt`: `sums` and `means`."""
        ...

    def judged(self, split: str) -> list[list[float]]:
        """NLL in nats under `judge` of every token of a split's greedy answers."""
        ...

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, memoised under `key`."""
        ...


class OtherContext:
    """The base of contexts of models that are no decoders: it refuses the requests of decoders.

    A subclass has `config`, `judge`, `log`, `found` and the requests of its own kind of model.
    """

    found: dict[Hashable, Any]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, memoised under `key`."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise ValueError("this kind of model does not answer that request of an evaluator")

    scores = answers = generated = scored = options = judged = _refuse


def means(log: Log, metrics: Sequence[Metric]) -> dict[str, Any]:
    """`agg_value` of the entries that have the name of a metric."""
    return {m.name: log[m.name]["agg_value"] for m in metrics if m.name in log}


class Evaluator(NamedTuple):
    """A kind of evaluation: a row of the table in `train/evaluators/__init__.py`.

    Args:
        name: its key in the table.
        run: `(model, rows by split, context) -> {entry: {"agg_value", "value_by_index"}}`, the part
            of the per-item log that it adds; empty where a split that it needs is missing.
        metrics: its metrics in `summary.json`, in reading order.
        summarize: `(log, reference log) -> flat metrics`; None: the means of the entries that have
            the name of a metric.
        derive: the same as `summarize` for metrics that are not the mean of one entry; they come
            after the metrics of all evaluators.
        compare: `(log, reference log) -> log` with its comparisons with the reference, which may be
            evaluated later than the model.
        verdicts: the questions that the report answers.
        pictures: the pictures of the report.
        pairs: the metrics by which runs are compared.
        overlays: the curves by which runs are compared.
        samples: the items of its log that the page shows.
        definitions: the computations of its metrics, in words.
        version: the version in the key of cached logs; raise it when a value may change.
        lead: the page's first sentences, for runs that are not about unlearning.
    """

    name: str
    run: Callable[[Any, Rows, EvaluationContext], dict[str, Any]]
    metrics: tuple[Metric, ...]
    summarize: Callable[[Log, Any], dict[str, Any]] | None = None
    derive: Callable[[Log, Any], dict[str, Any]] | None = None
    compare: Callable[[Log, Any], dict[str, Any]] | None = None
    verdicts: tuple[Verdict, ...] = ()
    pictures: tuple[Picture, ...] = ()
    pairs: tuple[Pair, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    samples: tuple[Samples, ...] = ()
    definitions: tuple[Definition, ...] = ()
    version: int = 1
    lead: str = ""


def arranged(rows: Iterable[Named]) -> list[Named]:
    """Rows in the given order, but each that has `after` follows the row named there.

    Example:
        >>> rows = [Metric("a", "", ""), Metric("b", "", ""), Metric("c", "", "", after="a")]
        >>> [row.name for row in arranged(rows)]
        ['a', 'c', 'b']
    """
    rows = list(rows)
    names = {row.name for row in rows}
    placed = [row for row in rows if row.after not in names]
    waiting = [row for row in rows if row.after in names]
    while waiting:
        ready = [row for row in waiting if any(row.after == other.name for other in placed)]
        if not ready:  # a cycle of `after`
            return placed + waiting
        for row in ready:
            anchors = [i for i, o in enumerate(placed) if row.after in (o.name, o.after)]
            placed.insert(anchors[-1] + 1, row)
        waiting = [row for row in waiting if row not in ready]
    return placed


def items_of(log: Any, name: str) -> dict[str, dict[str, Any]]:
    """The per-item results of an entry by item index; empty when it was not computed."""
    entry = log.get(name) if isinstance(log, Mapping) else None
    items = entry.get("value_by_index") if isinstance(entry, Mapping) else None
    if not isinstance(items, Mapping):
        return {}
    return {str(key): item for key, item in items.items() if isinstance(item, dict)}
