"""report.html: of real runs, finished, unfinished and old; safe against what data holds; looked at in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from conftest import colour_rows, write_jsonl
from trivet import LoRAModel
from trivet.cli.app import build
from trivet.evaluate import metrics
from trivet.report import charts, comparison, load_run, report
from trivet.report.charts import Series, heat_map, line_chart, nice_ticks, smoothed, thinned
from trivet.report.load import LOWER_IS_BETTER
from trivet.report.remarks import remarks

HOSTILE = "<script>alert('row')</script><img src=x onerror=alert(1)> {{ 7*7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def trivet(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(build(), [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done


def hostile_rows(n: int) -> list[dict[str, Any]]:
    return [{**row, "prompt": f"{HOSTILE} {row['prompt']}"} for row in colour_rows(n)]


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A squeezed run on rows that hold HTML, given as files."""
    place = tmp_path_factory.mktemp("runs")
    values: dict[str, Any] = {
        "max_steps": 40, "learning_rate": 1e-2, "dtype": "float32", "eval_steps": 10, "resamples": 50,
        "method": {"rank": {"name": "squeeze", "budget": "r1-equivalent", "start_rank": 4}}, "max_length": 200,
        "data.train": str(write_jsonl(place / "train.jsonl", hostile_rows(48))),
        "data.validation": str(write_jsonl(place / "validation.jsonl", hostile_rows(6))),
        "data.test": str(write_jsonl(place / "test.jsonl", hostile_rows(6))),
        "evaluation.max_new_tokens": 12, "output_dir": str(place / "run"),
    }  # fmt: skip
    LoRAModel(str(tiny("llama")), 4, **values).finetune(quiet=True)
    return place / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# -- one run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_report_with_its_figures(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    text, result = Tags(page).text, result_of(finished)
    for side in ("base", "tuned"):
        for value in result["metrics"][side].values():
            assert f"{value:.4g}" in text
    low, high = result["intervals"]["difference"]["loss"]
    assert f"[{low:+.3g}, {high:+.3g}]" in text
    assert f"trivet train {finished / 'config.yaml'}" in text
    for words in ("Where the ranks are", "How they got there", "its price", "How much of the ranks is used", "Before"):
        assert words in text
    assert str(result["data"]["fingerprints"]["test"]) in text
    assert len(page) < 200_000


def test_rates_that_were_tried_are_shown(copy: Path) -> None:
    assert "Learning rates tried" not in report(load_run(copy))
    result = result_of(copy)
    result["learning_rate_trials"] = [{"learning_rate": 5e-4, "loss": 1.25}, {"learning_rate": 0.032, "loss": None}]
    (copy / "result.json").write_text(json.dumps(result))
    text = Tags(report(load_run(copy))).text
    assert "Learning rates tried" in text and "Taken: 0.01." in text
    for words in ("0.0005", "1.2500", "0.032", "diverged"):
        assert words in text


def test_no_text_of_the_data_becomes_html_and_nothing_is_loaded(finished: Path) -> None:
    found = Tags((finished / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE in found.text  # the row is shown, as text
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"}
    attributes = {name for _, given in found.tags for name in given}
    assert not {name for name in attributes if name.startswith("on")} | attributes & {"src", "href", "srcset"}
    policy = next(given for tag, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_are_text_too(copy: Path) -> None:
    (copy / "config.yaml").write_text(
        (copy / "config.yaml").read_text().replace("lr_scheduler: cosine", "lr_scheduler: linear"), encoding="utf-8"
    )
    result = result_of(copy)
    result["ranks"] = {f"layers.0.{HOSTILE}": 3, "layers.0.q": 2}
    result["metrics"]["base"][HOSTILE] = result["metrics"]["tuned"][HOSTILE] = 1.0
    result["model"] = result["device"] = HOSTILE
    (copy / "result.json").write_text(json.dumps(result))
    assert not {tag for tag, _ in Tags(report(load_run(copy))).tags} & {"script", "img"}


def test_the_sample_marks_what_is_learned(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    sample = result_of(finished)["data"]["sample"]
    learned = "".join(text for text, on in sample if on)
    assert "the sky is blue" in learned
    assert f"<mark>{learned.replace('<', '&lt;').replace('>', '&gt;')}</mark>" in page
    assert "what colour is" not in learned


def test_drawings_are_well_formed_and_inside_their_frame(finished: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", (finished / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(drawings) >= 6
    for drawing in drawings:
        root = ET.fromstring(drawing)
        _, _, wide, high = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for name, limit in (("x", wide), ("x1", wide), ("x2", wide), ("cx", wide), ("y", high), ("cy", high)):
                assert -0.01 <= float(element.attrib.get(name, 0)) <= limit
            for x, y in re.findall(r"([\d.]+) ([\d.]+)", element.attrib.get("d", "")):
                assert float(x) <= wide
                assert float(y) <= high


def test_an_unfinished_run_is_shown_as_far_as_it_is(copy: Path) -> None:
    for name in ("result.json", "predictions.jsonl", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "adapter")
    lines = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join([*lines[:20], '{"step": 21, "lo']))
    text = Tags(trivet("report", copy) and (copy / "report.html").read_text(encoding="utf-8")).text
    assert re.search(r"not finished: step \d+ of 40", text)
    assert "Measured when the training is done." in text
    (copy / "log.jsonl").unlink()
    assert "nothing to draw yet" in Tags(report(load_run(copy))).text


def test_an_older_run_is_shown(copy: Path) -> None:
    result = result_of(copy)
    for name in ("ranks", "rank_history", "adapter_parameters", "rank_seconds", "evaluated_on", "proof"):
        result.pop(name)
    result["data"].pop("sample")
    (copy / "result.json").write_text(json.dumps(result))
    text = Tags(report(load_run(copy))).text
    assert "Where the ranks are" in text  # from the adapter itself
    assert "How they got there" not in text
    result["metrics"] = {"base": {}, "tuned": {}}
    result["intervals"] = {}
    (copy / "result.json").write_text(json.dumps(result))
    assert "no rows to be measured on" in Tags(report(load_run(copy))).text


def test_evaluating_anew_renews_the_report(copy: Path) -> None:
    (copy / "report.html").write_text("old")
    out = trivet("evaluate", copy, "--no-generate", "--max-rows", "3").stdout
    assert f"wrote {copy / 'report.html'}" in out
    assert f"{result_of(copy)['metrics']['tuned']['loss']:.4g}" in (copy / "report.html").read_text(encoding="utf-8")


# -- several runs ------------------------------------------------------------------------------------------------------


def test_runs_stand_side_by_side(finished: Path, copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.002"), encoding="utf-8")
    other = copy.rename(copy.with_name("other"))
    (other / "report.html").unlink()
    goal = other.parent / "pages" / "both.html"
    assert trivet("report", finished, other, "--output", goal).stdout == f"wrote {goal}\n"
    found = Tags(goal.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert "2 runs side by side" in found.text
    assert re.search(r"training\.learning_rate\s*0\.01\s*0\.002", found.text)
    assert "Measured on different rows" not in found.text
    assert not (other / "report.html").exists()
    result = result_of(other)
    result["data"]["fingerprints"]["test"] = "others"
    (other / "result.json").write_text(json.dumps(result))
    assert "Measured on different rows" in comparison([load_run(finished), load_run(other)])


def test_what_is_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    assert "no such folder" in trivet("report", tmp_path / "none", code=2).stderr
    assert "has no config.yaml" in trivet("report", tmp_path, code=2).stderr
    assert "two to six" in trivet("report", *[finished] * 7, code=2).stderr
    assert "is a folder" in trivet("report", finished, "--output", tmp_path, code=2).stderr


# -- remarks -----------------------------------------------------------------------------------------------------------

Made = Callable[..., list[str]]


@pytest.fixture
def made(copy: Path) -> Made:
    """The titles of a run's remarks, with its training losses, validations and parts of its result replaced."""

    def titles(
        losses: list[float] | None = None,
        validations: dict[int, float] | None = None,
        *,
        finished: bool = True,
        **more: Any,
    ) -> list[str]:
        rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses or [1.0] * 40)]
        held = validations if validations is not None else {20: 1.0, 40: 1.0}
        rows += [{"step": step, "validation_loss": loss} for step, loss in held.items()]  # type: ignore[dict-item]
        write_jsonl(copy / "log.jsonl", rows)
        result = result_of(copy)
        result["intervals"]["difference"] = {"loss": more.pop("difference", [-0.2, -0.1])}
        result["data"] |= more.pop("data", {"supervised_tokens": 10**9})
        (copy / "result.json").write_text(json.dumps(result | more))
        if not finished:
            (copy / "result.json").unlink()
        write_jsonl(copy / "predictions.jsonl", more.get("predictions", []))
        return [remark.title for remark in remarks(load_run(copy))]

    return titles


FALLING = [2.0 - 0.02 * i for i in range(40)]


def test_a_good_run_is_told_nothing(made: Made) -> None:
    assert made() == []


@pytest.mark.parametrize(
    ("validations", "losses", "told"),
    [
        ({10: 1.2, 20: 1.0, 40: 1.1}, FALLING, True),
        ({10: 1.2, 20: 1.0, 40: 1.01}, FALLING, False),  # within 2%
        ({10: 0.9, 20: 0.001, 40: 0.0012}, FALLING, False),  # a fifth of it, but nothing of what was gained
        ({10: 1.2, 20: 1.0, 40: 1.1}, FALLING[::-1], False),  # both rise: that is no overfitting
        ({40: 1.1}, FALLING, False),
    ],
)
def test_overfitting(made: Made, validations: dict[int, float], losses: list[float], told: bool) -> None:
    assert ("Overfit" in made(losses, validations)) == told
    assert ("Overfit" in made(losses, validations, finished=False)) == told  # while there is time to stop


@pytest.mark.parametrize(
    ("validations", "losses", "told"),
    [
        ({20: 1.2, 40: 1.0}, None, True),
        ({20: 1.2, 40: 1.19}, None, False),
        ({10: 0.9, 20: 1.2, 40: 1.0}, None, False),  # it was lower before
        ({20: 0.0012, 40: 0.001}, FALLING, False),  # a sixth of it, but nothing of what was gained
        ({}, [3.0 - 0.02 * i for i in range(100)], True),
        ({}, [3.0 + (-1) ** i - 0.02 * i for i in range(100)], False),  # within the noise
        ({}, [3.0 - 0.1 * i for i in range(20)], False),  # too few to tell
    ],
)
def test_unfinished_learning(made: Made, validations: dict[int, float], losses: list[float] | None, told: bool) -> None:
    assert ("Under-trained" in made(losses, validations)) == told
    assert "Under-trained" not in made(losses, validations, finished=False)


def test_answers_that_do_not_end(made: Made) -> None:
    long, brief = "the cat sat on the mat and " * 8, "red"

    def rows(answers: int, references: int) -> list[dict[str, Any]]:
        texts = ((long if i < answers else brief, long if i < references else brief) for i in range(10))
        return [{"tuned": tuned, "references": [reference]} for tuned, reference in texts]

    assert made(predictions=rows(2, 0)) == ["Answers do not end"]
    assert made(predictions=rows(1, 0)) == []
    assert made(predictions=rows(4, 2)) == []  # the limit is short for this task


@pytest.mark.parametrize(
    ("same", "wanted", "told"), [(20, 16, True), (18, 14, True), (20, 17, False), (17, 10, False), (20, 20, False)]
)
def test_one_answer_for_all(made: Made, same: int, wanted: int, told: bool) -> None:
    """Of 20 rows: how many get the same answer, and for how many it is right."""
    shown = [
        {"label": 1 if i < wanted else i, "answer": "unused", "base": "0", "tuned": "1" if i < same else f"other {i}"}
        for i in range(20)
    ]
    assert made(predictions=shown) == ["One answer for all"] * told
    written = [{"references": [str(row["label"]), "or so"], "tuned": row["tuned"]} for row in shown]
    assert made(predictions=written) == ["One answer for all"] * told
    assert made(predictions=shown[:19]) == []  # too few to tell


def test_rows_too_few_for_the_rank(made: Made) -> None:
    low, few = [1.0] * 30 + [0.5] * 10, {"supervised_tokens": 100}
    assert made(low, {20: 1.0, 40: 1.0}, data=few, trainable_parameters=5000) == ["Few rows for this rank"]
    assert made(low, {20: 1.0, 40: 1.0}, data=few, trainable_parameters=4999) == []
    assert made([0.8] * 40, {20: 1.0, 40: 1.0}, data=few, trainable_parameters=5000) == []


def test_no_better_and_worse_than_the_base(made: Made) -> None:
    assert made(difference=[0.1, 0.2]) == ["Worse than the base model"]
    assert made(difference=[-0.1, 0.2]) == ["No difference to the base model that these rows can show"]


def test_cut_rows_and_broken_steps(made: Made) -> None:
    assert made(data={"supervised_tokens": 10**9, "shortened_rows": 3}) == ["Rows were cut"]  # of 48
    broken: list[Any] = [1.0, None, 1.0]
    assert made(broken, data={"shortened_rows": 2}) == ["Steps without a number"]


def test_the_page_lists_every_rule() -> None:
    from trivet.report.remarks import RULES

    page = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    for rule in RULES:
        first = " ".join((rule.__doc__ or "").split("\n\n")[0].split())
        assert first in " ".join(page.split()), rule.__name__


def test_which_metrics_are_better_low_is_the_metrics_own_word() -> None:
    made = [
        *metrics.likelihood_metrics([1.0], [1], [1]),
        *metrics.classification_metrics([0], [0], 2),
        *metrics.regression_metrics([0.0], [0.0]),
        *metrics.choice_metrics([True]),
    ]
    assert {m.name for m in made if not m.higher_is_better} == LOWER_IS_BETTER


# -- drawings ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@example(1000.0, 0.001953125)
@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_span_the_range(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width, 5)
    rounding = 1e-9 * (abs(low) + width)
    assert ticks[0] <= low + rounding
    assert ticks[-1] >= low + width - rounding
    assert 2 <= len(ticks) <= 8
    step = ticks[1] - ticks[0]
    power = 10 ** math.floor(math.log10(step) + 1e-6)
    step = min((m * power for m in (1, 2, 2.5, 5)), key=lambda round_one: abs(round_one - step))
    assert all(abs(tick - round(tick / step) * step) <= rounding for tick in ticks)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=301, max_size=700))
def test_a_thinned_curve_stays_between_its_ends(values: list[float]) -> None:
    points = thinned([(float(i), v) for i, v in enumerate(values)])
    assert len(points) == 300
    assert min(values) - 1e-9 <= min(y for _, y in points)
    assert max(y for _, y in points) <= max(values) + 1e-9
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_smoothing_is_a_running_mean() -> None:
    assert smoothed([(i, float(i)) for i in range(5)], 2) == [(0, 0.0), (1, 0.5), (2, 1.5), (3, 2.5), (4, 3.5)]
    assert smoothed([(0, 1.0)], 3) == [(0, 1.0)]


def test_what_is_no_number_is_not_drawn() -> None:
    chart = str(line_chart([Series("a", [(1, 1.0), (2, float("nan")), (3, 3.0)])], label="loss"))
    assert "nan" not in chart
    assert "nothing to draw" in str(line_chart([Series("a", [])], label="loss"))
    assert "nothing to draw" in str(line_chart([Series("a", [(1, 0.0)])], label="price", log=True))


def test_names_in_drawings_are_escaped() -> None:
    assert "<b>" not in str(line_chart([Series("<b>", [(1, 1.0), (2, 2.0)])], label="<b>", across="<b>"))
    assert "<b>" not in str(heat_map(["<b>"], ["<b>"], {(0, 0): 1.0}, across="<b>", unit="<b>"))


def test_cells_of_a_heat_map_are_as_strong_as_their_value() -> None:
    cells = ET.fromstring(
        re.findall(r"<svg.*?</svg>", str(heat_map(["a"], ["0", "1", "2"], {(0, 0): 0.0, (0, 1): 2.0, (0, 2): 4.0},
                                                  across="block", unit="rank")))[0]
    ).findall("rect")  # fmt: skip
    assert [cell.attrib["class"] for cell in cells] == ["empty", "cell", "cell"]
    assert [float(cell.attrib["fill-opacity"]) for cell in cells[1:]] == [0.54, 1.0]
    assert charts.short(12_340) == "12.3k"


# -- in a browser ------------------------------------------------------------------------------------------------------

#: Writes what does not fit into the page's title: boxes that are wider than the window, texts that lie on each other.
PROBE = """<script>addEventListener("load", () => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth) wrong.push("page " + root.scrollWidth + " in " + innerWidth);
  const lap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const pairs = (list, what) => list.forEach((a, i) => list.slice(i + 1).forEach((b) => {
    if (lap(a.getBoundingClientRect(), b.getBoundingClientRect()))
      wrong.push(what + ": " + a.textContent.slice(0, 30) + " / " + b.textContent.slice(0, 30)); }));
  document.querySelectorAll("svg.chart").forEach((svg) => pairs([...svg.querySelectorAll("text")], "text"));
  pairs([...document.querySelectorAll(".card, .tile, .remarks")], "box");
  document.querySelectorAll(".tile b, h1, h2").forEach((e) => {
    if (e.scrollWidth > e.clientWidth + 1) wrong.push("cut: " + e.textContent); });
  document.querySelectorAll("svg.chart text").forEach((e) => {
    if (e.getBoundingClientRect().height < 8) wrong.push("small: " + e.textContent); });
  parent.postMessage(innerWidth + " " + JSON.stringify(wrong).replaceAll("<", "("), "*");
});</script>"""
#: Shows the page in a frame, as windows have a least width, and writes down what it says of itself.
FRAME = """<script>addEventListener("message", (e) => document.getElementById("probe").append(e.data));</script>
<iframe src="page.html" style="border:0;width:%dpx;height:900px"></iframe><pre id="probe"></pre>"""


def looked_at(page: str, folder: Path, wide: int) -> tuple[int, list[str]]:
    """(the window's width, what is wrong) as a real browser lays the page out."""
    assert CHROMIUM is not None
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # which forbids the probe's script
    (folder / "page.html").write_text(page.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    )
    (folder / "frame.html").write_text(FRAME % wide, encoding="utf-8")
    command = [CHROMIUM, *flags.split(), "--window-size=1400,1000", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(\d+) (.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return int(found[1]), json.loads(found[2])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("wide", [1280, 400])
def test_nothing_overlaps_or_sticks_out_in_a_browser(finished: Path, copy: Path, tmp_path: Path, wide: int) -> None:
    for page in (report(load_run(finished)), comparison([load_run(finished), load_run(copy)])):
        width, wrong = looked_at(page, tmp_path, wide)
        assert width == wide
        assert wrong == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_test_sees_what_is_wrong(tmp_path: Path) -> None:
    drawing = "<svg class=chart width=90 height=30><text x=2 y=20>one</text><text x=4 y=20>two</text></svg>"
    page = f"<html><head></head><body>{drawing}<div style='width:900px'>wide</div></body></html>"
    _, wrong = looked_at(page, tmp_path, 400)
    assert any(w.startswith("text: one / two") for w in wrong)
    assert any(w.startswith("page 9") for w in wrong)
