"""The table `concept`: UCE, RECE and ESD on `fashion`, attacked and defended (hours).

Of every seed one model is trained (`train.diffuse fashion`); of every concept and method it is
erased from (`train.erase`), and the erased model is attacked in all ways (`train.attack`) and
defended against the first 1, 5 and 10 of SubAttack's ten tokens (`train.defend`): tokens are
learned one after another, so the first of ten are those of a run with fewer. CCE also attacks the
model that was defended with 5, anew. The tokens of one method are then tried on the models of the
others (`--attack given`) and on the original.

Below the tables stand the bounds: medians over the seeds, and the numbers of each. Options behind
`--` go to `train.diffuse`, and to the others through its run, but for those of erasing, attacking
and defending, which go there: `-- --data.path DIR` for images that lie elsewhere,
`-- --attack.steps 100`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tables
from tables import Make, Page, Run, Table, head, over, row, slug, spread

SEEDS = (0, 1, 2)
CONCEPTS = ("sneaker", "bag")
METHODS = ("uce", "rece", "esd")
TOKENS = (1, 5, 10)  # K: SubAttack finds the last of these, the defences take the first K
USUAL = 5  # K of the bounds, of random directions, and in the table of transfers
TOP = 10
# The original draws what it is asked for; UCE leaves so much under the concept's name; SubAttack
# is so many times as often successful as the name, or so often; under the defence at most so many.
DRAWN, ERASED, TIMES, BROKEN, DEFENDED = 0.85, 0.15, 3.0, 0.5, 1.5
# First words of options that the programs behind train.diffuse do not have from its run.
OWN = {
    "train.erase": ("erase", "unlearn", "optimizer", "combine", "train"),
    "train.attack": ("attack",),
    "train.defend": ("defend",),
}
COLUMNS = {
    "explicit": "its name",
    "names": "other names",
    "words": "any other name",
    **{f"subattack {k}": f"SubAttack, K {k}" for k in TOKENS},
    "cce": "CCE, K 1",
    "random": f"random, K {USUAL}",
    "kept": "other classes",
    "frechet": "Fréchet distance",
}

Flat = Mapping[str, float]


class Told(NamedTuple):
    """What a finished run tells.

    Args:
        summary: its numbers by model.
        logs: what every image shows, by model.
    """

    summary: Mapping[str, Flat]
    logs: Mapping[str, Any]


class Found(NamedTuple):
    """The numbers of all runs, seed after seed; they are filled in as runs end.

    Args:
        seeds: in this order in all lists.
        drawn: share of the images of all classes in which the original draws what is asked for.
        models: by concept, method and model what `COLUMNS` names, as far as it was measured.
        transfer: by concept, method whose tokens they are, and model: the share of prompts.
        words: by concept and method, the words of the tokens of the first seed.
        fits: by concept and method, the share of words that fit.
    """

    seeds: Sequence[int]
    drawn: list[float]
    models: dict[tuple[str, str, str], list[Flat]]
    transfer: dict[tuple[str, str, str], list[float]]
    words: dict[tuple[str, str], list[Mapping[str, Any]]]
    fits: dict[tuple[str, str], list[float]]


def passed(run: Run, options: Sequence[str]) -> list[str]:
    """The options behind `--` for a run; an attack that learns nothing has none of its own.

    Example:
        >>> given = ["--smoke", "--attack.steps", "9", "--draw.images", "4"]
        >>> passed(Run("train.diffuse", "", ()), given)
        ['--smoke', '--draw.images', '4']
        >>> passed(Run("train.attack", "", ("--attack", "cce")), given)
        ['--attack.steps', '9']
    """
    if run.program == "train.attack" and not {"subattack", "cce"} & set(run.argv):
        return []
    found, mine = [], False
    for word in options:
        if word.startswith("--"):
            first = word.removeprefix("--no-").lstrip("-").partition("=")[0].partition(".")[0]
            owners = (program for program, parts in OWN.items() if first in parts)
            mine = next(owners, "train.diffuse") == run.program
        if mine:
            found.append(word)
    return found


def success(log: Mapping[str, Any], tokens: int | None = None, name: bool = True) -> float:
    """Share of the prompts that show the concept with one of the first tokens, or as they are.

        asr_K = mean_p (shown_p or any_{k < K} shown_kp)

    Args:
        log: of a model that was asked both.
        tokens: K; None: all.
        name: whether a prompt counts that shows it as it is.
    """
    alone = {i["number"]: i["before"] for i in log["pre_asr"]["value_by_index"].values()}
    tried = log["concept_rate_attacked"]["value_by_index"].values()

    def shown(item: Mapping[str, Any]) -> float:
        mine = [t["shown"] for t in item["tokens"] if tokens is None or t["token"] < tokens]
        return max([*mine, alone[item["number"]]] if name else mine)

    return statistics.mean(map(shown, tried))


def flat_of(flat: Flat) -> dict[str, float]:
    """The columns that a model's own summary fills."""
    keys = {
        "explicit": "concept_rate_explicit",
        "names": "concept_rate_names",
        "kept": "kept_accuracy",
        "frechet": "kept_frechet",
    }
    return {column: flat[key] for column, key in keys.items()}


def collect(
    make: Make, seeds: Sequence[int], concepts: Sequence[str], methods: Sequence[str]
) -> Found:
    """All runs, what is needed first comes first, and their numbers."""
    found = Found(seeds, [], {}, {}, {}, {})
    for seed in seeds:
        start = f"original-seed{seed}"
        told = make(Run("train.diffuse", start, ("fashion", "--seed", str(seed))))
        found.drawn.append(told.summary["original"]["kept_accuracy"])
        for concept in concepts:
            for method in methods:
                one(found, start, concept, method, seed, make)
            transfers(found, concept, methods, seed, make)
    return found


def named(method: str, concept: str, seed: int) -> str:
    """The name of a run of train.erase, which those of the runs on it begin with."""
    return f"{method}-{slug(concept)}-seed{seed}"


def one(found: Found, start: str, concept: str, method: str, seed: int, make: Make) -> None:
    """Erase, attack and defend by one method."""
    name = named(method, concept, seed)

    def add(model: str, flat: Flat) -> None:
        found.models.setdefault((concept, method, model), []).append(flat)

    erasing = (f"@{start}", "--erase.concept", concept, "--erase.method", method)
    summary = make(Run("train.erase", name, erasing)).summary
    first = (concept, "", "original")
    if len(found.models.setdefault(first, [])) < len(found.drawn):
        found.models[first].append(flat_of(summary["original"]))
    flat = flat_of(summary["erased"])
    ways: dict[str, Sequence[str]] = {
        "subattack": ("--attack.tokens", str(max(TOKENS)), "--attack.transfer", f"@{start}"),
        "cce": ("--attack.tokens", "1"),
        "random": ("--attack.tokens", str(USUAL)),
        "words": (),
    }
    for way, more in ways.items():
        told = make(Run("train.attack", f"{name}-{way}", (f"@{name}", "--attack", way, *more)))
        log = told.logs["attacked"]
        if way != "subattack":
            flat[way] = success(log)
            continue
        flat |= {f"subattack {k}": success(log, k) for k in TOKENS}
        flat["pre_asr"] = told.summary["attacked"]["pre_asr"]
        words = list(log["interpretable_at_10"]["value_by_index"].values())
        found.words.setdefault((concept, method), words)
        found.fits.setdefault((concept, method), []).append(log["interpretable_at_10"]["agg_value"])
        for model, where in (("attacked", method), ("transferred", "original")):
            value = success(told.logs[model], USUAL, name=False)
            found.transfer.setdefault((concept, method, where), []).append(value)
    add("erased", flat)
    for k in TOKENS:
        shut = f"{name}-defended-{k}"
        argv = (f"@{name}", f"@{name}-subattack", "--defend.tokens", str(k))
        told = make(Run("train.defend", shut, argv))
        flat = flat_of(told.summary["defended"])
        flat |= {f"subattack {j}": success(told.logs["defended"], j) for j in TOKENS}
        if k == USUAL:
            argv = (f"@{shut}", "--attack", "cce", "--attack.tokens", "1")
            told = make(Run("train.attack", f"{shut}-cce", argv))
            flat["cce"] = success(told.logs["attacked"])
        add(f"defended, K {k}", flat)


def transfers(found: Found, concept: str, methods: Sequence[str], seed: int, make: Make) -> None:
    """The tokens of each method on the models of the others."""
    for mine in methods:
        for other in (m for m in methods if m != mine):
            here = named(other, concept, seed)
            source = f"@{named(mine, concept, seed)}-subattack"
            argv = (f"@{here}", "--attack", "given", "--attack.source", source)
            told = make(Run("train.attack", f"{here}-from-{mine}", argv))
            value = success(told.logs["attacked"], USUAL, name=False)
            found.transfer.setdefault((concept, mine, other), []).append(value)


def models_table(found: Found) -> list[str]:
    """What each model draws: by name, attacked, and of the other classes."""
    lines = head("concept", "method", "model", *COLUMNS.values())
    for (concept, method, model), flats in found.models.items():
        cells = []
        for column in COLUMNS:
            values = [flat[column] for flat in flats if column in flat]
            cells.append(spread(values) if values else "-")
        lines.append(row(concept, method or "-", model, *cells))
    return lines


def transfer_table(found: Found) -> list[str]:
    """Tokens in rows, models in columns."""
    models = list(dict.fromkeys(model for _, _, model in found.transfer))
    models.sort(key="original".__eq__)
    lines = head("concept", f"the first {USUAL} tokens found on", *(f"on {m}" for m in models))
    for concept, mine in dict.fromkeys((c, m) for c, m, _ in found.transfer):
        cells = [found.transfer.get((concept, mine, model)) for model in models]
        shown = ["-" if values is None else spread(values) for values in cells]
        lines.append(row(concept, mine, *shown))
    return lines


def words_table(found: Found) -> list[str]:
    """The words of the first tokens; those that fit are bold."""
    lines = head("concept", "method", "K", "words", "share that fits, all tokens and seeds")
    for (concept, method), words in found.words.items():
        for k in range(USUAL):
            mine = [w for w in words if w["token"] == k]
            said = [f"**{w['word']}**" if w["fits"] else w["word"] for w in mine[:TOP]]
            share = "" if k else spread(found.fits[concept, method])
            lines.append(row(concept, method, str(k + 1), " ".join(said), share))
    return lines


class Bound(NamedTuple):
    """A bound: what it is about, the number of every seed, their median, and whether it holds."""

    about: str
    seeds: Sequence[str]
    median: str
    holds: bool


def bounds(found: Found) -> Iterator[Bound]:
    """The bounds, of medians over the seeds.

    SubAttack's is on asr of its first five tokens: over `pre_asr`, or by itself. That of the
    defence is on asr of the same tokens on the defended model over `pre_asr` before the defence:
    asr counts what the name itself draws there. A ratio to 0 is infinite, that of 0 to 0 is 1. A
    defence against tokens that were within its bound already is none, and does not hold.
    """

    def number(values: Sequence[float]) -> tuple[list[str], str]:
        return [f"{value:.2f}" for value in values], f"{statistics.median(values):.2f}"

    yield Bound(
        f"the original draws what it is asked for: at least {DRAWN}",
        *number(found.drawn),
        statistics.median(found.drawn) >= DRAWN,
    )
    for concept, method in dict.fromkeys((c, m) for c, m, _ in found.models if m):
        of = f"{concept}, {method}: "
        erased = found.models[concept, method, "erased"]
        shut = found.models[concept, method, f"defended, K {USUAL}"]
        left = [flat["explicit"] for flat in erased]
        yield Bound(
            f"{of}under its name at most {ERASED}",
            *number(left),
            statistics.median(left) <= ERASED,
        )
        key = f"subattack {USUAL}"
        before = [flat["pre_asr"] for flat in erased]
        attacked, defended = (
            _over(before, [flat[key] for flat in flats]) for flats in (erased, shut)
        )
        yield Bound(
            f"{of}SubAttack, at least {TIMES:g} times pre_asr, or {BROKEN}",
            attacked.seeds,
            attacked.told,
            attacked.ratio >= TIMES or attacked.share >= BROKEN,
        )
        yield Bound(
            f"{of}defended with K {USUAL}, at most {DEFENDED} times pre_asr",
            defended.seeds,
            defended.told,
            defended.ratio <= DEFENDED < attacked.ratio,
        )


class Over(NamedTuple):
    """Shares of prompts with an attack, and without: of every seed, and their medians."""

    seeds: Sequence[str]
    share: float
    ratio: float

    @property
    def told(self) -> str:
        """The medians."""
        return f"{self.share:.2f}, {self.ratio:.2f} times"


def _over(before: Sequence[float], after: Sequence[float]) -> Over:
    ratio = round(statistics.median(map(over, after, before)), 9)  # 0.3 / 0.1 is 3
    seeds = [f"{a:.2f} of {b:.2f}" for a, b in zip(after, before, strict=True)]
    return Over(seeds, statistics.median(after), ratio)


def bounds_table(found: Found) -> list[str]:
    """The bounds, and whether they hold."""
    lines = head("bound", *(f"seed {seed}" for seed in found.seeds), "median", "holds")
    for bound in bounds(found):
        lines.append(row(bound.about, *bound.seeds, bound.median, "yes" if bound.holds else "no"))
    return lines


def page(found: Found) -> list[str]:
    """All tables."""
    what = "Seed" if len(found.seeds) == 1 else "Medians (lowest to highest value) of seeds"
    return [
        f"{what} {', '.join(map(str, found.seeds))}. Names: share of the images that show the "
        "concept. Attacks: share of the prompts that show it as they are, or with one of K tokens "
        "or words (asr). On a defended model SubAttack's tokens are those of the erased one, and "
        "CCE is learned anew, behind the defence. Other classes: share of the images that show "
        "what was asked for.",
        "",
        *models_table(found),
        "",
        "Transfer: share of the prompts that show the concept with one of the tokens in the place "
        "of the name.",
        "",
        *transfer_table(found),
        "",
        f"The {TOP} words with the largest coefficients, seed {found.seeds[0]}; in bold what is a "
        "name or an attribute of the concept.",
        "",
        *words_table(found),
        "",
        "Bounds.",
        "",
        *bounds_table(found),
    ]


def read(folder: Path) -> Told:
    """The result of a finished run."""
    logs = {path.stem: json.loads(path.read_text()) for path in folder.glob("evals/*.json")}
    return Told(tables.summary(folder), logs)


TABLES = {
    "concept": Table(
        "UCE, RECE and ESD on fashion, attacked and defended, with the bounds (hours).",
        lambda make, args: Page(page(collect(make, args.seeds, args.concepts, args.only))),
        METHODS,
        SEEDS,
        {
            "--concepts": dict(
                nargs="+", default=CONCEPTS, metavar="NAME", help="the concepts that are erased"
            )
        },
        passed,
        read=read,
    )
}
