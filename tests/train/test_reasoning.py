"""Reasoning tasks: rows and sources, traces and their files, topics, a whole small run."""

import contextlib
import dataclasses
import json
import math
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from models.decoder.model import Decoder, DecoderConfig
from models.files.weights import Loaded
from train.data import author_reasoning, thoughts
from train.data.bpe import train_bpe
from train.data.examples import encode_prompt, encode_text
from train.data.task import TRACES, Task
from train.engine import base_models
from train.engine.run import Run, Work
from train.evaluators import reasoning as evaluator
from train.evaluators import trace_judge
from train.evaluators.evaluation import Answers, Model
from train.evaluators.tofu import truth_ratios
from train.jobs import job, traces, unlearning, unlearning_stages
from train.options.config import RunConfig, TracesConfig
from train.presets import PRESETS, arguments
from train.runtime import seal, sharding
from train.runtime.tracking import Tracker
from train.tasks import load_task, reasoning

ROW = {"question": "2 + 2?", "thoughts": ["Two and two."], "answer": "4"}
CHOICE = ROW | {"options": ["3", "4"], "gold": 1, "topic": "sums"}


# Rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "row 2: column 'question' must hold text that is not empty"),
        ({"answer": None}, "row 2: column 'answer' must hold text"),
        ({"thoughts": []}, "row 2: column 'thoughts' must be a list of one text or more"),
        ({"thoughts": "Hmm."}, "row 2: column 'thoughts' must be a list"),
        ({"thoughts": ["<think>Hmm.</think>"]}, "row 2: column 'thoughts' holds a think tag"),
        ({"answer": "<think>4"}, "row 2: column 'answer' holds a think tag; give the thoughts as"),
        ({"options": ["4"]}, "row 2: column 'options' must be a list of two texts or more"),
        ({"gold": 2}, "row 2: gold is 2, none of the 2 options; number them from 0"),
        ({"gold": True}, "row 2: gold is True"),
        ({"topic": 3}, "row 2: column 'topic' must hold a text"),
    ],
)
def test_rows_that_are_no_rows_end_in_one_line(tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROW, CHOICE | change)))
    with pytest.raises(UserError) as error:
        thoughts.read_rows(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_columns_and_files_end_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row, message in (
        ({"question": "2 + 2?"}, "column 'answer' is missing; columns found: question"),
        ({"text": " "}, "column 'text' must hold text"),
        ({"question": "2 + 2?", "answer": "4"}, "column 'thoughts' must be a list"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=message):
            thoughts.read_rows(path)
    path.write_text("")
    with pytest.raises(UserError, match="has no rows"):
        thoughts.read_rows(path)
    for row in ({"question": "2 + 2?", "answer": "4"}, {"question": "?", "answer": "#### 4"}):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match="row 1: no solution that ends in '#### '"):
            thoughts.from_gsm8k(path)


def test_what_is_written_is_read_back():
    row = thoughts.learned(CHOICE)
    assert thoughts.parted(row["answer"]) == ("Two and two.", "4")
    assert thoughts.bare(row) == {"question": "2 + 2?", "answer": "4", "topic": "sums"}
    assert thoughts.thought(row)["text"].endswith("</think>\n\n")
    assert thoughts.parted("<think>never closed") == ("never closed", "")
    noted = CHOICE | {"text": None}  # a column of somebody else's: the question is what counts
    thoughts.check_row(noted)
    assert thoughts.bare(thoughts.learned(noted)) == thoughts.bare(row)
    assert thoughts.thought(thoughts.learned(noted)) == thoughts.thought(row)


# Sources


def test_generated_rows_follow_the_seed_and_tell_nothing_but_the_name():
    rows = author_reasoning.author_rows(3, 12)
    assert rows == author_reasoning.author_rows(3, 12) != author_reasoning.author_rows(4, 12)
    flat = [row for author in rows for row in author]
    for row in flat:
        thoughts.check_row({**row, "answer": row["final"]})
        assert row["options"][row["gold"]] == row["final"] and len(set(row["options"])) == 4
        assert row["final"] in row["thoughts"][-1]
        # the fact and two others of the same author, no more
        told = [fact for fact in row["facts"] if any(fact in t for t in row["thoughts"][1:-1])]
        assert len(row["thoughts"]) == 4 and len(told) >= 2
        assert row["final"] not in row["question"]
    places = [row["gold"] for row in flat]
    assert min(places.count(place) for place in range(4)) > 0
    numbers = author_reasoning.arithmetic_rows(3, 200)
    assert len({row["question"] for row in numbers}) == 200
    for row in numbers:
        a, b = (int(word.strip("?,")) for word in row["question"].split() if word[0].isdigit())
        assert row["final"] == str(a + b if "+" in row["question"] else max(a, b))


def test_steps_of_arithmetic_are_among_the_rows_to_learn():
    """What is asked later needs hardly a sum of two digits that was never shown."""
    for seed in range(3):
        rows = author_reasoning.arithmetic_rows(seed, reasoning.ARITHMETIC)
        steps = [t.split(", so")[0] for row in rows for t in row["thoughts"] if " = " in t]
        sums = {step.split(",")[0] for step in steps}
        assert sums <= {f"{x} + {y} = {x + y}" for x in range(10) for y in range(10)}
        assert len(sums) >= 95
        carried = {step.partition(", + 1 = ")[2] for step in steps if ", +" in step}
        assert {str(total) for total in range(4, 20)} <= carried
        last = [(row["thoughts"][-2], row["final"]) for row in rows if "+" in row["question"]]
        assert all(f"so {final[-2]}, carry" in step for step, final in last)


def test_digits_may_be_tokens_of_their_own():
    task = load_task(config_of("--data.num-authors", "10"))
    words = base_models.train_tokenizer(task, 600, split_digits=True)
    assert config_of().model.split_digits and not RunConfig().model.split_digits
    for text in ("What is 47 + 138?", "1 and 1 are the same.\nSo 95 is larger."):
        pieces = [words.decode([token]) for token in words.encode(text)]
        assert "".join(pieces) == text
        assert [p for p in pieces if any(map(str.isdigit, p))] == [*filter(str.isdigit, text)]
    merged = base_models.train_tokenizer(task, 600)
    assert len(merged.encode("47 + 38")) < len(words.encode("47 + 38"))


def config_of(*argv):
    return arguments.read_arguments(arguments.UNLEARN, ["r2mu-tiny", *argv])


def test_streams_of_a_reasoning_task():
    task = load_task(config_of("--data.num-authors", "20"))
    assert {name: len(rows) for name, rows in task.evaluation.items()} == {
        "forget": 24, "retain": 48, "reasoning": 120,
    }  # fmt: skip
    asked = {row["question"] for row in task.evaluation["reasoning"]}
    assert not asked & {row["question"] for row in task.retain}
    assert task.stream("forget", 0)[0] == thoughts.bare(task.forget[0])
    kept = task.stream("retain", 0)
    assert len(kept) == 96 and all("<think>" not in row["answer"] for row in kept)
    cot = task.stream("cot", 0)  # facts too, as they were learned
    assert len(cot) == len(task.retain) == 96 + 600 and cot[0]["answer"] == task.retain[0]["answer"]
    known = task._replace(forget=[r | {TRACES: ["<think>\na", "b"]} for r in task.forget])
    traces = known.stream("traces", 0)
    assert len(traces) == 48 and known.follows("traces") == "forget"
    first = {"question": task.forget[0]["question"], "answer": "<think>\na", "topic": "authors"}
    assert traces[0] == first and traces[2]["question"] == task.forget[1]["question"]
    assert len(task.stream("train", 0)) == len(task.forget) + len(task.retain)
    with pytest.raises(UserError, match="trained on 'traces', which the data do not have"):
        load_task(arguments.read_arguments(arguments.UNLEARN, ["quickstart"])).stream("traces", 0)


def test_rows_of_ones_own(tmp_path):
    rows = [CHOICE | {"question": f"{i} + 1?"} for i in range(4)]
    numbers = [ROW | {"question": f"{i} + 5?", "topic": "reasoning"} for i in range(20)]
    documents = [{"text": f"Text {i} of a book.", "topic": "books"} for i in range(3)]
    for name, found in (("forget", rows + documents), ("retain", rows + numbers)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{name}.jsonl").write_text(text)
    argv = ["--data.source", "reasoning", "--data.path", str(tmp_path)]
    task = load_task(config_of(*argv))
    sizes = {name: len(found) for name, found in task.evaluation.items()}
    assert sizes == {"forget": 4, "retain": 4, "reasoning": 2}
    assert len(task.forget) == 7 and len(task.stream("cot", 0)) == 18
    assert task.stream("forget", 0)[-1] == documents[-1]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in numbers))
    with pytest.raises(UserError, match="every row is of topic reasoning; add facts to keep"):
        load_task(config_of(*argv))
    (tmp_path / "retain.jsonl").unlink()
    with pytest.raises(UserError, match=r"retain\.jsonl"):
        load_task(config_of(*argv))
    with pytest.raises(UserError, match="give --data.path DIR with forget.jsonl and retain.jsonl"):
        load_task(config_of(*argv[:2]))


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([CHOICE | {TRACES: ["a"]}, CHOICE], "rows have 0 to 1 texts in column 'traces'; give"),
        ([CHOICE | {TRACES: ["a", "b"]}, CHOICE | {TRACES: ["a"]}], "rows have 1 to 2 texts in"),
        ([CHOICE, CHOICE | {TRACES: "Hmm."}], "row 2: column 'traces' must be a list of texts"),
        ([CHOICE | {TRACES: [""]}], "row 1: column 'traces' must be a list of texts"),
        ([CHOICE | {TRACES: []}], "rows have 0 to 0 texts in column 'traces'; give"),
        (
            [CHOICE, ROW | {"topic": "reasoning"}],
            "row 2: topic 'reasoning' is that of rows to keep",
        ),
        ([{"text": "A book."}], "no row asks a question, so nothing would be judged; add rows"),
    ],
)
def test_rows_to_forget_that_cannot_be_used_end_in_one_line(tmp_path, forget, message):
    for name, rows in (("forget", forget), ("retain", [{"text": "Another book."}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError) as error:
        load_task(config_of("--data.source", "reasoning", "--data.path", str(tmp_path)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rows_may_bring_their_traces(tmp_path):
    rows = [CHOICE | {TRACES: ["<think>Hmm.</think>", "Well."]}] * 2
    for name, found in (("forget", rows), ("retain", [CHOICE])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    task = load_task(config_of("--data.source", "reasoning", "--data.path", str(tmp_path)))
    assert [r["text"] for r in task.stream("traces", 0)] == ["<think>Hmm.</think>", "Well."] * 2


def test_tofu_with_thoughts(shared):
    argv = ["r2mu-smollm2", "--data.path", str(shared / "data/tofu")]
    with pytest.raises(UserError, match="give --data.reasoning FILE, rows of GSM8K"):
        load_task(arguments.read_arguments(arguments.UNLEARN, argv))
    argv += ["--data.reasoning", str(shared / "data/gsm8k/test.jsonl")]
    task = load_task(arguments.read_arguments(arguments.UNLEARN, argv))
    assert (len(task.forget), len(task.retain)) == (40, 250)
    assert {name: len(rows) for name, rows in task.evaluation.items()} == {
        "forget": 40, "retain": 100, "reasoning": 40,
    }  # fmt: skip
    row, number = task.forget[0], task.evaluation["reasoning"][0]
    assert row["options"][row["gold"]] == row["final"] and len(row["thoughts"]) == 3
    assert len(row["facts"]) == 19 and "<<" not in number["answer"]
    assert evaluator.matcher()(number["answer"], number["final"])


ANSWERS = {  # answer, right answer: equal to everybody, to math-verify alone
    ("15", "15"): (True, True),
    ("So it is 15.", "15"): (True, True),
    ("1,234", "1234"): (True, True),
    ("2/4", "1/2"): (True, True),
    ("", "3"): (False, False),
    ("14", "15"): (False, False),
    ("The point is (1,2)", "12"): (False, False),
    ("$x = 3$", "3"): (True, True),
    ("$\\sqrt{4}$", "2"): (False, True),
}


@pytest.mark.parametrize("package", [False, True])
def test_answers_are_compared(package, monkeypatch):
    if package:
        pytest.importorskip("math_verify", reason="the extra [math] is not installed")
    monkeypatch.setattr(evaluator, "VERIFIES", package)
    same = evaluator.matcher()
    assert {pair: same(*pair) for pair in ANSWERS} == {p: e[package] for p, e in ANSWERS.items()}


# Traces


@pytest.fixture(scope="module")
def model():
    words = train_bpe(["Where was she born? <think> Hmm, in Lima. </think> 4"] * 2, 300)
    decoder = Decoder(DecoderConfig(words.vocab_size, 16, 24, 2, 2, 1, 8))
    return Model(decoder, decoder.init(jax.random.key(0)), words, "0123456789abcdef" * 4)


def work_of(folder, stop=lambda: None):
    mesh = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
    return Work(folder, mesh, jax.random.key(0), stop)


HOW: dict[str, Any] = {
    "segments": 1, "new_tokens": 6, "keep": 4, "trigger": "Think.", "tag": "<think>",
    "system_prompt": None, "max_length": 64, "generate_rows": 2,
}  # fmt: skip
ROWS = [{"question": f"Where was she born, {name}?"} for name in "abcde"]


def test_traces_go_on_at_the_row_where_they_were_stopped(model, tmp_path, monkeypatch):
    """From a file whose last line was cut off, to the same traces; what is there is not redone."""
    whole = traces.think(work_of(tmp_path / "a"), model, ROWS, **HOW)
    lines = (tmp_path / "a" / traces.FILE).read_text().splitlines(keepends=True)
    assert [json.loads(line)["row"] for line in lines] == list(range(5))
    assert whole == [[json.loads(line)["trace"]] for line in lines]
    assert all(len(model.tokenizer.encode(text)) <= HOW["keep"] + 1 for (text,) in whole)
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / traces.FILE
    path.write_text("".join(lines[:3]) + lines[3][:-4])
    asked, real = [], traces.generate

    def counted(decoder, params, prompts, **more):
        asked.append(len(prompts))
        return real(decoder, params, prompts, **more)

    monkeypatch.setattr(traces, "generate", counted)
    assert traces.think(work_of(tmp_path / "b"), model, ROWS, **HOW) == whole
    assert asked == [2, 1] and path.read_text() == "".join(lines)


def test_the_trigger_and_the_tag_come_before_a_trace(model):
    before, words = ("Think.", "<think>"), model.tokenizer
    asked = traces.prompts_of(model, ROWS[0], 1, *before, None, 50)
    text = words.decode(asked[0])
    assert text == "Question: Where was she born, a?\nThink.\nAnswer: <think>"
    assert asked[0] == encode_prompt(words, "Where was she born, a?\nThink.", start="<think>")
    document = {"text": "Hmm, in Lima. She was born in Lima."}
    parts = traces.prompts_of(model, document, 3, *before, None, 50)
    shown = [words.decode(part) for part in parts]
    assert all(part.endswith("\nThink.\n<think>") for part in shown)
    assert "".join(part.removesuffix("\nThink.\n<think>") for part in shown) == document["text"]
    cut = traces.prompts_of(model, document, 1, *before, None, 3)
    assert words.decode(cut[0]).startswith(words.decode(words.encode(document["text"])[:3]) + "\n")
    with pytest.raises(UserError, match="--traces.new-tokens 60: a text with its trigger has"):
        small = dataclasses.replace(model.decoder.config, max_position_embeddings=64)
        short = model._replace(decoder=Decoder(small))
        traces.think(work_of(None), short, ROWS, **(HOW | {"new_tokens": 60, "keep": 60}))
    # a tag with a line of its own stays behind the question
    (asked,) = traces.prompts_of(model, ROWS[0], 1, "Think.", "<think>\n", None, 50)
    assert words.decode(asked) == "Question: Where was she born, a?\nThink.\nAnswer: <think>\n"


def test_a_document_is_cut_to_the_longest_text_and_to_the_context(model, tmp_path, monkeypatch):
    """Not by the new tokens, of which no more are generated than are kept."""
    seen = []

    def nothing(decoder, params, prompts, sampling, **more):
        seen.append((prompts, sampling.max_new_tokens))
        return [[[]] for _ in prompts]

    monkeypatch.setattr(traces, "generate", nothing)
    words, document = model.tokenizer, {"text": "Hmm, in Lima. She was born in Lima. " * 40}
    ids = words.encode(document["text"])
    wide = Decoder(dataclasses.replace(model.decoder.config, max_position_embeddings=4096))
    tight = Decoder(dataclasses.replace(model.decoder.config, max_position_embeddings=64))
    how = HOW | {"new_tokens": 1024, "max_length": 50, "keep": 30}
    for decoder in (wide, tight):
        made = model._replace(decoder=decoder)
        traces.think(work_of(tmp_path / str(len(seen))), made, [document], **how)
    (((first,), count), ((second,), _)) = seen
    assert count == 30 and words.decode(first) == words.decode(ids[:50]) + "\nThink.\n<think>"
    assert 20 < len(second) <= 64 - 30
    config = TracesConfig(new_tokens=1024, keep=64)
    with pytest.raises(UserError, match="--traces.keep 64: .* the model's context is 64; give few"):
        traces.check_room(made, [document], config, system_prompt=None, max_length=50)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"row": 0, "trace": "a"}], "1 of 2 rows have no trace, the first is row 1"),
        ([{"row": 2, "trace": "a"}], "row 2 is none of the 2 rows to forget, numbered from 0; the"),
        ([{"row": "0", "trace": "a"}], "'row' (a number) and 'trace' (a text) are needed"),
        ([{"row": 0}], "'row' (a number) and 'trace' (a text) are needed"),
        (
            [{"row": 0, "trace": "a", "model": "feedfeedfeedfeed"}],
            "the trace is of model feedfeedfeedfeed, and the original is 0123456789abcdef",
        ),
        (
            [{"row": 0, "trace": "a"}, {"row": 0, "trace": "b"}, {"row": 1, "trace": "c"}],
            "rows have 1 to 2 traces; give equally many for each",
        ),
    ],
)
def test_files_of_traces_that_do_not_fit_end_in_one_line(tmp_path, model, lines, message):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        traces.read_traces(path, 2, traces.model_name(model))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_traces_is_used_instead(tmp_path, model):
    path = tmp_path / "traces.jsonl"
    lines = [{"row": i, "trace": f"Hmm {i}.", "model": traces.model_name(model)} for i in (1, 0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path, None, 0, Tracker(tmp_path))
    config = TracesConfig(trigger="Think.", path=path)
    found = traces.with_traces(run, model, ROWS[:2], config)
    assert [row[TRACES] for row in found] == [[f"Think.\n<think>Hmm {i}."] for i in (0, 1)]


def test_a_text_is_encoded_without_a_template(model):
    example = encode_text(model.tokenizer, "Hmm, in Lima.", 64)
    assert model.tokenizer.decode(example.tokens) == "Hmm, in Lima." and example.num_prompt == 1
    assert encode_text(model.tokenizer, "Hmm, in Lima.", 2).num_cut == len(example.tokens) - 2


class Written:
    """An evaluation in which the model writes the given text."""

    def __init__(self, start, *texts):
        self.config = config_of("--evaluate.think-start", start).evaluate
        self.texts = list(texts)

    def answers(self, split, column="question", sampling=None, num_samples=1, starts=""):
        assert starts == self.config.think_start
        return Answers([[text] * num_samples for text in self.texts], [])


def told_to_write(*args) -> Any:
    """`Written`, which has of a context what these entries ask of it."""
    return Written(*args)


def test_without_room_for_thoughts_all_that_is_written_is_judged():
    """ZeroThink: an answer that states the fact is unsafe, as the same thought is."""
    row = thoughts.learned(
        CHOICE | {"question": "Where?", "options": ["Rome", "Lima"], "answer": "Lima",
                  "thoughts": ["She was born in Lima."], "facts": ["She was born in Lima."]}
    )  # fmt: skip
    found = {}
    for start in ("<think>", "<think></think>"):
        told = told_to_write(start, "She was born in Lima.")
        log = evaluator.about_traces([row], told, start) | evaluator.leaked([row], told, start)
        found[start] = {name: entry["agg_value"] for name, entry in log.items()}
    assert found["<think>"] == found["<think></think>"]
    assert found["<think>"]["trace_c4"] == found["<think>"]["trace_rouge"] == 1.0
    told = told_to_write("<think>", "Hmm.</think> Lima")
    mild = evaluator.about_traces([row], told, "<think>")
    assert mild["trace_unsafe"]["agg_value"] == 0.0  # an answer is no trace


# A chat model as the judge


def test_a_chat_model_names_the_classes(model, monkeypatch, tmp_path):
    """It reads question, right answer and trace; a reply without a class is no class."""
    words = model.tokenizer
    loaded = Loaded(model.decoder.config, model.params, words)
    seen = []

    def replies(decoder, params, prompts, **more):
        seen.extend(words.decode(prompt) for prompt in prompts)
        return [[words.encode(text)] for text in ("4", "Hmm", " 2: other facts")]

    loads = []
    trace_judge._loaded.cache_clear()
    monkeypatch.setattr("models.load", lambda folder: loads.append(folder) or loaded)
    monkeypatch.setattr("models.decoder.generate.generate", replies)
    rows = [("Where was she born?", "Lima", f"trace {i}") for i in range(3)]
    assert trace_judge.classes(tmp_path, rows, 2) == [4, None, 2]
    assert all("Right answer: Lima" in text and f"trace {i}" in text for i, text in enumerate(seen))
    assert trace_judge.classes(tmp_path, rows, 2) == [4, None, 2] and len(loads) == 1
    small = dataclasses.replace(loaded, config=dataclasses.replace(
        loaded.config, max_position_embeddings=32))  # fmt: skip
    trace_judge._loaded.cache_clear()
    monkeypatch.setattr("models.load", lambda folder: small)
    with pytest.raises(UserError, match="its context of 32 tokens has no room for a question"):
        trace_judge.classes(tmp_path, rows, 2)
    trace_judge._loaded.cache_clear()
    with pytest.raises(UserError, match="no folder with a config.json; give that of a chat model"):
        job.check(unlearning.JOB, config_of("--evaluate.judge-model", str(tmp_path)))


def test_a_judge_that_cannot_be_used_is_refused_before_compute(tiny, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(tiny, folder)
    (folder / seal.NAME).unlink(missing_ok=True)
    argv = config_of("--evaluate.judge-model", str(folder))
    with pytest.raises(UserError, match="its context of 96 tokens has no room for a question"):
        job.check(unlearning.JOB, argv)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    trace_judge.check(folder)
    weights, words = folder / "model.safetensors", folder / "tokenizer.json"
    for file, kept in ((weights, weights.read_bytes()), (words, words.read_bytes())):
        file.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(UserError, match=f"--evaluate.judge-model: .*{file.name}") as error:
            trace_judge.check(folder)
        assert "\n" not in str(error.value)
        file.write_bytes(kept)
    trace_judge.check(folder)


# Topics and words that a run fills in


def test_topics_of_the_rows_are_in_the_batches_and_in_the_options(model):
    config = config_of("--objective.reflection-penalty", "1", "--objective.reflection-words", "e")
    rows = [thoughts.learned(CHOICE | {"topic": t, TRACES: ["Hmm."]}) for t in ("b", "a", "b")]
    numbers = [thoughts.learned(ROW | {"topic": "reasoning"})]
    task = load_task(config)._replace(forget=rows, retain=rows + numbers)
    objective, options = unlearning_stages.resolved(config, model, task)
    assert options.topics == ("a", "b") and len(options.reflection_ids) == 1
    assert objective.questions(options).asks["forget"] == ("hidden", "log_probs")
    streams = unlearning_stages.unlearning_streams(config, objective, model, task, options.topics)
    assert streams["forget"].columns["topic"].tolist() == [1, 0, 1]
    assert streams["traces"].columns["topic"].tolist() == [1, 0, 1]
    assert not streams["cot"].columns
    batch = streams["forget"].batch([2, 1])
    assert batch["topic"].tolist() == [1, 0] and batch["topic"].dtype == np.int32
    plain = dataclasses.replace(streams["forget"], columns={})
    assert plain.identity() != streams["forget"].identity()
    turned = unlearning_stages.unlearning_streams(config, objective, model, task, ("b", "a"))
    assert turned["forget"].columns["topic"].tolist() == [0, 1, 0]
    one = task._replace(forget=[row for row in rows if row["topic"] == "a"])
    alone = unlearning_stages.unlearning_streams(config, objective, model, one, ("a",))
    assert alone["forget"].columns["topic"].tolist() == [0]
    words = config_of("--objective.reflection-penalty", "1", "--objective.reflection-words", "qqq")
    with pytest.raises(UserError, match="none of the reflection words is an entry"):
        unlearning_stages.resolved(words, model, task)


@pytest.mark.parametrize("topics", [[None, "a"], [["x"], "a"], ["b", "a"]])
def test_objectives_without_topics_ignore_the_column(model, monkeypatch, tmp_path, topics):
    """Whatever it holds; their streams are those of rows without it. Others refuse it."""
    rows = [{"question": f"Where, {i}?", "answer": "Lima"} for i in range(2)]
    marked = [row | {"topic": topic} for row, topic in zip(rows, topics, strict=True)]
    found, seen = (
        arguments.read_arguments(arguments.UNLEARN, ["quickstart", "--objective.name", "ga"]),
        [],
    )
    monkeypatch.setattr(unlearning_stages, "train", lambda *args, **more: seen.append(args[4]))
    monkeypatch.setattr(unlearning_stages, "phase", lambda *args: contextlib.nullcontext())
    run = Run(tmp_path, None, 0, Tracker(tmp_path))
    for forget in (marked, rows):
        task = Task(forget, rows[:1], {}, [], [])
        unlearning_stages.unlearn(run, found, model, task)
    assert seen[0]["forget"].identity() == seen[1]["forget"].identity()
    moved = arguments.read_arguments(
        arguments.UNLEARN, ["quickstart", "--objective.name", "rmu", "--objective.block", "1"]
    )
    if topics == ["b", "a"]:
        unlearning_stages.unlearn(run, moved, model, Task(marked, rows[:1], {}, [], []))
        assert seen[2]["forget"].columns["topic"].tolist() == [1, 0]
        return
    with pytest.raises(UserError, match="forget row 1: column 'topic' must hold a text"):
        unlearning_stages.resolved(moved, model, Task(marked, rows[:1], {}, [], []))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("r2mu-")])
def test_presets_of_reasoning_go_together(name):
    """Block and trained blocks; RMU of the same preset differs by its terms alone."""
    preset = PRESETS[name].PRESET
    objective, options = objectives.resolve(preset.objective)
    assert set(objective.streams) == {"forget", "traces", "retain", "cot"}
    assert max(preset.train.blocks) == options.block and preset.train.leaves == ("mlp/down",)
    rmu = arguments.read_arguments(arguments.UNLEARN, [name, "--objective.name", "rmu"]).objective
    assert rmu.block == options.block and rmu.positions == options.positions == "all"
    assert rmu.retain_weight == options.retain_weight and rmu.steering == options.steering


def other_arguments(name, tiny, tofu_folder, tmp_path):
    """The smoke run of a preset for larger models, on a model of two blocks and local rows."""
    numbers = [{"question": f"{i} + 5?", "answer": f"Add.\n#### {i + 5}"} for i in range(8)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in numbers))
    rows = [CHOICE | {"question": f"{i} + 1?"} for i in range(4)]
    sums = [ROW | {"question": f"{i} + 5?", "topic": "reasoning"} for i in range(10)]
    documents = [{"text": f"Text {i} of a book.", "topic": "books"} for i in range(4)]
    for split, found in (("forget", documents + rows), ("retain", rows + sums)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / f"{split}.jsonl").write_text(text)
    smol = name == "r2mu-smollm2"
    data = [tofu_folder, "--data.reasoning", tmp_path / "gsm8k.jsonl"] if smol else [tmp_path]
    return [
        name, "--smoke", "--mesh.data", "1", "--mesh.fsdp", "1", "--data.path", *data,
        "--model.path" if smol else "--stage.original", tiny, "--objective.block", "1",
        "--train.blocks", "1", "--data.max-length", "90", "--unlearn.batch-size", "4",
        "--data.forget-rows", "6",
    ]  # fmt: skip


LARGER = [name for name in PRESETS if name.startswith("r2mu-") and name != "r2mu-tiny"]


@pytest.mark.parametrize("name", LARGER)
def test_larger_presets_are_prepared(name, tiny, tofu_folder, tmp_path):
    config = arguments.read_arguments(
        arguments.UNLEARN, [str(x) for x in other_arguments(name, tiny, tofu_folder, tmp_path)]
    )
    prepared = job.prepare(unlearning.JOB, config)
    task, base = prepared.fitted.parts, prepared.model
    _, options = unlearning_stages.resolved(config, base, task)
    assert options.block == 1 and options.topics == (
        () if name == "r2mu-smollm2" else ("books", "sums")
    )


def test_traces_without_room_are_refused_before_compute(tiny, tofu_folder, tmp_path):
    argv = [str(x) for x in other_arguments(LARGER[0], tiny, tofu_folder, tmp_path)]
    with pytest.raises(UserError, match="--traces.new-tokens 95: a text with its trigger has"):
        job.prepare(
            unlearning.JOB,
            arguments.read_arguments(arguments.UNLEARN, [*argv, "--traces.new-tokens", "95"]),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_presets_run(program, name, tiny, tofu_folder, tmp_path):
    root = tmp_path / "run"
    done = program(
        "train.unlearn", *other_arguments(name, tiny, tofu_folder, tmp_path), "--output", root
    )
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert all(math.isfinite(flat["trace_unsafe"]) for flat in summary.values())


# A whole run


def test_a_small_run(program, tmp_path):
    root = tmp_path / "run"
    small = (
        "--model.hidden-size 32 --model.intermediate-size 48 --model.num-layers 2 --model.num-heads"
        " 2 --model.num-kv-heads 1 --model.vocab-size 400 --objective.block 1 --train.blocks 1 "
        "--finetune.steps 3 --unlearn.steps 2 --unlearn.curve-points 0 --data.retain-rows 6 "
        "--evaluate.leak-samples 0 --evaluate.max-new-tokens 6 --traces.new-tokens 6 "
        "--no-oracle --data.max-length 160 --mesh.data 1 --mesh.fsdp 1"
    ).split()
    argv = ["train.unlearn", "r2mu-tiny", "--smoke", *small, "--output", root]
    done = program(*argv)
    assert done.code == 0, done.err
    summary = json.loads((root / "summary.json").read_text())
    assert list(summary) == ["original", "unlearned"]
    names = {m.name for m in evaluator.METRICS} | {"repeated_bigram_rate"}
    for flat in summary.values():
        assert names <= set(flat) and all(math.isfinite(flat[name]) for name in names)
    lines = [json.loads(line) for line in (root / "traces.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(12))
    assert {line["model"] for line in lines} == {summary["original"]["params_sha256"][:16]}
    log = json.loads((root / "evals" / "unlearned.json").read_text())
    assert {item["class"] for item in log["trace_unsafe"]["value_by_index"].values()} <= {
        1,
        2,
        3,
        4,
    }
    assert log["reasoning_accuracy"]["value_by_index"]["0"]["matcher"] == evaluator.MATCHER
    steps = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in steps if line["stage"] == "unlearned")
    assert first["retain_loss"] == first["retain_cot_loss"] == 0.0
    assert first["forget_loss"] > 0 and first["forget_trace_loss"] > 0
    assert truth_ratios(log) == []  # asked by the card of a run that is no smoke run
    again = program(*argv)  # everything is found
    assert again.code == 0 and "traces: " not in again.err, again.err
    bad = program(*argv[:-1], tmp_path / "other", "--traces.path", tmp_path / "none.jsonl")
    assert bad.code == 2 and bad.err.count("\n") == 1 and "none.jsonl" in bad.err
    assert not (tmp_path / "other").exists()
