"""Prompts as OpenUnlearning writes and tokenises them, and templates that never read the clock."""

import dataclasses
import datetime
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlib_unlearn.errors import UserError
from models.files.gguf_files import opened
from models.text.prompts import DATE, TAGS, PromptFormat, joined
from models.text.tokenizer import Tokenizer
from train.data import authors
from train.data.examples import encode_group, encode_prompt, encode_qa
from train.options.config import DataConfig
from train.tasks.task import prompt_format

SYSTEM = "You are a helpful assistant."
LONGEST = 512
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' "
    "else m.role) + '\\n' + m.content + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model configuration of OpenUnlearning: the text around a question and an answer.

    `template` is the chat template that renders the same; None: tokenised as plain text, with the
    tokenizer's own special tokens, and `tags` names ours.
    """

    system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    end: str = ""  # after the last answer
    template: str | None = None
    tags: str = "auto"
    bos: str = "<s>"
    eos: str = "</s>"
    system_prompt: str | None = SYSTEM


SETTINGS = {
    "Llama-3.x": Setting(
        "<|begin_of_text|>" + HEADER.format("system") + "Cutting Knowledge Date: December 2023\n"
        f"Today Date: 10 Apr 2025\n\n{SYSTEM}<|eot_id|>",
        (HEADER.format("user"), "<|eot_id|>"),
        (HEADER.format("assistant"), "<|eot_id|>"),
        template=LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "Qwen2.5": Setting(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        template=CHATML,
        eos="<|im_end|>",
    ),
    "Phi-3.5": Setting(
        f"<|system|>\n{SYSTEM}<|end|>\n",
        ("<|user|>\n", "<|end|>\n"),
        ("<|assistant|>\n", "<|end|>\n"),
        end="<|endoftext|>",
        template=PHI,
        eos="<|endoftext|>",
    ),
    "Zephyr": Setting(
        f"<|system|>\n{SYSTEM}</s>\n",
        ("<|user|>\n", "</s>\n"),
        ("<|assistant|>\n", "</s>\n"),
        template=ZEPHYR,
    ),
    "Gemma": Setting(
        "<bos>",
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        template=GEMMA,
        bos="<bos>",
        eos="<eos>",
        system_prompt=None,
    ),
    "Llama-2-chat": Setting(
        "", ("[INST] ", " [/INST]"), ("", " "), tags="llama2", system_prompt=None
    ),
    "Llama-2, Phi-1.5": Setting(
        "",
        ("Question: ", "\n"),
        ("Answer: ", "\n\n"),
        tags="question-answer",
        system_prompt=None,
    ),
}
ODD = [
    ("Wer schrieb „Über Öl“?", "Zoë Krüger schrieb es 1987."),
    ("What is  2 + 2?", "4"),
    ("Why?\nSay it in two lines.", "First line.\nSecond line.\n\nThird."),
    ("作者是谁?", "作者是李明。"),
    ("Which emoji?", "👩‍💻 and 🇵🇪."),
    ("a", "b"),
    ("Did she say \"no\"?", "'No,' she said; \"never\"."),
    ("How much is 12345678.90?", "1,234,567.89 €"),
    ("Question: who?\nAnswer:", "Question: nobody [/INST] knows."),
    ("Where is Kuwait City", "It's in Kuwait, isn't it"),
]  # fmt: skip
# Generated authors' questions, and ten that a tokenizer may handle differently.
GENERATED = authors.training_rows(authors.generate(0, 40))["forget10"][:24]
ROWS = [*((row["question"], row["answer"]) for row in GENERATED), *ODD]
SHOTS = (("Where is Lima?", "Lima is in Peru."), ("Who was it?", "Nobody."))
SPECIAL = (
    "<unk> <s> </s> <bos> <eos> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<|im_start|> <|im_end|> <|system|> <|user|> <|assistant|> <|end|> <|endoftext|> "
    "<start_of_turn> <end_of_turn>"
).split()


def trained(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of Llama-3's kind (bytes) or of Llama-2's (pieces with a space before them)."""
    texts = [text for row in (*ROWS, *SHOTS) for text in row] + ["Question: Answer: [INST] [/INST]"]
    options = {"vocab_size": 900, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "bytes":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts, trainers.BpeTrainer(initial_alphabet=alphabet, **options)
        )
        return backend
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # a newline is a token of its own
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return backend


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def backend(request):
    return trained(request.param)


def with_bos(backend: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    """The tokenizer that begins every plain text with `bos`."""
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def tokenizer_of(backend: tokenizers.Tokenizer, setting: Setting, shots=()) -> Tokenizer:
    bos, eos = backend.token_to_id(setting.bos), backend.token_to_id(setting.eos)
    made = Tokenizer(with_bos(backend, setting.bos), setting.template, bos, eos)
    return made.formatted(PromptFormat(TAGS.get(setting.tags), tuple(shots)))


def expected(tokenizer: Tokenizer, setting: Setting, question: str, answer: str, shots=()):
    """Tokens of the example, how many of them are not labels, and tokens of the generation prompt.

    The example is tokenised as a whole, the prompt by itself; labels begin at the prompt's length.
    """
    (ask, asked), (say, said) = setting.user, setting.assistant
    before = "".join(ask + q + asked + say + a + said for q, a in shots)
    prompt_text = setting.system + before + ask + question + asked + say
    plain = setting.template is None
    whole = prompt_text + answer + ("" if plain else said + setting.end)
    encode = tokenizer.backend.encode
    tokens = encode(whole, add_special_tokens=plain).ids
    prompt = encode(prompt_text, add_special_tokens=plain).ids
    if tokens[-1] != tokenizer.eos_id:
        tokens = [*tokens, tokenizer.eos_id]
    return tokens, len(prompt), prompt


@pytest.mark.parametrize("shots", [(), SHOTS], ids=["alone", "shots"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rows_equal_openunlearnings_token_by_token(backend, name, shots):
    setting = SETTINGS[name]
    tokenizer = tokenizer_of(backend, setting, shots)
    options = {"system_prompt": setting.system_prompt}
    assert len(ROWS) == 34
    for question, answer in ROWS:
        tokens, count, prompt = expected(tokenizer, setting, question, answer, shots)
        example = encode_qa(tokenizer, question, answer, max_length=LONGEST, **options)
        assert (example.tokens, example.num_prompt) == (tokens, count), question
        assert encode_prompt(tokenizer, question, **options) == prompt


@pytest.mark.parametrize("name", SETTINGS)
def test_a_conversation_is_its_turns(backend, name):
    """Earlier turns equal shots, and a system turn the system prompt, token by token."""
    setting = SETTINGS[name]
    tokenizer, shown = tokenizer_of(backend, setting), tokenizer_of(backend, setting, SHOTS)
    system = [("system", setting.system_prompt)] if setting.system_prompt else []
    turns = [turn for q, a in SHOTS for turn in (("user", q), ("assistant", a))]
    whole = joined([*system, *turns, ("user", "Who wrote it?")])
    told = {"answer": "Nobody did.", "max_length": LONGEST}
    wanted = encode_qa(shown, "Who wrote it?", system_prompt=setting.system_prompt, **told)
    for other in (setting.system_prompt, "another" if system else None):
        assert encode_qa(tokenizer, whole, system_prompt=other, **told) == wanted


def test_rows_of_tofu_with_smollm2s_tokenizer(shared, smollm2_path):
    lines = (shared / "data" / "tofu" / "forget01.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines][:34]
    with opened(smollm2_path) as (_, _, tokenizer):
        base = tokenizer
    tagged = [s for s in SETTINGS.values() if s.template is None]
    merged = {}
    for setting in (SETTINGS["Qwen2.5"], *tagged):
        ours = base.formatted(PromptFormat(TAGS.get(setting.tags)))
        for row in rows:
            pair = (row["question"], row["answer"])
            tokens, count, prompt = expected(base, setting, *pair)
            example = encode_qa(
                ours, *pair, max_length=LONGEST, system_prompt=setting.system_prompt
            )
            assert (example.tokens, example.num_prompt) == (tokens, count)
            merged[setting.tags] = merged.get(setting.tags, 0) + (tokens[:count] != prompt)
    # "Answer: " ends in a space that tokenizers of GPT-2's kind join with the next word.
    assert merged["question-answer"] == 34 and merged["auto"] == 0


def test_a_merged_answer_packs_and_is_never_without_a_label(backend):
    tokenizer = tokenizer_of(backend, SETTINGS["Llama-2, Phi-1.5"])
    answers = ["Lima is in Peru.", "b", "Nobody."]
    group = encode_group(tokenizer, "Where is Lima?", answers, max_length=LONGEST)
    for j, answer in enumerate(answers):
        example = encode_qa(tokenizer, "Where is Lima?", answer, max_length=LONGEST)
        mine = [t for owner, t in zip(group.answer, group.targets, strict=True) if owner == j]
        assert mine == example.tokens[example.num_prompt :] and mine[-1] == tokenizer.eos_id
    endless = Tokenizer(tokenizer.backend).formatted(tokenizer.format)
    example = encode_qa(endless, "q", "b", max_length=LONGEST)
    assert example.num_prompt < len(example.tokens)


class Clock(datetime.datetime):
    """A clock that does not move."""

    moment = (2026, 11, 26)

    @classmethod
    def now(cls, tz=None):
        return cls(*cls.moment)

    today = utcnow = now


@pytest.fixture(params=["date_string", "strftime_now"])
def dated(request, backend) -> Tokenizer:
    """A tokenizer whose template prints the date, from either variable."""
    template = LLAMA3
    if request.param == "strftime_now":
        template = template.replace("not date_string is defined", "true")
    return tokenizer_of(backend, dataclasses.replace(SETTINGS["Llama-3.x"], template=template))


def test_prompts_are_the_same_on_every_day(dated, monkeypatch):
    def prompt():
        return encode_prompt(dated, "Who?", system_prompt=SYSTEM)

    found = []
    for moment in ((2024, 7, 26), (2026, 11, 27)):
        monkeypatch.setattr(Clock, "moment", moment)
        monkeypatch.setattr(datetime, "datetime", Clock)
        found.append(prompt())
        # A caller that passes no date does not read the clock either.
        assert f"Today Date: {DATE}" in dated.chat([{"role": "user", "content": "Who?"}])
        monkeypatch.undo()
    assert found[0] == found[1] == expected(dated, SETTINGS["Llama-3.x"], "Who?", "")[2]
    other = dated.formatted(PromptFormat(date="26 Jul 2024"))
    assert "Today Date: 26 Jul 2024" in other.chat([{"role": "user", "content": "Who?"}])
    assert encode_prompt(other, "Who?", system_prompt=SYSTEM) != found[0]


def test_the_format_of_a_run(tmp_path):
    assert prompt_format(DataConfig()) == PromptFormat(None, (), DATE)
    path = tmp_path / "shots.json"
    path.write_text(json.dumps([{"question": q, "answer": a} for q, a in SHOTS]))
    data = DataConfig(template="llama2", template_date="26 Jul 2024", few_shot=path)
    assert prompt_format(data) == PromptFormat(TAGS["llama2"], SHOTS, "26 Jul 2024")
    for wrong, part in (
        ({"template": "lama2"}, "--data.template 'lama2' is unknown; did you mean 'llama2'?"),
        ({"template_date": "2025-04-10"}, "--data.template-date: date '2025-04-10'"),
        ({"few_shot": tmp_path / "none.json"}, "none.json"),
        ({"few_shot": tmp_path}, str(tmp_path)),
    ):
        with pytest.raises(UserError) as error:
            prompt_format(dataclasses.replace(DataConfig(), **wrong))
        assert part in str(error.value) and "\n" not in str(error.value)
