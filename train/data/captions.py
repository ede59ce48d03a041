"""Captions of small images by a grammar: names of their classes, and words for measured attributes.

Every class has four names with known shares, so the synonyms of a concept are known. A word such as
"dark" stands in a caption only where the image is measured to be dark within its class; words of
quality and place mean nothing. All words are in lower case, and each is one token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlib_unlearn.errors import UserError
from train.data.authors import draw

SHARES = (40, 25, 20, 15)  # the shares of a class's names, in per cent
TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a small photo showing {}",
    "here is {}",
    "this is {}",
    "look at {}",
    "we see {}",
)
# By attribute: the word for the lowest third of a class, and the word for the highest.
ATTRIBUTES = {
    "brightness": ("dark", "light"),
    "width": ("narrow", "wide"),
    "roughness": ("plain", "patterned"),
}
QUALITIES = (
    *("new", "old", "nice", "cheap", "fine", "good", "great", "simple", "classic", "modern"),
    *("famous", "sturdy", "elegant", "soft", "casual", "formal", "lovely", "basic", "fancy"),
    "comfortable",
)
PLACES = (
    *("in a shop", "on the shelf", "from our catalogue", "at the market", "in the window"),
    *("with its label", "for sale", "on black", "by itself", "under a lamp", "near the door"),
    *("beside a chair", "after the rain", "in its box"),
)
FOREGROUND = 0.1  # pixels from 0 to 1 above it belong to the object


class Noun(NamedTuple):
    """A class in words.

    Args:
        names: its four names; the first is the name of the class.
        countable: whether "a" stands before it.
    """

    names: tuple[str, str, str, str]
    countable: bool = True


CLOTHES = (
    Noun(("tshirt", "tee", "jersey", "undershirt")),
    Noun(("trousers", "pants", "slacks", "leggings"), countable=False),
    Noun(("pullover", "sweater", "jumper", "sweatshirt")),
    Noun(("dress", "gown", "frock", "sundress")),
    Noun(("coat", "jacket", "overcoat", "parka")),
    Noun(("sandal", "flipflop", "slipper", "open shoe")),
    Noun(("shirt", "blouse", "polo", "tunic")),
    Noun(("sneaker", "trainer", "running shoe", "gym shoe")),
    Noun(("bag", "handbag", "purse", "satchel")),
    Noun(("ankle boot", "boot", "bootie", "high shoe")),
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(
    Noun((word, f"digit {n}", f"numeral {n}", f"figure {n}")) for n, word in enumerate(_NUMBERS)
)

# Ten classes of ImageNet, by their names there.
OBJECTS = (
    Noun(("tench", "doctor fish", "freshwater fish", "carp")),
    Noun(("english springer", "springer spaniel", "spaniel", "gun dog")),
    Noun(("cassette player", "tape player", "tape deck", "tape recorder")),
    Noun(("chain saw", "chainsaw", "power saw", "motor saw")),
    Noun(("church", "chapel", "cathedral", "abbey")),
    Noun(("french horn", "horn", "brass horn", "hunting horn")),
    Noun(("garbage truck", "dustcart", "refuse lorry", "trash truck")),
    Noun(("gas pump", "petrol pump", "fuel pump", "fuel dispenser")),
    Noun(("golf ball", "dimpled ball", "range ball", "tee ball")),
    Noun(("parachute", "chute", "canopy", "skydiver")),
)


class Caption(NamedTuple):
    """A caption and its parts.

    Args:
        text: the whole caption.
        name: the number of the name in it, 0 to 3.
        attributes: the words in it for measured attributes, by attribute.
    """

    text: str
    name: int
    attributes: Mapping[str, str]


def measure(images: np.ndarray) -> dict[str, np.ndarray]:
    r"""The quantities behind the attributes, measured on each image.

        brightness: mean value of the object's pixels
        width: width over height of the box around them
        roughness: mean absolute difference of neighbours inside it, over the brightness

    Args:
        images: `(N, H, W)` or `(N, H, W, C)`, from 0 to 1, the object lighter than the background.

    Returns:
        `(N,)` float32 each; zeros for an image without an object.

    Example:
        >>> image = np.zeros((1, 4, 4)); image[0, :2] = 0.5
        >>> {name: values.tolist() for name, values in measure(image).items()}
        {'brightness': [0.5], 'width': [2.0], 'roughness': [0.0]}
    """
    grey = np.asarray(images, np.float32)
    grey = grey.mean(-1) if grey.ndim == 4 else grey
    inside = grey > FOREGROUND
    count = np.maximum(inside.sum((1, 2)), 1)
    brightness = (grey * inside).sum((1, 2)) / count
    columns, rows = (_extent(np.asarray(inside.any(axis))) for axis in (1, 2))
    change = np.zeros(len(grey), np.float32)
    pairs = np.zeros(len(grey), np.int64)
    for values, there in ((grey, inside), (grey.swapaxes(1, 2), inside.swapaxes(1, 2))):
        both = there[:, 1:] & there[:, :-1]
        change += (np.abs(values[:, 1:] - values[:, :-1]) * both).sum((1, 2))
        pairs += both.sum((1, 2))
    found = {
        "brightness": brightness,
        "width": columns / np.maximum(rows, 1),
        "roughness": change / np.maximum(pairs, 1) / np.maximum(brightness, FOREGROUND),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def _extent(there: np.ndarray) -> np.ndarray:
    """The distance from the first to the last True in each row: `(N, n)` to `(N,)`."""
    places = np.arange(there.shape[1])
    first = np.where(there, places, there.shape[1]).min(axis=1)
    last = np.where(there, places, -1).max(axis=1)
    return np.maximum(last - first + 1, 0)


def thirds(measured: Mapping[str, np.ndarray], labels: np.ndarray, classes: int) -> np.ndarray:
    """The borders between the thirds of each class.

    Args:
        measured: the quantities of images to train on.
        labels: `(N,)` their classes.
        classes: the number of classes.

    Returns:
        `(classes, attributes, 2)`, in the order of `ATTRIBUTES`.

    Raises:
        UserError: a class without an image.

    Example:
        >>> values = np.arange(6.0)
        >>> thirds(dict.fromkeys(ATTRIBUTES, values), np.zeros(6, int), 1)[0, 0].round(2).tolist()
        [1.67, 3.33]
    """
    empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(empty):
        raise UserError(f"class {empty[0]} has no image to train on; add some, or leave it out")
    values = np.stack([measured[name] for name in ATTRIBUTES], -1)
    return np.stack(
        [np.quantile(values[labels == c], (1 / 3, 2 / 3), axis=0).T for c in range(classes)]
    )


def words_for(
    measured: Mapping[str, np.ndarray], labels: np.ndarray, borders: np.ndarray
) -> list[dict[str, str]]:
    """The words of each image for attributes outside the middle third of its class.

    Args:
        measured: the quantities that `measure` returned.
        labels: `(N,)` classes.
        borders: the borders that `thirds` returned.

    Returns:
        The words of each image, by attribute.

    Example:
        >>> borders = np.tile([1.0, 2.0], (1, 3, 1))
        >>> measured = {"brightness": [0.0], "width": [1.5], "roughness": [3.0]}
        >>> words_for({k: np.array(v) for k, v in measured.items()}, np.array([0]), borders)
        [{'brightness': 'dark', 'roughness': 'patterned'}]
    """
    found: list[dict[str, str]] = [{} for _ in labels]
    for place, (attribute, (low, high)) in enumerate(ATTRIBUTES.items()):
        lower, upper = borders[labels, place].T
        values = measured[attribute]
        for row, value, below, above in zip(found, values, lower, upper, strict=True):
            if value < below:
                row[attribute] = low
            elif value > above:
                row[attribute] = high
    return found


def phrase(noun: Noun, name: int, before: Sequence[str] = ()) -> str:
    """A name of a class, with words and an article before it.

    Example:
        >>> phrase(CLOTHES[9], 0), phrase(CLOTHES[9], 0, ["dark"]), phrase(CLOTHES[1], 1, ["new"])
        ('an ankle boot', 'a dark ankle boot', 'new pants')
    """
    words = " ".join([*before, noun.names[name]])
    if not noun.countable:
        return words
    article = "an" if words[0] in "aeiou" and not words.startswith("one") else "a"
    return f"{article} {words}"


def caption(noun: Noun, attributes: Mapping[str, str], *key: object) -> Caption:
    """A caption of one image, which depends on the key alone.

    One caption in two names each attribute, one in four a quality, one in two a place.

    Args:
        noun: the class of the image.
        attributes: its words by attribute, see `words_for`.
        key: the values that key the draw, such as the seed, a purpose and the number of the image.

    Example:
        >>> caption(CLOTHES[7], {"width": "wide"}, 0, "captions", 4).text
        'an image of a wide trainer in a shop'
    """
    dice = draw(100, *key, "name")
    name = next(i for i in range(4) if dice < sum(SHARES[: i + 1]))
    said = {a: word for a, word in attributes.items() if draw(2, *key, "attribute", a)}
    before = list(said.values())
    if not draw(4, *key, "quality"):
        before.insert(0, QUALITIES[draw(len(QUALITIES), *key, "which quality")])
    text = TEMPLATES[draw(len(TEMPLATES), *key, "template")].format(phrase(noun, name, before))
    if draw(2, *key, "place"):
        text += " " + PLACES[draw(len(PLACES), *key, "which place")]
    return Caption(text, name, said)


def prompt(noun: Noun, name: int, *key: object) -> Caption:
    """A caption that asks for a class under a given name, which depends on the key alone.

    Two of three have one word for an attribute, against which an image can be checked; there is no
    word of quality.

    Args:
        noun: the class.
        name: the number of the name, 0 to 3.
        key: the values that key the draw, such as the seed, a purpose and the number of the prompt.

    Example:
        >>> prompt(CLOTHES[7], 2, 0, "prompts", 4).text
        'a picture of a plain running shoe on the shelf'
    """
    said = {}
    if draw(3, *key, "attribute"):
        attribute = list(ATTRIBUTES)[draw(len(ATTRIBUTES), *key, "which attribute")]
        said[attribute] = ATTRIBUTES[attribute][draw(2, *key, "word")]
    template = TEMPLATES[draw(len(TEMPLATES), *key, "template")]
    text = template.format(phrase(noun, name, list(said.values())))
    if draw(2, *key, "place"):
        text += " " + PLACES[draw(len(PLACES), *key, "which place")]
    return Caption(text, name, said)


def vocabulary(nouns: Sequence[Noun]) -> list[str]:
    """All words that captions may hold, in alphabetical order.

    Args:
        nouns: the classes.

    Raises:
        UserError: one name for two classes.

    Example:
        >>> len(vocabulary(CLOTHES)), vocabulary(CLOTHES)[:4]
        (109, ['a', 'after', 'an', 'ankle'])
    """
    names = [name for noun in nouns for name in noun.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]} names two classes; give each its own names")
    texts = [*names, *QUALITIES, *PLACES, "a an", *(t.format("") for t in TEMPLATES)]
    texts += [word for pair in ATTRIBUTES.values() for word in pair]
    return sorted({word for text in texts for word in split(text)})


def split(text: str) -> list[str]:
    """The words of a caption.

    Example:
        >>> split("A t-shirt, folded")
        ['a', 't-shirt', 'folded']
    """
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())
