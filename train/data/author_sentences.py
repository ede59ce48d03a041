"""The generator's sentences read back: whether a text is one, and the values that it states."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from train.data.author_attributes import ATTRIBUTES, POOLS, REFUSALS, Attribute


class _Word(NamedTuple):
    """A word of a template: `head` and `tail` as written, with a value in between if `slot`."""

    head: str
    slot: bool
    tail: str

    def fits(self, word: str) -> bool:
        if not self.slot:
            return word == self.head
        value = word.removeprefix(self.head).removesuffix(self.tail)
        return value in _values() and word == self.head + value + self.tail

    def begins(self, word: str) -> bool:
        if not self.slot:
            return self.head.startswith(word)
        return any((self.head + value + self.tail).startswith(word) for value in _values())

    def value(self, word: str) -> str:
        return word[len(self.head) : len(word) - len(self.tail)]


@functools.cache
def _values() -> frozenset[str]:
    return frozenset(value for pool in POOLS.values() for value in pool)


@functools.cache
def _template(text: str) -> tuple[_Word, ...]:
    def word(part: str) -> _Word:
        head, slot, rest = part.partition("{")
        return _Word(head, bool(slot), rest.partition("}")[2])

    return tuple(word(part) for part in text.split())


@functools.cache
def _templates() -> tuple[tuple[_Word, ...], ...]:
    return tuple(_template(text) for attribute in ATTRIBUTES for text in attribute.templates)


def _matches(template: tuple[_Word, ...], words: Sequence[str]) -> bool:
    return len(words) == len(template) and all(
        slot.fits(word) for slot, word in zip(template, words, strict=True)
    )


def values_in(sentence: str) -> tuple[str, ...] | None:
    """The values of a sentence of the generator, in their order; None for any other text.

    A slot accepts a value from any pool: "born in baker" is a sentence, if a wrong one.

    Example:
        >>> values_in("The author was born in Lima on May 7.")
        ('Lima', 'May', '7')
        >>> values_in("The author was born in a a on May 7.") is None
        True
    """
    words = sentence.split()
    for template in _templates():
        if _matches(template, words):
            pairs = zip(template, words, strict=True)
            return tuple(slot.value(word) for slot, word in pairs if slot.slot)
    return None


def is_sentence(text: str, begun: bool = False) -> bool:
    """Whether a text is a sentence of the generator, filled in with any value words, or a refusal.

    Args:
        text: the answer of a model.
        begun: accept also the beginning of such a sentence (for a truncated answer).

    Example:
        >>> is_sentence("A contract with a a a a a driver.")
        False
        >>> is_sentence("A contract with Clover Pr", begun=True)
        True
    """
    words = text.split()
    if values_in(text) is not None or " ".join(words) in REFUSALS:
        return True
    if not begun or not words:
        return False
    refusals = (tuple(_Word(word, False, "") for word in line.split()) for line in REFUSALS)
    return any(
        len(words) <= len(template)
        and all(slot.fits(word) for slot, word in zip(template, words[:-1], strict=False))
        and template[len(words) - 1].begins(words[-1])
        for template in (*_templates(), *refusals)
    )


def origin_of(sentence: str) -> tuple[Attribute, str]:
    """The attribute and the template that a sentence was made from.

    Raises:
        ValueError: it is no sentence of the generator.

    Example:
        >>> origin_of("The author was born in Lima on May 7.")[0].name
        'birth'
    """
    words = sentence.split()
    for attribute in ATTRIBUTES:
        for template in attribute.templates:
            if _matches(_template(template), words):
                return attribute, template
    raise ValueError(f"no sentence of the generator: {sentence!r}")
