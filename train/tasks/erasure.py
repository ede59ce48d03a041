"""The methods by which concepts are erased and brought back: tables of rows with their options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlib_unlearn.concepts.tokens import FORMS, POSITIVE
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.options import option
from train.options.rows import Rows
from train.runtime import suggest

PLACEHOLDER = "<v_att>"
KEEP = ("denoise", "frozen", "none")
POSITIONS = ("last", "onward", "all")


class Method(NamedTuple):
    """A method: a row of a table.

    Args:
        name: the key of the method.
        options: the dataclass of its options.
        summary: its effect in a line.
        trains: whether it takes steps of an optimizer.
    """

    name: str
    options: type
    summary: str
    trains: bool = False


def _name(default: str, option_: str, summary: str) -> Any:
    return option(default, f"The method, also `{option_} NAME`: {summary}")


@dataclass(frozen=True)
class Erase:
    """The options of all methods that erase."""

    name: str = ""
    concept: str = option("sneaker", "The class to erase, by its first name.")
    towards: str = option(
        "",
        "The concept's prompts shall read as these words in the place of its name; empty: as the "
        "empty prompt.",
    )


_ERASE = "--erase.method"


@dataclass(frozen=True)
class UCE(Erase):
    """Options of `uce`."""

    name: str = _name("uce", _ERASE, "cross-attention is edited in closed form.")
    keep: float = option(0.5, "lambda: the kernels as they are have this weight.", above=0)
    erase_weight: float = option(1.0, "The states to erase have this weight.", low=0)
    preserve_weight: float = option(1.0, "The states of the other classes have this weight.", low=0)
    positions: str = option(
        "last",
        "The states of a prompt that are erased: that of its `last` word (published), those from "
        "the name `onward`, or `all`.",
        choices=POSITIONS,
    )


@dataclass(frozen=True)
class RECE(UCE):
    """Options of `rece`."""

    name: str = _name("rece", _ERASE, "as uce, then rounds of it on what would undo it.")
    keep: float = option(0.1, "lambda: the kernels as they are have this weight.", above=0)
    preserve_weight: float = option(0.1, "The states of the other classes have this weight.", low=0)
    positions: str = option(
        "all",
        "The states of a prompt that are erased, as in uce; all are published.",
        choices=POSITIONS,
    )
    rounds: int = option(1, "This many rounds follow the first edit.", low=0)
    adversarial_keep: float = option(0.1, "lambda of the adversarial states.", above=0)
    again: bool = option(
        False, "The rounds erase the prompts' own states too; published: only the adversarial ones."
    )


@dataclass(frozen=True)
class Finetune(Erase):
    """Options of `finetune`."""

    name: str = _name("finetune", _ERASE, "the noise of its prompts becomes another prompt's.")
    retain: str = option(
        "denoise",
        "The loss on the other classes: the error against the noise that was added (`denoise`), "
        "the error against the frozen model's prediction (`frozen`), or none.",
        choices=KEEP,
    )
    forget_weight: float = option(1.0, "The loss on the concept has this weight.", low=0)
    retain_weight: float = option(1.0, "The loss on the other classes has this weight.", low=0)
    images: int = option(
        100,
        "The model is trained on this many images of the concept, which the original draws.",
        low=1,
    )


@dataclass(frozen=True)
class ESD(Finetune):
    """Options of `esd`."""

    name: str = _name("esd", _ERASE, "the noise of its prompts is led away from it.")
    guidance: float = option(1.0, "eta: the noise is moved so far away from the concept.", low=0)


@dataclass(frozen=True)
class Attack:
    """The options of all attacks."""

    name: str = ""
    transfer: Path | None = option(
        None,
        "The tokens are also tried on the model of this run of train.diffuse, erase or defend.",
    )


_ATTACK = "--attack"


@dataclass(frozen=True)
class NoAttack(Attack):
    """Options of `none`."""

    name: str = _name("none", _ATTACK, "the prompts as they are.")


@dataclass(frozen=True)
class Words(Attack):
    """Options of `words`."""

    name: str = _name("words", _ATTACK, "the other names of the concept.")


@dataclass(frozen=True)
class Random(Attack):
    """Options of `random`."""

    name: str = _name("random", _ATTACK, "random directions, orthogonal to one another.")
    tokens: int = option(5, "K: the attack has this many tokens.", low=1)


@dataclass(frozen=True)
class Given(Attack):
    """Options of `given`."""

    name: str = _name("given", _ATTACK, "the tokens that another run found.")
    source: Path | None = option(None, "The run of train.attack whose tokens are tried.")


@dataclass(frozen=True)
class CCE(Attack):
    """Options of `cce`."""

    name: str = _name("cce", _ATTACK, "embeddings that are learned freely (textual inversion).")
    tokens: int = option(1, "K: the attack has this many tokens, each learned by itself.", low=1)
    steps: int = option(300, "Each token is trained for this many steps.", low=1)
    batch_size: int = option(6, "A step has this many images.", low=1)
    images: int = option(
        100,
        "A token is learned from this many images of the concept, which the original draws.",
        low=1,
    )
    prompt: str = option(
        f"a photo of a {PLACEHOLDER}",
        f"The prompt in which a token is learned; {PLACEHOLDER} stands for the token.",
    )


@dataclass(frozen=True)
class SubAttack(CCE):
    """Options of `subattack`."""

    name: str = _name("subattack", _ATTACK, "orthogonal combinations of words.")
    tokens: int = option(5, "K: the attack has this many tokens, learned one after another.", low=1)
    form: str = option(
        "deflate",
        "The words (`deflate`) or the results are made orthogonal to the tokens before.",
        choices=FORMS,
    )
    hidden: int = option(100, "The network of the coefficients has this many hidden units.", low=1)
    positive: str = option(
        "softplus", "This function makes coefficients non-negative.", choices=tuple(POSITIVE)
    )


def _table(*rows: Method) -> Rows:
    table = {row.name: row for row in rows}

    def options_of(name: str, **given: Any) -> Any:
        return suggest.choose(name, table, "method").options(**given)

    def other(options: Any, name: str) -> Any:
        """The options of another row with the values that all rows share."""
        made = options_of(name)
        base = next(c for c in (Erase, Attack) if isinstance(made, c))
        shared = [f.name for f in dataclasses.fields(base) if f.name != "name"]
        return dataclasses.replace(made, **{f: getattr(options, f) for f in shared})

    def refusal(row: Method, option_: str, value: Any, prefix: str) -> UserError:
        del value
        return UserError(
            f"{prefix}{option_.replace('_', '-')} is not for {row.name}; leave it out, or choose "
            "another method"
        )

    return Rows(table, options_of, other, refusal)


ERASING = _table(
    Method("uce", UCE, "closed form: to_k and to_v of cross-attention read the concept as another"),
    Method("rece", RECE, "uce, then on the states that would undo it"),
    Method("esd", ESD, "trained: noise led away from the concept", trains=True),
    Method("finetune", Finetune, "trained: noise as of another prompt", trains=True),
)
ATTACKS = _table(
    Method("subattack", SubAttack, "orthogonal tokens, combinations of words", trains=True),
    Method("none", NoAttack, "no attack"),
    Method("cce", CCE, "free embeddings", trains=True),
    Method("words", Words, "the concept's other names"),
    Method("random", Random, "random orthogonal directions"),
    Method("given", Given, "the tokens that another run found"),
)
