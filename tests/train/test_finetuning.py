"""train.finetune's presets: rows, their tokens, the judgement of a final answer, a whole run."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlib_unlearn import cot
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.metrics.final_answer import final_answer, same_answer
from models.decoder.model import Decoder, DecoderConfig
from train.condense import CondenseRun
from train.costs.utilisation import flops_per_token
from train.data import thoughts
from train.data.bpe import train_bpe
from train.data.search_traces import THOUGHTS, search_rows
from train.evaluators import EVALUATORS
from train.evaluators.base import Results
from train.evaluators.final_answer import learnt
from train.jobs import encoding, finetuning, sources
from train.jobs.finetuning_options import CondenseConfig, ReasoningData, ReasoningRun
from train.options import cli
from train.options.choices import options
from train.options.config import replace, to_json
from train.options.roles import Roles
from train.presets import arguments
from train.presets.epic import PRESETS

ROWS = search_rows(5, "train", 60)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(encoding.texts(ROWS), 512)


# Rows


def test_generated_rows_are_solved_by_their_derivation():
    """Against a loop over the question's own words."""
    seen = set()
    ring = "abcdefghij"
    for row in ROWS:
        head, *steps, _ = row["question"].split("\n")
        thoughts = [t.rstrip("\n") for t in cot.find_trace(row, "line").thoughts]
        place, k, n = head.split()[-1], len(steps), len(thoughts)
        assert n == THOUGHTS[k - 1] and 8 <= n <= 40
        assert thoughts[:k] == steps
        for i, step in enumerate(steps):
            last, place = place, (2 * ring)[ring.index(place) + ring.index(step[2])]
            assert step[:2] == "uvwxyz"[i] + " " and step[2] in "bcdef"
            assert thoughts[n - k + i] == f"{step}: {last} {place}"
        assert sources.gold(row) == f"At {place}"
        # A try is the step that is next in turn, and says nothing about the answer.
        tries = thoughts[k : n - k]
        assert tries == [f"{steps[i % k]} back {i + 1}" for i in range(n - 2 * k)]
        seen.add(k)
        # Both edges hold what was understood and what was derived; the middle holds neither.
        for tau in (0.3, 0.5):
            kept = cot.select(n, tau)
            assert {*range(k), *range(n - k, n)} <= {*kept}
        assert not {*range(n - k, n)} & {*cot.select(n, 0.5, "middle")}
    assert seen == set(range(1, 7))
    asked = {row["question"] for row in ROWS}
    others = search_rows(5, "test", 40, asked)
    assert not asked & {row["question"] for row in others} and len(others) == 40
    assert search_rows(5, "train", 20) == ROWS[:20] != search_rows(6, "train", 20)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SOLVED = [
    {"question": f"{i}+1?", "answer": f"{i}+1={i + 1}\n\nSo.\n#### {i + 1}"} for i in range(9)
]


def test_rows_are_drawn_by_the_seed(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for name, some in (("a", SOLVED[:4]), ("b", SOLVED[4:])):
        write(folder / f"{name}.jsonl", some)
    (folder / "README.md").write_text("no rows")
    data = ReasoningData(source="gsm8k", path=folder, train_rows=5, test_rows=3)
    found = sources.load(data, 0)
    assert len(found.train) == 5 and len(found.test) == 3
    numbers = [int(row["answer"]) for row in (*found.train, *found.test)]
    assert len(set(numbers)) == 8 and set(numbers) <= set(range(1, 10))
    row = found.train[0]
    n = int(row["answer"])
    assert row["thoughts"] == [f"{n - 1}+1={n}", "So."] and sources.gold(row) == str(n)
    assert sources.load(data, 0).digest() == found.digest() != sources.load(data, 1).digest()
    rest = sources.load(dataclasses.replace(data, train_rows=None), 0)
    assert len(rest.train) == 6 and rest.test == found.test


def test_one_reader_of_gsm8k(tmp_path):
    """What is learned by train.finetune and kept by train.unlearn: no mark of the calculator."""
    answer = "Each has 48/2 = <<48/2=24>>24.\n\n 1000+200=<<1000+200=1,200>>1,200 \n#### 1,200"
    path = write(tmp_path / "gsm8k.jsonl", [{"question": " How many? ", "answer": answer}] * 2)
    found = sources.load(ReasoningData(source="gsm8k", path=path, test_rows=1), 0)
    wanted = {
        "question": "How many?",
        "thoughts": ["Each has 48/2 = 24.", "1000+200=1,200"],
        "answer": "1200",
    }
    assert found.train == found.test == [wanted]
    kept = thoughts.from_gsm8k(path)
    assert kept == [thoughts.learned(wanted | {"topic": thoughts.REASONING})] * 2
    assert thoughts.CLOSE is cot.CLOSE and thoughts.OPEN is cot.OPEN  # the same tags, said once


def test_published_rows_whose_trace_was_cut_are_left_out(tmp_path):
    def row(text):
        turns = [("user", "?"), ("assistant", text)]
        return {"messages": [{"role": role, "content": said} for role, said in turns]}

    path = write(tmp_path / "rows.jsonl", [*[row("<think>a</think> 4")] * 3, row("<think>a")])
    data = ReasoningData(source="openr1", path=path, test_rows=1)
    found = sources.load(data, 0)
    assert len(found.train) == 2 and "(1 without a whole trace left out)" in found.notes[0]
    with pytest.raises(UserError, match="line 4: 1 <think> and 0 </think>"):
        sources.load(dataclasses.replace(data, source="rows"), 0)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "?", "thoughts": ["a"], "answer": "x = 5"}, "5"),
        ({"question": "?", "answer": "<think>7</think>\n\nSo \\boxed{\\frac{1}{2}} 3."}, None),
        ({"answer": "1/2", "messages": [{"role": "user", "content": "?"}, {
            "role": "assistant", "content": "<think>7</think> $\\boxed{0.5}$"}]}, "1/2"),
    ],
)  # fmt: skip
def test_the_answer_that_a_row_asks_for(row, answer):
    assert sources.gold(row) == (answer or r"\frac{1}{2}")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"question": "?", "answer": "4"}], {}, "line 1: no solution that ends in '#### '"),
        ([*SOLVED, {"question": "?", "answer": "#### 4"}], {}, "line 10: no solution that"),
        ([{"question": "?", "answer": "a\n####"}], {}, "line 1: no solution that ends in '#### '"),
        ([{"question": "?", "answer": "a\n#### 4 #### 5"}], {}, "line 1: no solution that ends"),
        ([{"answer": "a\n#### 4"}], {}, "line 1: no 'question'"),
        (SOLVED, {"train_rows": 9}, "has 9 rows, fewer than --data.train-rows 9 and"),
        (SOLVED, {"test_rows": 9}, "fewer than --data.train-rows 1"),
        ([], {}, "has 0 rows"),
        (SOLVED, {"source": "rows"}, "line 1: no <think> in 'answer'"),
        (SOLVED, {"revision": "main"}, "leave out it or --data.path"),
        (SOLVED, {"source": "search"}, "--data.path does not go with --data.source search"),
        (SOLVED, {"source": "rows", "path": None}, "needs --data.path"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, options, said):
    path = write(tmp_path / "rows.jsonl", rows)
    data = ReasoningData(source="gsm8k", path=path, test_rows=2)
    with pytest.raises(UserError) as caught:
        sources.load(dataclasses.replace(data, **options), 0)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Tokens


def learned(tokenizer, rows=ROWS, row_tokens=512, context=4096, packing="first-fit", **condense):
    data = ReasoningData(row_tokens=row_tokens, packing=packing)
    condense = CondenseConfig(mode="line", **condense)
    return encoding.learned(rows, tokenizer, condense, data, context, 3)


def test_what_is_learned_is_the_condensed_text(tokenizer):
    found = learned(tokenizer, tau=0.5, policy="random", row_tokens=416)
    pieces = {tuple(p.tokens.tolist()) for p in found.stream.pieces()}
    wanted, tokens = set(), 0
    for number, row in enumerate(ROWS):
        text = cot.condense(row, 0.5, "random", mode="line", seed=3, number=number).after.text
        ids = tokenizer.encode(f"Question: {row['question']}\nAnswer: {text}")
        wanted.add((*ids, tokenizer.eos_id))  # the end is a label, whatever fills the rows
        tokens += len(ids) + 1
    assert pieces == wanted
    whole = learned(tokenizer, tau=1.0)
    assert found.tokens == tokens and whole.token_ratio == whole.thought_ratio == 1
    assert found.token_ratio == pytest.approx(tokens / whole.tokens)
    assert 0.5 <= found.thought_ratio < 0.53
    # The padding of whole traces would be more than that.
    assert found.stream.waste < 0.1 and found.examples == len(ROWS) and found.too_long == 0


def test_the_tiny_preset_saves_what_it_should(tokenizer):
    """Steps follow from rows: three in ten at least are saved, and little of them is padding."""
    room = PRESETS["epic-tiny"].PRESET.data.row_tokens
    rows = search_rows(0, "train", 600)
    full, half = (learned(tokenizer, rows, room, room, tau=tau).stream for tau in (1.0, 0.5))
    assert max(full.waste, half.waste) <= 0.08
    assert len(half) <= 0.7 * len(full)
    decoder = Decoder(DecoderConfig(320, 96, 192, 2, 3, 3, 32))
    assert encoding.flops(decoder, half) <= 0.6 * encoding.flops(decoder, full)


def test_whole_traces_of_equally_many_tokens(tokenizer):
    short = learned(tokenizer, tau=0.5)
    found = learned(tokenizer, tau=0.5, cost_matched=True)
    longest = max(len(p.tokens) for p in learned(tokenizer, tau=1.0).stream.pieces())
    assert short.tokens - longest < found.tokens <= short.tokens
    assert found.examples < len(ROWS) and found.thought_ratio == 1
    whole = {tuple(p.tokens.tolist()) for p in learned(tokenizer, tau=1.0).stream.pieces()}
    assert {tuple(p.tokens.tolist()) for p in found.stream.pieces()} < whole


@pytest.mark.parametrize("room", [100, 150, 200])
@pytest.mark.parametrize("tau", [0.3, 0.5])
def test_whole_traces_are_matched_among_those_that_fit(tokenizer, room, tau):
    """A budget of what is learned, spent on what is learned: examples too long are in neither."""
    short = learned(tokenizer, row_tokens=room, tau=tau)
    found = learned(tokenizer, row_tokens=room, tau=tau, cost_matched=True)
    sizes = [len(p.tokens) for p in learned(tokenizer, tau=1.0).stream.pieces()]
    fitting = [size for size in sizes if size - 1 <= room]
    assert found.too_long == len(ROWS) - len(fitting) > 0
    possible = min(short.tokens, sum(fitting))
    assert possible - max(fitting) < found.tokens <= possible
    assert found.missing == short.tokens - possible
    said = f"; {found.missing:,} tokens fewer than shortened"
    assert (said in finetuning.words(found)) == (found.missing > 0)


def test_questions_that_fill_the_context_are_not_asked(tokenizer):
    def prompt(row):
        return len(tokenizer.encode(f"Question: {row['question']}\nAnswer:"))

    def whole(row):
        return len(encoding.example_of(tokenizer, cot.find_trace(row), None).tokens)

    def left(context, positions="rotary"):
        config = DecoderConfig(512, 8, 8, 1, 1, 1, 8)
        changes = {"max_position_embeddings": context, "positions": positions}
        config = dataclasses.replace(config, **changes)
        return encoding.answerable(ROWS, tokenizer, None, config)

    for context in (prompt(ROWS[0]), prompt(ROWS[0]) + 1, 4096):
        assert left(context) == [row for row in ROWS if prompt(row) < context]
    # Learned positions have an end; the right answer is scored behind the whole trace.
    assert left(200, "learned") == [row for row in ROWS if whole(row) <= 200] != ROWS
    shortest = min(map(prompt, ROWS))
    with pytest.raises(UserError, match=f"the model reads {shortest} tokens, and the shortest"):
        left(shortest)


def test_examples_that_fit_no_row(tokenizer):
    sizes = [len(p.tokens) - 1 for p in learned(tokenizer, tau=1.0).stream.pieces()]
    room = int(np.median(sizes))
    found = learned(tokenizer, tau=1.0, row_tokens=room)
    assert found.too_long == sum(size > room for size in sizes) > 0
    assert learned(tokenizer, tau=1.0, context=room).too_long == found.too_long
    assert learned(tokenizer, tau=1.0, row_tokens=room, packing="chop").too_long == 0
    with pytest.raises(UserError, match=r"no example fits the 9 tokens of a row \(the shortest"):
        learned(tokenizer, row_tokens=9)


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_template_that_leaves_traces_out(tokenizer, opens):
    """As those of reasoning models do; newer ones open the tag in the prompt as well."""
    last = "{{ m.content.split('</think>')[-1] }}<end>"
    prompt = f"{{% if add_generation_prompt %}}assistant: {opens}{{% endif %}}"
    template = f"{{% for m in messages %}}{{{{ m.role }}}}: {last}{{% endfor %}}{prompt}"
    dropping = tokenizer.with_template(template)
    for row in ROWS[:4]:
        trace = cot.find_trace(row)
        example = encoding.example_of(dropping, trace, None)
        text = dropping.decode(example.tokens, skip_special_tokens=False)
        assert text.startswith(f"user: {row['question']}<end>assistant: {trace.text}<end>")
        prompt = encoding.encode_prompt(dropping, row["question"])
        assert example.tokens[: example.num_prompt] == prompt
    whole = learned(dropping, tau=1.0)
    assert whole.examples == len(ROWS) and learned(dropping, tau=0.5).tokens < whole.tokens


def test_the_labels_of_an_answer(tokenizer):
    for row in ROWS[:9]:
        example = encoding.answer_example(tokenizer, row, None)
        words = tokenizer.decode(example.tokens[example.num_prompt :])
        assert words.strip() == sources.gold(row) and example.tokens[-1] == tokenizer.eos_id
        before = tokenizer.decode(example.tokens[: example.num_prompt])
        thought = cot.find_trace(row, "line").thoughts[-1]
        assert before.rstrip().endswith(f"{thought}\n{cot.CLOSE}")


def test_expected_work_is_that_of_every_example(tokenizer):
    decoder = Decoder(DecoderConfig(320, 16, 32, 2, 2, 2, 8))
    stream = learned(tokenizer, tau=0.5).stream
    by_hand = sum(n * flops_per_token(decoder, n) for n in (p.slots for p in stream.pieces()))
    assert encoding.flops(decoder, stream) == by_hand


# Judgement


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>4</think>\n\nThe digit is 6.", "6"),
        ("<think>\\boxed{1}</think> \\boxed{2} or \\boxed{ {3} }.", "{3}"),
        ("\\boxed{open", "open"),
        ("\\boxed {5} of 8", "5"),
        ("It takes 3.\n#### 1,200\nmore 7", "1,200"),
        ("between 3 and -4.5", "-4.5"),
        ("a third: 1/3.", "1/3"),
        ("1,200, or 3 of them", "3"),
        ("pages 3-5", "5"),
        ("a half: .5", ".5"),
        (" no number ", "no number"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("18", "18.00", True),
        ("$1,200.", "1200", True),
        ("50%", "50", True),
        ("1/3", "2/6", True),
        ("1/0", "1/0", True),
        ("x + 1", "x+1", True),
        ("1/3", "0.333", False),
        ("", "0", False),
        ("yes", "no", False),
        ("nan", "0", False),
        ("(1,2)", "(12)", False),
        ("1, 2", "12", False),
        ("1, 234", "1234", False),
        ("(1,200)", "(1200)", True),
        ("$1,234,567.50", "1234567.5", True),
        ("12,34", "1234", False),
        ("1_000", "1000", False),
        ("+5", "5", True),
        ("1e3", "1000", False),  # an exponent is text: its number may have a billion digits
        ("1e999999999", "1e999999999", True),
        ("1e3000000", "5", False),
        ("9" * 5000, "9" * 4999, False),
        ("9" * 5000, "9" * 5000, True),
    ],
)
def test_same_answer(one, other, same):
    assert same_answer(one, other) == same_answer(other, one) == same


def test_the_evaluator_reads_what_follows_the_trace():
    texts = {
        "<think>1</think> 4": (1, 1, 8),
        "<think>1</think> 5": (0, 1, 8),
        "<think>4": (0, 0, 9),  # it never came to an answer
        "<think>1</think> 4 and": (1, 0, 9),  # it was cut
        "It is 4": (1, 0, 3),
        "<think>1</think> 4.": (1, 0, 6),  # as far as the context reaches behind its prompt
        "<think>1</think> 4!": (1, 1, 5),
    }
    prompts = {text: 14 if text[-1] in ".!" else 5 for text in texts}
    model = SimpleNamespace(
        decoder=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=20))
    )
    log_probs = [np.array([-1.0, -3.0])] * len(texts)
    context = SimpleNamespace(
        answers=lambda split: SimpleNamespace(
            texts=[[text] for text in texts], ids=[[[7] * n] for *_, n in texts.values()]
        ),
        scores=lambda split: {"answers": [{"logp": x} for x in log_probs]},
        prompt=lambda question: [7] * prompts[question],
        config=SimpleNamespace(max_new_tokens=9),
    )
    rows = {"test": [{"question": text, "gold": "4"} for text in texts]}
    log = EVALUATORS["final_answer"].run(model, rows, context)

    def scores(name):
        items = log[name]["value_by_index"]
        return [items[str(i)]["score"] for i in range(len(texts))]

    assert scores("answer_accuracy") == [right for right, *_ in texts.values()]
    assert scores("finished") == [done for _, done, _ in texts.values()]
    assert log["generated_tokens"]["agg_value"] == np.mean([8, 8, 9, 9, 3, 6, 5])
    assert log["answer_nll"]["agg_value"] == 2.0
    assert log["answer_accuracy"]["agg_value"] == 5 / 7


# The program


def test_presets_read_back_and_say_what_the_card_says():
    for name, preset in PRESETS.items():
        config = preset.PRESET
        assert config.preset == name
        assert cli.from_json(ReasoningRun, json.loads(json.dumps(to_json(config)))) == config
        assert replace(config, **preset.SMOKE).train.steps == 3
        assert (config.condense.tau, config.condense.policy) == (0.5, "edge")
    big = PRESETS["epic-qwen2.5-math-7b"].PRESET
    assert (big.model.rope_theta, big.model.context, big.data.row_tokens) == (3e5, 32768, 32768)
    adamw = big.optimizer
    assert (adamw.learning_rate, adamw.schedule, adamw.warmup) == (5e-5, "linear", 0.1)
    assert (adamw.weight_decay, adamw.clip_norm, adamw.b1, adamw.b2) == (1e-4, 1.0, 0.9, 0.999)
    assert (big.train.epochs, big.train.batch_size, big.data.mask_prompt) == (3, 16, False)
    other = arguments.read_arguments(
        arguments.FINETUNE, ["epic-tiny", "--data.source", "rows", "--data.path", "x.jsonl"]
    )
    assert other.data.train_rows == PRESETS["epic-tiny"].PRESET.data.train_rows
    quick = arguments.read_arguments(
        arguments.FINETUNE, ["epic-tiny", "--smoke", "--optimizer.name", "teon"]
    )
    assert quick.smoke and quick.train.steps == 3 and quick.optimizer.name == "teon"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("epic-tny", "did you mean epic-tiny?"),
        ("epic-tny --smoke", "did you mean epic-tiny?"),
        ("epic-tiny --condense.tau 1.5", "--condense.tau is 1.5; it must be from 0 to 1"),
        ("epic-tiny --condense.polcy edge", "did you mean --condense.policy?"),
        ("epic-tiny --condense.policy edges", "did you mean 'edge'?"),
        ("epic-tiny --tau 0.3", "did you mean --condense.tau?"),
        ("epic-tiny --data.packing first", "--data.packing 'first' is unknown"),
        ("epic-tiny --data.packing chop", "give --data.no-mask-prompt"),
        ("epic-tiny --data.row-tokens 20", "no example fits the 20 tokens of a row"),
        (
            "epic-tiny --data.row-tokens 20 --data.packing chop --data.no-mask-prompt",
            "no test question leaves room",
        ),
        ("epic-tiny --train.epochs 0.001", "has no step"),
        ("epic-tiny --data.template chatml", "--data.template 'chatml' is unknown"),
        ("epic-gsm8k-smollm2 --data.path NONE", "NONE: no such file"),
        ("epic-tiny --model.num-heads 5", "must divide one another"),
        ("--config NONE", "NONE"),
    ],
)
def test_bad_arguments(program, monkeypatch, tmp_path, argv, said):
    def reached(*args, **options):
        raise AssertionError("compute began")

    monkeypatch.setattr("train.engine.loop.run", reached)
    monkeypatch.setattr("train.engine.base_models.check_model", lambda *args: None)
    words = argv.replace("NONE", str(tmp_path / "none.jsonl")).split()
    sizes = [] if "epic-tny" in argv else ["--mesh.data", "1"]
    sizes += ["--data.train-rows", "30"] if "tiny" in argv else []
    done = program("train.finetune", *words, *sizes, "--output", tmp_path / "run")
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: "), done.err
    assert said.replace("NONE", str(tmp_path / "none.jsonl")) in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cls", "default"),
    [(CondenseRun, CondenseRun()), *((ReasoningRun, p.PRESET) for p in PRESETS.values())],
)
def test_every_option_is_described(cls, default):
    assert [o.name for o in options(cls, default) if not o.text] == []


def test_help(program):
    done = program("train.finetune", "epic-tiny", "--help")
    assert done.code == 0 and not done.err
    for option in ("--condense.tau", "--condense.cost-matched", "--data.row-tokens"):
        assert option in done.out
    listed = program("train.finetune")
    assert listed.code == 2 and all(name in listed.out for name in PRESETS)


def test_a_whole_run(program, tmp_path):
    root = tmp_path / "run"
    argv = ["train.finetune", "epic-tiny", "--smoke", "--mesh.data", "1"]
    argv += ["--stage.cache", tmp_path / "cache", "--output"]
    done = program(*argv, root)
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == ["base", "finetuned"]
    finetuned = summary["finetuned"]
    assert finetuned["answer_nll"] < summary["base"]["answer_nll"]
    assert finetuned["train_steps"] == 3 and finetuned["train_seconds"] > 0
    assert 0.55 < finetuned["token_ratio"] < 0.66 and 0.5 <= finetuned["thought_ratio"] < 0.53
    log = json.loads((root / "evals" / "finetuned.json").read_text())
    assert len(log["answer_accuracy"]["value_by_index"]) == 4
    assert (root / "export" / "model.safetensors").exists()
    assert "Answer accuracy" in done.out and "padding" in done.err
    page = (root / "report.html").read_text()
    assert "A model was fine-tuned on traces of reasoning" in page and "While it trains" in page
    assert "Unlearning" not in page and "SMOKE" in page and (root / "curves.png").exists()
    # Nothing is computed twice; the stored configuration is the same run.
    steps = (root / "metrics.jsonl").read_bytes()
    config = root / "config.json"
    again = program("train.finetune", "--config", config, "--mesh.data", "1", "--output", root)
    assert again.code == 0, again.err
    assert json.loads((root / "summary.json").read_text()) == summary
    assert (root / "metrics.jsonl").read_bytes() == steps
    # Another policy is compared with the same model before, which is not judged again.
    (judged,) = (tmp_path / "cache" / "evals").glob("base-*.json")
    before = judged.stat().st_mtime_ns
    other = program(*argv, tmp_path / "head", "--condense.policy", "head")
    assert other.code == 0, other.err
    assert [*judged.parent.glob("base-*.json")] == [judged] and judged.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "head" / "summary.json").read_text())["base"] == summary["base"]


def judged(before, after):
    """What the page says of two models, by which of their answers are right."""
    names = dict(zip(("base", "finetuned"), (before, after), strict=True))
    logs = {
        name: {"answer_accuracy": {"value_by_index": {i: {"score": x} for i, x in enumerate(rows)}}}
        for name, rows in names.items()
    }
    summary = {name: {"answer_accuracy": sum(x) / len(x)} for name, x in names.items()}
    return learnt(Results(summary, logs, Roles("base", "oracle", "finetuned")))


@pytest.mark.parametrize(
    ("before", "after", "state", "said"),
    [
        ([0] * 20, [1] * 8 + [0] * 12, "good", "8 answers gained and 0 lost"),
        ([0] * 20, [1] * 5 + [0] * 15, "mixed", "p = 0.062"),
        ([1] * 9 + [0], [0] * 9 + [1], "bad", "1 answers gained and 9 lost"),
        ([0, 1], [0, 1], "mixed", "p = 1"),
    ],
)
def test_more_right_answers_must_be_beyond_chance(before, after, state, said):
    found = judged(before, after)
    assert found.state == state and said in found.text


@pytest.mark.slow
def test_the_ends_of_traces_teach_what_whole_ones_do(program, tmp_path):
    """EPiC's claim on the tiny task: as good in 0.70 of the time, and the middle is no use."""
    found = {}
    for name in ("full", "edge", "middle"):
        options = {"full": ["--condense.tau", "1"]}.get(name, ["--condense.policy", name])
        argv = ["epic-tiny", *options, "--mesh.data", "1", "--data.test-rows", "100"]
        done = program("train.finetune", *argv, "--output", tmp_path / name)
        assert done.code == 0, done.err
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["finetuned"]
    full, edge, middle = (found[name] for name in ("full", "edge", "middle"))
    assert full["answer_accuracy"] >= 0.9
    assert edge["answer_accuracy"] >= full["answer_accuracy"] - 0.02
    assert middle["answer_accuracy"] <= 0.3
    assert edge["train_flops"] <= 0.6 * full["train_flops"]
    assert edge["train_seconds"] <= 0.7 * full["train_seconds"]


@pytest.mark.slow
def test_a_model_and_rows_of_others(program, tiny, tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", SOLVED)
    argv = ["--smoke", "--mesh.data", "1", "--data.path", path, "--model.path", tiny]
    argv += "--data.row-tokens 96 --data.train-rows 6 --data.test-rows 3".split()
    done = program("train.finetune", "epic-gsm8k-smollm2", *argv, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finetuned"]["token_ratio"] == 1  # of two thoughts both are kept
