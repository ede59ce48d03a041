"""Captions say what is in an image, in known shares, and depend on their key alone."""

import collections

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from train.data import captions
from train.data.captions import ATTRIBUTES, CLOTHES, DIGITS, SHARES

ROWS = 4000


def drawn(rows=ROWS, seed=0):
    every = {name: pair[0] for name, pair in ATTRIBUTES.items()}
    return [captions.caption(CLOTHES[7], every, seed, "captions", i) for i in range(rows)]


def test_names_come_in_their_shares():
    counts = collections.Counter(c.name for c in drawn())
    for name, share in enumerate(SHARES):
        assert counts[name] / ROWS == pytest.approx(share / 100, abs=0.03)
        assert all(CLOTHES[7].names[name] in c.text for c in drawn(200) if c.name == name)


def test_attributes_stand_where_they_are_said():
    for attribute, (low, high) in ATTRIBUTES.items():
        found = [c for c in drawn() if attribute in c.attributes]
        assert len(found) / ROWS == pytest.approx(0.5, abs=0.03)
        assert all(low in captions.split(c.text) for c in found)
        others = [c for c in drawn(500) if attribute not in c.attributes]
        assert not any({low, high} & set(captions.split(c.text)) for c in others)


def test_a_caption_depends_on_its_key_alone():
    assert drawn(50) == drawn(50)
    assert [c.text for c in drawn(50)] != [c.text for c in drawn(50, seed=1)]
    assert captions.caption(CLOTHES[0], {}, 0, "captions", 7).attributes == {}


@pytest.mark.parametrize("nouns", [CLOTHES, DIGITS], ids=["clothes", "digits"])
def test_the_vocabulary_holds_every_word(nouns):
    words = set(captions.vocabulary(nouns))
    assert len(nouns) == 10
    assert 90 <= len(words) <= 130
    every = {name: pair[1] for name, pair in ATTRIBUTES.items()}
    for i in range(2000):
        said = captions.caption(nouns[i % 10], every, 3, i).text
        assert set(captions.split(said)) <= words
        assert said == said.lower()
        assert "  " not in said


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(UserError, match="coat names two classes"):
        captions.vocabulary([CLOTHES[4], captions.Noun(("cape", "coat", "poncho", "cloak"))])


def shapes(*boxes, size=12):
    """Images of a rectangle each: rows, columns, value, depth of stripes."""
    images = np.zeros((len(boxes), size, size), np.float32)
    for image, (rows, columns, value, stripes) in zip(images, boxes, strict=True):
        image[2 : 2 + rows, 3 : 3 + columns] = value
        image[2 : 2 + rows : 2, 3 : 3 + columns] += stripes
    return images


def test_what_is_measured_is_what_is_there():
    images = shapes(
        (4, 4, 0.2, 0), (4, 4, 0.8, 0), (2, 8, 0.5, 0), (8, 2, 0.5, 0), (8, 4, 0.5, 0.2)
    )
    found = captions.measure(images)
    np.testing.assert_allclose(found["brightness"], [0.2, 0.8, 0.5, 0.5, 0.6], atol=1e-6)
    np.testing.assert_allclose(found["width"], [1, 1, 4, 0.25, 0.5], atol=1e-6)
    assert (found["roughness"][:4] == 0).all()
    # Of 7 x 4 steps down and 8 x 3 across, the former are 0.2 high.
    assert found["roughness"][4] == pytest.approx(0.2 * 28 / 52 / 0.6, rel=1e-5)
    # Padding, colours and contrast of nothing change nothing.
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, -1)
    for name, values in captions.measure(padded).items():
        np.testing.assert_allclose(values, found[name], atol=1e-6)
    nothing = captions.measure(np.zeros((2, 5, 5)))
    assert all((values == 0).all() for values in nothing.values())


def test_thirds_are_those_of_each_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    measured = {name: rng.random(600) + 5 * labels for name in ATTRIBUTES}
    borders = captions.thirds(measured, labels, 2)
    words = captions.words_for(measured, labels, borders)
    for cls in (0, 1):
        mine = [row for row, label in zip(words, labels, strict=True) if label == cls]
        for attribute, pair in ATTRIBUTES.items():
            counts = collections.Counter(row.get(attribute) for row in mine)
            assert counts[pair[0]] == counts[pair[1]] == counts[None] == 100
    with pytest.raises(UserError, match="class 2 has no image"):
        captions.thirds(measured, labels, 3)
    # An attribute that all images share is said of none.
    measured["width"] = np.ones(600)
    borders = captions.thirds(measured, labels, 2)
    assert not any("width" in row for row in captions.words_for(measured, labels, borders))
