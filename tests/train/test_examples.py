"""Tokenised examples: prompt prefix, labels, truncation; groups equal separate examples."""

import pytest

from jaxlib_unlearn.errors import UserError
from train.data.examples import LEAF, encode_group, encode_prompt, encode_qa, encode_rows

EOS, BOS, TURN = 1, 2, 3


class Characters:
    """A character tokenizer; `merges` are pairs that become one token, as in BPE."""

    eos_id, bos_id, pad_id = EOS, BOS, EOS

    def __init__(self, template=None, merges=(), add_eos=False):
        self.template, self.merges, self.add_eos = template, merges, add_eos
        self.has_chat_template = template is not None

    def encode(self, text, add_special_tokens=False):
        ids, i = [], 0
        specials = {"<eos>": EOS, "<s>": BOS, "<turn>": TURN}
        while i < len(text):
            special = next((s for s in specials if text.startswith(s, i)), None)
            if special:
                ids.append(specials[special])
                i += len(special)
            elif text[i : i + 2] in self.merges:
                ids.append(1000 + self.merges.index(text[i : i + 2]))
                i += 2
            else:
                ids.append(10 + ord(text[i]))
                i += 1
        if add_special_tokens:
            ids = [BOS, *ids] + ([EOS] if self.add_eos else [])
        return ids

    def decode(self, ids, skip_special_tokens=True):
        text = ""
        for i in ids:
            text += self.merges[i - 1000] if i >= 1000 else chr(i - 10) if i >= 10 else ""
        return text

    def chat(self, messages, add_generation_prompt=False):
        return self.template(messages, add_generation_prompt)


def closed_by_eos(messages, generate):
    text = "<s>" + "".join(f"<turn>{m['role'][0]}\n{m['content']}<eos>" for m in messages)
    return text + ("<turn>a\n" if generate else "")


def closed_by_newline(messages, generate):
    text = "".join(f"<turn>{m['role'][0]}\n{m['content']}<turn>\n" for m in messages)
    return text + ("<turn>a\n" if generate else "")


def rewrites_history(messages, generate):
    """A template whose full text does not start with its generation prompt."""
    text = "".join(f"<turn>{m['role'][0]}\n{m['content']}<eos>" for m in messages)
    return text + ("<turn>a\n<think>" if generate else "")


TOKENIZERS = {
    "tags": Characters(),
    "tags_merging_space": Characters(merges=[": ", ":", " L"]),
    "tags_adding_eos": Characters(add_eos=True),
    "chat_eos": Characters(closed_by_eos),
    "chat_newline": Characters(closed_by_newline),
    "chat_merging_newline": Characters(closed_by_newline, merges=["\nL"]),
    "chat_rewriting": Characters(rewrites_history),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("system_prompt", [None, "Be kind."])
def test_prompt_is_a_prefix_and_labels_are_answer_and_end(tokenizer, system_prompt):
    options = {"system_prompt": system_prompt}
    example = encode_qa(tokenizer, "Where?", "Lima.", max_length=200, **options)
    prompt = encode_prompt(tokenizer, "Where?", **options)
    assert example.tokens[: example.num_prompt] == prompt and example.num_cut == 0
    assert EOS not in prompt[-1:]
    labels = example.tokens[example.num_prompt :]
    assert labels[-1] == EOS and labels[-2] != EOS
    assert tokenizer.decode(labels).strip() == "Lima."
    assert ("Be kind." in tokenizer.decode(prompt)) == (system_prompt is not None)
    assert "Where?" in tokenizer.decode(prompt)


def test_exact_layouts():
    tags = encode_qa(TOKENIZERS["tags"], "q", "a", max_length=99)
    assert tags.tokens[0] == BOS
    assert TOKENIZERS["tags"].decode(tags.tokens) == "Question: q\nAnswer: a"
    chat = encode_qa(TOKENIZERS["chat_eos"], "q", "a", max_length=99)
    assert chat.tokens == TOKENIZERS["chat_eos"].encode("<s><turn>u\nq<eos><turn>a\na<eos>")
    # A turn closed by a newline is labelled as a whole, then EOS (as in OpenUnlearning).
    newline = encode_qa(TOKENIZERS["chat_newline"], "q", "a", max_length=99)
    labels = newline.tokens[newline.num_prompt :]
    assert labels == TOKENIZERS["chat_newline"].encode("a<turn>\n<eos>")


def test_long_examples_are_cut_and_counted(tokenizer):
    whole = encode_qa(tokenizer, "Where?", "Lima and Cusco.", max_length=200)
    limit = whole.num_prompt + 3
    cut = encode_qa(tokenizer, "Where?", "Lima and Cusco.", max_length=limit)
    assert cut.tokens == whole.tokens[:limit]
    assert cut.num_cut == len(whole.tokens) - limit
    with pytest.raises(UserError, match="no label is left") as error:
        encode_qa(tokenizer, "Where?", "Lima.", max_length=whole.num_prompt)
    assert "\n" not in str(error.value)


def test_rows_without_label_are_counted_and_an_error_only_if_all_are():
    tokenizer = TOKENIZERS["tags"]
    rows = [
        {"question": "Where?", "answer": "Lima."},
        {"question": "Where on earth\nwas that?" * 5, "answer": "Lima."},
        {"question": "Who?", "answer": "Nobody that anyone could remember."},
    ]
    encoded = encode_rows(tokenizer, rows, max_length=40)
    assert encoded.row_ids == [0, 2]
    assert (encoded.num_cut, encoded.num_dropped) == (1, 1)
    with pytest.raises(UserError, match="no label is left") as error:
        encode_rows(tokenizer, rows[1:2], max_length=40)
    assert "\n" not in str(error.value)
    assert encode_rows(tokenizer, [], max_length=40).examples == []


def test_a_template_that_opens_a_tag_does_not_open_it_twice():
    """As those of DeepSeek-R1-Distill, whose generation prompt ends in an opened think tag."""

    def opens(messages, generate):
        text = "".join(
            f"<turn>{m['role'][0]}{m['content'].split('</think>')[-1]}" for m in messages
        )
        return text + ("<turn>a<think>\n" if generate else "")

    words = Characters(opens)

    def shown(start):
        return encode_prompt(words, "q", start=start)

    for start in ("<think>", "<think></think>", "<think>\n"):
        assert shown(start) == words.encode(f"<turn>uq<turn>a{start}")
    assert shown("") == words.encode("<turn>uq<turn>a<think>\n")
    assert shown("Hmm") == words.encode("<turn>uq<turn>a<think>\nHmm")
    assert shown("<plan>") == words.encode("<turn>uq<turn>a<think>\n<plan>")
    for answer in ("<think>\nHmm.\n</think>\nFour", "\n<think>Hmm.\n</think>\nFour"):
        example = encode_qa(words, "q", answer, max_length=99)
        text = "<turn>uq<turn>a<think>\nHmm.\n</think>\nFour"
        assert example.tokens == [*words.encode(text), words.eos_id]
        assert example.tokens[: example.num_prompt] == shown("")
    plain = encode_qa(words, "q", "Four", max_length=99)  # the prompt is what the model will see
    assert plain.tokens == [*words.encode("<turn>uq<turn>a<think>\nFour"), words.eos_id]


def test_a_row_with_a_question_is_never_a_document():
    words, row = TOKENIZERS["tags"], {"question": "Where?", "answer": "Lima."}
    plain = encode_rows(words, [row], max_length=99).examples
    for text in ("A note on the row.", None):
        assert encode_rows(words, [row | {"text": text}], max_length=99).examples == plain
    assert encode_rows(words, [{"text": "A book."}], max_length=99).examples != plain
    with pytest.raises(UserError, match="question 'Where"):
        encode_rows(words, [row | {"text": "A note."}], max_length=4)


def test_rows_take_other_columns():
    rows = [{"paraphrased_question": "Q?", "paraphrased_answer": "A."}]
    encoded = encode_rows(
        TOKENIZERS["tags"],
        rows,
        question="paraphrased_question",
        answer="paraphrased_answer",
        max_length=99,
    )
    assert encoded.examples[0] == encode_qa(TOKENIZERS["tags"], "Q?", "A.", max_length=99)


def visible(group, slot):
    """What a query at `slot` sees by the decoder's rule for segment ids, as (position, token)."""
    leaf = group.segment_ids[slot] // LEAF
    return [
        (group.positions[k], group.tokens[k])
        for k in range(slot + 1)
        if group.segment_ids[k] % LEAF == group.segment_ids[slot] % LEAF
        and group.segment_ids[k] // LEAF in (0, leaf)
    ]


@pytest.mark.parametrize("max_length", [200, 45])
def test_group_sees_what_each_example_sees(tokenizer, max_length):
    answers = ["Lima.", "L", "Quito or so.", "Lima."]
    group = encode_group(tokenizer, "Where?", answers, max_length=max_length)
    assert len(group.tokens) == len(group.positions) == len(group.segment_ids)
    labels = list(zip(group.answer, group.label_index, group.targets, strict=True))
    for j, answer in enumerate(answers):
        example = encode_qa(tokenizer, "Where?", answer, max_length=max_length)
        mine = [(slot, target) for owner, slot, target in labels if owner == j]
        assert [target for _, target in mine] == example.tokens[example.num_prompt :]
        assert mine[0][0] == example.num_prompt - 1
        for w, (slot, _) in enumerate(mine):
            assert visible(group, slot) == list(enumerate(example.tokens[: example.num_prompt + w]))
    separate = sum(
        len(encode_qa(tokenizer, "Where?", a, max_length=max_length).tokens) for a in answers
    )
    assert len(group.tokens) < separate


def test_group_errors():
    with pytest.raises(ValueError, match="at least one answer"):
        encode_group(TOKENIZERS["tags"], "q", [], max_length=9)
    with pytest.raises(UserError, match="no label is left"):
        encode_group(TOKENIZERS["tags"], "a long question", ["a"], max_length=9)
