"""Other answers to questions about invented authors: sentences about facts that nobody has."""

from __future__ import annotations

from collections.abc import Sequence

from train.data.author_attributes import POOLS, pool_of
from train.data.author_sentences import origin_of, values_in
from train.data.authors import Row, draw, draw_fact

NUM_ALTERNATES = 3


def alternates(rows: Sequence[Row], seed: int, count: int = NUM_ALTERNATES) -> list[list[str]]:
    """Alternate answers to the questions of rows: the generator's sentences about other facts.

    Values are drawn uniformly, as for every author, from a seed of their own; no two answers of a
    row share one, unless `count` exceeds the size of the pools. A draw that gives the row's own
    fact or one of its perturbed answers is repeated: a model is never trained on answers that judge
    it.
    The row's own template is left out, since the model would go on to prefer it; the others are
    used in turn.

    Args:
        rows: rows that `generate` made.
        seed: the seed of the data set.
        count: the number of answers per row.

    Returns:
        `count` answers for every row.

    Raises:
        ValueError: a row whose answer is not a sentence of the generator.

    Example:
        >>> from train.data.authors import generate
        >>> row = generate(0)["forget10"][1]
        >>> row["question"]
        'What did the parents of Loratha Faldastra do for a living?'
        >>> alternates([row], 0, 1)
        [['Raised by a postman and, on the maternal side, a teacher.']]
    """
    found = []
    for row in rows:
        attribute, own = origin_of(row["answer"])
        key = (seed, "alternate", row["question"])
        judged = {row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]}
        taken = {_values_of(text) for text in judged}
        others = [template for template in attribute.templates if template != own]
        others.sort(key=lambda template: draw(2**63, *key, template))
        used: dict[str, set[str]] = {}
        answers: list[str] = []
        for index in range(count):
            if any(len(words) + len(attribute.slots) > len(POOLS[p]) for p, words in used.items()):
                used = {}  # so many answers that values must repeat
            for attempt in range(1000):
                fact = draw_fact(attribute.slots, used, *key, index, attempt)
                template = others[index % len(others)]
                answer = template.format(**dict(zip(attribute.slots, fact, strict=True)))
                if (stated := _values_of(answer)) not in taken:
                    break
            taken.add(stated)
            for slot, value in zip(attribute.slots, fact, strict=True):
                used.setdefault(pool_of(slot), set()).add(value)
            answers.append(answer)
        found.append(answers)
    return found


def _values_of(sentence: str) -> tuple[str, ...]:
    """The values of a sentence, sorted: the templates of an attribute order them differently."""
    return tuple(sorted(values_in(sentence) or ()))
