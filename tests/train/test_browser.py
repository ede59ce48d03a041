"""Every kind of page in a real browser, at two widths, light and dark (`make browser`)."""

import json

import browser
import pytest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed"),
]
SIZES = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def shown():
    with browser.started() as found:
        yield found


@pytest.fixture(scope="module")
def made(program, tmp_path_factory):
    """`made(name, program, *argv)`: the folder of a smoke run."""
    root = tmp_path_factory.mktemp("pages")

    def make(name, what, *argv):
        if not (root / name).exists():
            done = program(what, *argv, "--smoke", "--mesh.data", "1", "--output", root / name)
            assert done.code == 0, done.err
        return root / name

    return make


def check(shown, page):
    for width, dark in SIZES:
        assert shown.open(page, width, dark) == [], (page, width, dark)
        assert (sum(shown.background()) < 200) == dark


def test_runs_and_their_comparison(shown, made, program, tmp_path):
    one = made("npo", "train.unlearn", "quickstart", "--objective.name", "npo")
    two = made("alone", "train.unlearn", "quickstart", "--no-oracle")
    three = made("pretrained", "train.pretrain", "pretrain-tiny")
    for run in (one, two, three):
        check(shown, run / "report.html")
    page = tmp_path / "all.html"
    assert program("train.report", one, two, three, "--html", page).code == 0
    check(shown, page)
    # Words without a space, longer than any window.
    (one / "evals" / "unlearned.key").unlink()
    log = json.loads((one / "evals" / "unlearned.json").read_text())
    for item in log["forget_Q_A_ROUGE"]["value_by_index"].values():
        item |= {"generation": "forgot" * 99, "input": "question" * 40}
    (one / "evals" / "unlearned.json").write_text(json.dumps(log))
    assert program("train.report", one).code == 0
    check(shown, one / "report.html")


def test_pages_of_other_programs(shown, made, tiny, tmp_path):
    draw = made("drawn", "train.diffuse", "fashion")
    gone = made("erased", "train.erase", draw, "--erase.concept", "sneaker")
    back = made("attacked", "train.attack", gone, "--attack", "subattack")
    rows = [
        {"prompt": f"{noun} {i} is", "options": ["tool", "fruit"], "gold": i % 2}
        for i in range(48)
        for noun in (("saw", "apple")[i % 2],)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--task", "rows", "--data.path", data, "--model.path", tiny)
    told = made("classified", "train.classify", "sst2-tiny", *argv)
    thought = made("thought", "train.unlearn", "r2mu-tiny")
    for run in (draw, gone, back, told, thought):
        check(shown, run / "report.html")


STYLE = "<style>body {margin: 0; font: 16px/1.5 sans-serif} td {max-width: 4rem}</style>"
DEFECTS = {
    "wider than the window": "<p style='width: 2000px'>far</p>",
    "outside the window": "<p style='position: relative; left: -40px'>left</p>",
    "printed over": "<p>the first line</p><p style='margin-top: -40px'>the second line</p>",
    "wider than its box": "<table><tr><td style='white-space: nowrap; display: block; width: 4rem'>"
    "a label that is long</td></tr></table>",
    "picture not loaded": "<img alt='x' src='data:image/png;base64,AAAA'>",
    "asks for http": "<img alt='x' src='http://localhost:9/a.png'>",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(shown, tmp_path, defect):
    page = tmp_path / "page.html"
    start = f"<!DOCTYPE html><title>a page</title>{STYLE}<p>A sentence that fits.</p>"
    page.write_text(start)
    assert shown.open(page, 390) == []
    page.write_text(start + DEFECTS[defect])
    assert any(defect in line for line in shown.open(page, 390))
