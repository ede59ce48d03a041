"""Training a tokenizer: long words are cut, other texts give the merges they always gave."""

from __future__ import annotations

import json
import random
import time

import pytest

from train.data import bpe


def merges(tokenizer) -> list:
    return json.loads(tokenizer.backend.to_str())["model"]["merges"]


@pytest.mark.parametrize("digits", [False, True])
def test_texts_of_short_words_give_the_tokenizer_of_uncut_ones(digits, monkeypatch):
    texts = [f"In {year} the cat of {'abc' * 9} sat, 猫坐在那里。" for year in range(1900, 1960)]
    texts.append("x" * bpe.LONGEST_WORD)
    cut = bpe.train_bpe(texts, 400, digits).backend.to_str()
    monkeypatch.setattr(bpe, "LONGEST_WORD", 10**6)
    assert cut == bpe.train_bpe(texts, 400, digits).backend.to_str()


def test_a_text_without_spaces_takes_time_with_its_length_and_is_encoded_whole():
    draw = random.Random(0)
    text = "".join(chr(0x4E00 + min(int(draw.paretovariate(0.7)), 500)) for _ in range(40_000))
    since = time.process_time()
    tokenizer = bpe.train_bpe([text], 2048)
    assert time.process_time() - since < 2  # 8 s where the word is not cut
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # A token may reach over the places where training cut.
    repeated = bpe.train_bpe(["ab" * 500], 300)
    longest = max(len(repeated.decode([i])) for i in repeated.encode("ab" * 500))
    assert merges(repeated) and longest == bpe.LONGEST_WORD
    assert len(repeated.encode("ab" * bpe.LONGEST_WORD)) == 2
