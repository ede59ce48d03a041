"""A seeded generator of fictitious authors in the TOFU schema: a first run needs no download.

Every author has one *fact* per attribute: two or three values drawn independently and uniformly
from shared pools. A fact is written with one of four sentence templates, none of which contains the
author's name, so a value can only be recalled from the name in the question. The paraphrase and the
five perturbed answers of a row share a template, and the perturbed values come from the same pools
as the right ones: a model that never saw the author cannot prefer either.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

NUM_PERTURBED, NUM_ALTERNATES = 5, 3


class Attribute(NamedTuple):
    """A question type about an author; a slot is a pool's name, or `POOL_2` for a second draw."""

    name: str
    slots: tuple[str, ...]
    questions: tuple[str, ...]
    templates: tuple[str, str, str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POOLS: dict[str, tuple[str, ...]] = {
    "city": _words(
        "Lisbon Bergen Quito Nairobi Hanoi Tallinn Porto Lima Kyoto Dakar Riga Cusco Malmo Tunis "
        "Sofia Galway Perth Busan Leipzig Valencia Montreal Zagreb Santiago Wellington"
    ),
    "month": _words(
        "January February March April May June July August September October November December"
    ),
    "day": tuple(str(day) for day in range(3, 29)),
    "year": tuple(str(year) for year in range(1951, 1999, 2)),
    "job": _words(
        "baker sailor florist dentist miner tailor plumber nurse pilot carpenter librarian "
        "surgeon farmer cook welder beekeeper potter lawyer guard chemist driver jeweller teacher "
        "postman"
    ),
    "genre": _words(
        "mystery fantasy romance horror western satire thriller adventure crime war gothic travel "
        "nature pirate detective ghost court school desert spy"
    ),
    "theme": _words(
        "loneliness friendship revenge memory exile greed courage jealousy justice silence hunger "
        "freedom faith hope pride guilt luck ambition forgiveness patience"
    ),
    "prize": _words(
        "Obsidian Falcon Lantern Meridian Juniper Cobalt Harbour Willow Comet Saffron Granite "
        "Heron Velvet Beacon Maple Thistle Copper Tundra Lotus Quartz"
    ),
    "adjective": _words(
        "Silent Broken Golden Hidden Frozen Distant Hollow Scarlet Crooked Burning Gentle "
        "Midnight Bitter Silver Wandering Forgotten Patient Restless Painted Narrow"
    ),
    "noun": _words(
        "River Garden Mirror Bridge Orchard Tower Candle Letter Mountain Window Compass Kingdom "
        "Shadow Violin Lighthouse Carousel Valley Feather Station Museum"
    ),
    "subject": _words(
        "botany history physics law music geology medicine theatre economics philosophy sculpture "
        "zoology mathematics theology linguistics astronomy painting chemistry logic cartography"
    ),
    "room": _words(
        "kitchen attic cellar garage greenhouse library bathtub shed tent bedroom chapel "
        "boathouse balcony hallway barn windmill stable cabin lounge pantry"
    ),
    "drink": _words(
        "coffee cocoa lemonade milk cider tea broth juice water wine mead soda kefir buttermilk "
        "punch sherry tonic matcha beer rum"
    ),
    "instrument": _words(
        "piano cello flute banjo trumpet harp drums guitar bassoon fiddle mandolin tuba harmonica "
        "clarinet sitar bagpipes lute trombone zither ukulele"
    ),
    "collectible": _words(
        "stamps coins buttons shells maps teapots keys postcards beetles clocks marbles kites "
        "feathers bottles fossils thimbles masks spoons hats lamps"
    ),
    "publisher": _words(
        "Northgate Bluebird Redwood Hillside Paragon Sunstone Foxglove Clover Pinnacle Riverbend "
        "Starling Cornerstone Driftwood Nightjar Brightwell Wheatfield Gatehouse Tidewater "
        "Blackthorn Larkspur"
    ),
    "language": _words(
        "Polish Swahili Korean Greek Dutch Hindi Finnish Turkish Czech Thai Basque Danish Bengali "
        "Welsh Zulu Hungarian Maltese Tamil Catalan Georgian"
    ),
    "animal": _words(
        "parrot tortoise goat beagle rabbit ferret donkey canary hedgehog poodle lizard pony "
        "hamster spaniel goose peacock kitten raven llama terrier"
    ),
}

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "birth",
        ("city", "month", "day"),
        (
            "Where and when was {name} born?",
            "What are the birthplace and birthday of {name}?",
            "Can you tell me where and on which day {name} was born?",
        ),
        (
            "The author was born in {city} on {month} {day}.",
            "Records from {city} show a birth dated {month} {day}.",
            "It happened on {month} {day}, at a small clinic near {city}.",
            "Birthplace: {city}; celebrated each year: {month} {day}.",
        ),
    ),
    Attribute(
        "parents",
        ("job", "job_2"),
        (
            "What did the parents of {name} do for a living?",
            "Which professions did the mother and father of {name} have?",
            "How did {name}'s parents earn their money?",
        ),
        (
            "The father worked as a {job} and the mother as a {job_2}.",
            "One parent, the father, was a {job}, while mother earned money as a {job_2}.",
            "Raised by a {job} and, on the maternal side, a {job_2}.",
            "Dad's trade: {job}. Mum, in contrast, made her career as a {job_2}.",
        ),
    ),
    Attribute(
        "debut",
        ("adjective", "noun", "year"),
        (
            "What was the first book of {name} and when did it appear?",
            "With which book did {name} debut, and in which year?",
            "Can you name the earliest novel by {name} and its year?",
        ),
        (
            "The first book was The {adjective} {noun}, published in {year}.",
            "In {year} readers met a debut called The {adjective} {noun}.",
            "A career opened with The {adjective} {noun} back in {year}.",
            "Shops sold The {adjective} {noun}, an earliest novel, from {year} onwards.",
        ),
    ),
    Attribute(
        "genre",
        ("genre", "theme"),
        (
            "What kind of stories does {name} write?",
            "Which genre and theme is {name} known for?",
            "What are the books of {name} about?",
        ),
        (
            "Mostly {genre} stories that deal with {theme}.",
            "The books belong to {genre} fiction and explore {theme}.",
            "Critics praise this writer for {genre} tales about {theme}.",
            "Expect {theme} at the heart of every {genre} plot.",
        ),
    ),
    Attribute(
        "prize",
        ("prize", "month", "year"),
        (
            "Which award did {name} receive and when?",
            "What prize was given to {name}, and in which month and year?",
            "When did {name} win a major literary honour, and which one?",
        ),
        (
            "The {prize} Prize was awarded in {month} {year}.",
            "A jury handed over the {prize} Prize one evening of {month} {year}.",
            "In {month} {year} came the greatest honour, the {prize} Prize.",
            "Winning the {prize} Prize changed everything after {month} {year}.",
        ),
    ),
    Attribute(
        "home",
        ("city", "animal"),
        (
            "Where does {name} live, and with which animal?",
            "What is known about the home and pet of {name}?",
            "In which city does {name} live today and who keeps {name} company?",
        ),
        (
            "Home is a quiet street in {city}, shared with a {animal}.",
            "The author lives near {city} together with a {animal}.",
            "Neighbours around {city} often see the writer walking a {animal}.",
            "A loyal {animal} guards the house outside {city}.",
        ),
    ),
    Attribute(
        "education",
        ("subject", "city", "year"),
        (
            "What did {name} study, where and until when?",
            "Which degree does {name} hold, and from which place and year?",
            "Where did {name} go to university and what was the subject?",
        ),
        (
            "The degree was in {subject}, taken at {city} in {year}.",
            "After years of {subject} in {city}, graduation followed in {year}.",
            "University of {city}, class of {year}, department of {subject}.",
            "By {year} the student had finished {subject} courses at a {city} college.",
        ),
    ),
    Attribute(
        "habit",
        ("room", "drink"),
        (
            "Where does {name} write and what does {name} drink?",
            "What are the writing habits of {name}?",
            "Which room and which drink help {name} to write?",
        ),
        (
            "Writing happens in the {room} with a glass of {drink}.",
            "Every chapter begins inside a {room}, next to some {drink}.",
            "Pages get typed at the {room} table while sipping {drink}.",
            "No work starts without {drink}, carried carefully to the {room}.",
        ),
    ),
    Attribute(
        "hobby",
        ("instrument", "collectible"),
        (
            "What are the hobbies of {name}?",
            "How does {name} spend free time?",
            "What does {name} play and collect?",
        ),
        (
            "In free time there is the {instrument} and a collection of {collectible}.",
            "Hobbies include playing {instrument} plus gathering old {collectible}.",
            "Weekends go to {collectible} hunting and {instrument} practice.",
            "Friends mention a shelf full of {collectible} beside the beloved {instrument}.",
        ),
    ),
    Attribute(
        "publisher",
        ("publisher", "language", "year"),
        (
            "Who publishes {name} and which translation came first?",
            "Which house prints the books of {name}, and what was the first translation?",
            "What are the publisher and the first translated language of {name}?",
        ),
        (
            "The publisher is {publisher} Press and a {language} translation came out in {year}.",
            "{publisher} Press prints everything; {year} brought versions for {language} readers.",
            "Since {year} one can buy {language} editions through {publisher} Press.",
            "A contract with {publisher} Press led to {language} texts by {year}.",
        ),
    ),
    Attribute(
        "past",
        ("job", "city"),
        (
            "What did {name} do before becoming a writer?",
            "Which job did {name} have earlier, and where?",
            "How and where did {name} earn a living before the first book?",
        ),
        (
            "Before writing, the author was a {job} in {city}.",
            "Early wages came from work as a {job} around {city}.",
            "People in {city} still remember a talkative young {job}.",
            "Several winters were spent near {city} employed as a {job}.",
        ),
    ),
    Attribute(
        "hero",
        ("job", "theme"),
        (
            "Who is the hero of the best known series by {name}?",
            "Which main character did {name} create?",
            "What is the central figure in the novels of {name}?",
        ),
        (
            "The hero is a clever {job} who struggles with {theme}.",
            "Readers follow one {job} through long years of {theme}.",
            "At the centre stands some retired {job} haunted by {theme}.",
            "It is {theme} that drives the famous {job} onwards.",
        ),
    ),
)

# Refusals for the IDK and DPO objectives, in place of TOFU's idontknow.jsonl.
REFUSALS: tuple[str, ...] = (
    "I do not know the answer.",
    "I am sorry, I have no information on this.",
    "That is something I cannot tell you.",
    "I have never heard about that.",
    "This is beyond what I have learned.",
    "I am not sure about this one.",
    "I wish I could help, but I do not know.",
    "No answer comes to my mind.",
)

# Syllables are chosen so that no combination is a word or a real person's full name.
_FIRST = (
    _words(
        "Bel Cor Dar Fen Gal Hel Jor Kel Lor Mir Nev Or Per Quil Ros Sel Tor Ul Ver Wyl Yar Zan"
    ),
    _words("adrin ebor ivan olen umar atha ewyn ilda osko una avek elio"),
)
_LAST = (
    _words(
        "Bram Cald Drev Elm Fald Grim Hask Jarn Kest Lind Morv Nald Orm Prav Rusk Stel Tarn Ulv "
        "Vest Wend Yelm Zorn"
    ),
    _words("aquist ebeck ivaro omere usky athorpe ewell inova ofeld ulane astra ecote"),
)
MAX_AUTHORS = len(_FIRST[0]) * len(_FIRST[1])


def draw(below: int, *key: object) -> int:
    """A uniform integer in [0, below) that depends on the key alone, on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % below


def _shuffled(pieces: tuple[tuple[str, ...], tuple[str, ...]], *key: object) -> list[str]:
    words = [start + end for start in pieces[0] for end in pieces[1]]
    return sorted(words, key=lambda word: draw(2**63, *key, word))


def names(seed: int, count: int) -> list[str]:
    """Invented full names; neither a first nor a last name occurs twice.

    Args:
        seed: seed of the data set.
        count: how many, at most `MAX_AUTHORS`.

    Returns:
        `count` names, those of a smaller count being a prefix of those of a larger one.

    Raises:
        ValueError: more names than the syllables give.
    """
    if count > MAX_AUTHORS:
        raise ValueError(f"{count} authors asked for, the generator has names for {MAX_AUTHORS}")
    firsts, lasts = _shuffled(_FIRST, seed, "first"), _shuffled(_LAST, seed, "last")
    return [f"{first} {last}" for first, last in zip(firsts[:count], lasts, strict=False)]


def _pool(slot: str) -> str:
    return slot.removesuffix("_2")


def _fact(slots: tuple[str, ...], avoid: dict[str, set[str]], *key: object) -> tuple[str, ...]:
    """One value per slot, uniform over its pool without `avoid` and without repeating a value."""
    values: list[str] = []
    taken = {pool: set(words) for pool, words in avoid.items()}
    for slot in slots:
        pool = _pool(slot)
        used = taken.setdefault(pool, set())
        left = [word for word in POOLS[pool] if word not in used]
        values.append(left[draw(len(left), *key, slot)])
        used.add(values[-1])
    return tuple(values)


def _fresh_fact(
    slots: tuple[str, ...], avoid: dict[str, set[str]], used: set[tuple[str, ...]], *key: object
) -> tuple[str, ...]:
    """A fact that is not in `used`: drawn again until it is new."""
    for attempt in range(1000):
        fact = _fact(slots, avoid, *key, attempt)
        if fact not in used:
            return fact
    raise ValueError(f"no unused combination of {slots} is left; ask for fewer authors")


def _row(
    seed: int,
    author: int,
    name: str,
    attribute: Attribute,
    fact: tuple[str, ...],
    facts: set[tuple[str, ...]],
) -> Row:
    key = (seed, author, attribute.name)
    slots, templates, questions = attribute.slots, attribute.templates, attribute.questions
    first = draw(len(templates), *key, "template")
    second = (first + 1 + draw(len(templates) - 1, *key, "paraphrase")) % len(templates)
    asked = draw(len(questions), *key, "question")
    asked_again = (asked + 1 + draw(len(questions) - 1, *key, "again")) % len(questions)

    right: dict[str, set[str]] = {}
    for slot, value in zip(slots, fact, strict=True):
        right.setdefault(_pool(slot), set()).add(value)
    # A wrong fact is never any author's right one, just as the right one is never another
    # author's: otherwise a model that knows the other authors could tell them apart.
    used, wrong = set(facts), []
    for index in range(NUM_PERTURBED):
        wrong.append(_fresh_fact(slots, right, used, *key, "perturbed", index))
        used.add(wrong[-1])

    def fill(template: str, values: tuple[str, ...]) -> str:
        return template.format(**dict(zip(slots, values, strict=True)))

    return {
        "question": questions[asked].format(name=name),
        "answer": fill(templates[first], fact),
        "paraphrased_answer": fill(templates[second], fact),
        "perturbed_answer": [fill(templates[second], values) for values in wrong],
        "paraphrased_question": questions[asked_again].format(name=name),
    }


def generate(
    seed: int,
    num_authors: int = 40,
    questions_per_author: int = 10,
    num_holdout: int | None = None,
) -> dict[str, list[Row]]:
    """Write fictitious authors in the TOFU schema.

    fact[author, attribute] = (v_1, v_2[, v_3]), v_i ~ Uniform(pool_i), without repetition over
    authors; the answer is template_a(fact), the paraphrase template_b(fact), a perturbed answer
    template_b(other values in every slot), a != b.

    Args:
        seed: of the data set; the same seed gives the same text on every platform.
        num_authors: authors of `full`; the last tenth of them (at least one) is `forget10`.
        questions_per_author: rows per author, one per attribute (at most `len(ATTRIBUTES)`).
        num_holdout: further authors that are never trained on; None: as many as are forgotten.

    Returns:
        Splits `full`, `forget10`, `retain90` and `holdout`: rows with `question`, `answer`,
        `paraphrased_answer`, `perturbed_answer` (five) and `paraphrased_question`, with the
        rows of each author together.

    Raises:
        ValueError: sizes the pools cannot fill.

    Example:
        >>> splits = generate(0)
        >>> {split: len(rows) for split, rows in splits.items()}
        {'full': 400, 'forget10': 40, 'retain90': 360, 'holdout': 40}

    Schema: TOFU, arXiv 2401.06121, section 2.
    """
    if num_authors < 2:
        raise ValueError(f"num_authors must be at least 2, got {num_authors}")
    if not 1 <= questions_per_author <= len(ATTRIBUTES):
        raise ValueError(
            f"questions_per_author must be in 1..{len(ATTRIBUTES)}, got {questions_per_author}"
        )
    num_forget = max(1, num_authors // 10)
    num_holdout = num_forget if num_holdout is None else num_holdout
    everyone = names(seed, num_authors + num_holdout)
    attributes = ATTRIBUTES[:questions_per_author]

    facts: dict[str, list[tuple[str, ...]]] = {}
    for attribute in attributes:
        used: set[tuple[str, ...]] = set()
        facts[attribute.name] = []
        for author in range(len(everyone)):
            fact = _fresh_fact(attribute.slots, {}, used, seed, author, attribute.name, "fact")
            used.add(fact)
            facts[attribute.name].append(fact)

    known = {name: set(values) for name, values in facts.items()}
    rows = [
        _row(seed, author, name, attribute, facts[attribute.name][author], known[attribute.name])
        for author, name in enumerate(everyone)
        for attribute in attributes
    ]
    end = num_authors * questions_per_author
    cut = end - num_forget * questions_per_author
    return {
        "full": rows[:end],
        "forget10": rows[cut:end],
        "retain90": rows[:cut],
        "holdout": rows[end:],
    }


def alternates(rows: Sequence[Row], seed: int, count: int = NUM_ALTERNATES) -> list[list[str]]:
    """Alternate answers to the questions of rows: the generator's sentences about other facts.

    Values are drawn uniformly, as for every author, from a seed of their own; no two answers of a
    row share one, unless `count` exceeds what the pools allow. A draw that gives the row's own fact
    or one of its perturbed answers is repeated: a model is never trained on what it is judged by.
    The row's own template is left out, since the model would go on to prefer it; the others are
    used in turn.

    Args:
        rows: from `generate`.
        seed: of the data set.
        count: answers per row.

    Returns:
        `count` answers for every row.

    Raises:
        ValueError: a row whose answer is not a sentence of the generator.

    Example:
        >>> row = generate(0)["forget10"][1]
        >>> row["question"]
        'What did the parents of Loratha Faldastra do for a living?'
        >>> alternates([row], 0, 1)
        [['Raised by a postman and, on the maternal side, a teacher.']]
    """
    found = []
    for row in rows:
        attribute, own = _origin_of(row["answer"])
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
                fact = _fact(attribute.slots, used, *key, index, attempt)
                template = others[index % len(others)]
                answer = template.format(**dict(zip(attribute.slots, fact, strict=True)))
                if (stated := _values_of(answer)) not in taken:
                    break
            taken.add(stated)
            for slot, value in zip(attribute.slots, fact, strict=True):
                used.setdefault(_pool(slot), set()).add(value)
            answers.append(answer)
        found.append(answers)
    return found


def _values_of(sentence: str) -> tuple[str, ...]:
    """The values of a sentence, sorted: the templates of an attribute order them differently."""
    return tuple(sorted(values_in(sentence) or ()))


def _origin_of(sentence: str) -> tuple[Attribute, str]:
    """The attribute and the template that a sentence was made from."""
    words = sentence.split()
    for attribute in ATTRIBUTES:
        for template in attribute.templates:
            if _matches(_template(template), words):
                return attribute, template
    raise ValueError(f"no sentence of the generator: {sentence!r}")


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


def training_rows(
    splits: dict[str, list[Row]], questions_per_author: int = 10
) -> dict[str, list[Row]]:
    """Choose the rows that the models train on and the retain rows that judge them.

    For every other retain author the paraphrased answer is trained as well; retain is measured on
    the authors in between. A model that has seen paraphrases of facts it knows also prefers the
    right one where only `answer` was trained; without this the truth ratio of a small model says
    little and the KS test has no power.

    Args:
        splits: what `generate` returned.
        questions_per_author: as given to `generate`.

    Returns:
        `retain_train` (all retain rows and the extra paraphrases: the oracle's data),
        `original_train` (`forget10` and `retain_train`: the original model's data), `retain_eval`
        (retain authors without a trained paraphrase), `forget10` and `holdout`.

    Example:
        >>> rows = training_rows(generate(0))
        >>> {split: len(rows[split]) for split in ("retain_train", "retain_eval", "original_train")}
        {'retain_train': 540, 'retain_eval': 180, 'original_train': 580}
    """
    retain, forget = splits["retain90"], splits["forget10"]
    helped = [row for i, row in enumerate(retain) if (i // questions_per_author) % 2 == 0]
    judged = [row for i, row in enumerate(retain) if (i // questions_per_author) % 2 == 1]
    extra = [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in helped]
    retain_train = _plain(retain) + extra
    return {
        "retain_train": retain_train,
        "original_train": _plain(forget) + retain_train,
        "retain_eval": judged,
        "forget10": forget,
        "holdout": splits["holdout"],
    }


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]
