"""The page shows its result, needs nothing from elsewhere, and a browser can show it."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.dataload.reader import ShardReader
from strata.eval.pictures import encode_jpeg, film_strip
from strata.eval.published import PUBLISHED
from strata.eval.report import Curve, curve_svg, page_of, render, write_page
from strata.eval.results import ClassCounts, Classified, Cue, Cues, EvaluationResult, Measurement
from strata.eval.summary import FigureLine, wilson
from tests.support.evaluation_results import (
    classifier_measurement,
    evaluation_result,
    retrieval_measurement,
)
from tests.support.headless_browser import Browser

_VOID = {"meta", "img", "br"}
NUM_CURVES = 5


@pytest.fixture
def result(shards: Path, tmp_path: Path) -> EvaluationResult:
    """All that a page can show, with names that are markup."""
    run = tmp_path / ("a_folder_with_a_long_name_<of>_two_&_more" + "_more" * 20)
    run.mkdir()
    step = {"kind": "step", "health": {"effective_rank": 3.0}}
    rows = [{"kind": "start", "chance": {"instance": 5.5}}]
    rows += [
        {**step, "step": n, "losses": {"instance": 6 / n, "broken": None if n == 3 else 1.0}}
        for n in range(1, 30)
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    linear = classifier_measurement(shards)
    assert isinstance(linear.details, Classified)
    names = ("b<script>", *linear.details.by_class.names[1:])
    counts = replace(linear.details.by_class, names=names)
    curves = {"step": [1, 2, 3], "epoch": [0, 0, 0], "loss": [3.0, 2.0, 1.0], "top1": [0, 0, 1]}
    details = replace(linear.details, by_class=counts, run=run, curves=curves)
    cue = Cue(
        key="video-9",
        label="a",
        num_clips=3,
        num_frames=40,
        logit=1.25,
        logit_reversed=0.5,
        picture=tmp_path / "0.png",
        video=tmp_path / "0.mp4",
        sheet=encode_jpeg(Image.new("RGB", (300, 90), "red"), 80),
    )
    direction = replace(linear, details=Cues(shown=(cue,)))
    return replace(
        evaluation_result(
            shards,
            run / "checkpoints" / "step-000000029",
            retrieval=[retrieval_measurement(shards, 0.4), retrieval_measurement(shards, 0.6)],
            linear=[replace(linear, details=details)] * 2,
            temporal_cam=[direction] * 2,
        ),
        remark="Generated videos.",
    )


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_requests_nothing(result: EvaluationResult):
    folder = result.checkpoint.parents[2]
    text = render(result, folder)
    balance = _Balance()
    balance.feed(text)
    assert balance.open == []
    pictures = [link.partition(";base64,")[0] for link in balance.links]
    assert pictures.count("data:image/svg+xml") == NUM_CURVES
    # Videos are linked, and nothing is loaded.
    assert set(pictures) == {"data:image/svg+xml", "data:image/jpeg", "0.mp4"}
    assert "url(" not in text
    assert "<script" not in text
    assert text == render(result, folder)


def test_the_demo_shows_its_result(result: EvaluationResult):
    text = " ".join(render(result).split())
    for shown in (
        "Generated videos. Shares of the test set.",
        "50.0% (40.0% to 60.0%)",
        "not measured",
        # Of 12 test videos in each of two splits.
        "31.4% to 68.6%",
        "12.5%",
        "a protocol of linear",
        "_&lt;of&gt;_two_&amp;_more",
        "b&lt;script&gt;",
        "1 readings are not finite",
        "63.2 / 33.4",
        "c0ffee",
        "name: r3d18",
        "video-9: mean logit of 3 clips +1.25 as they are (right), +0.50 reversed (wrong);",
        "Red speaks for the original order",
        "By class: Linear probe, made, split 1",
        "Confusion: Retrieval, made, split 1",
        "Nearest neighbours: made, split 1",
        "Training of the classifier",
        "Health of the representation",
    ):
        assert shown in text
    assert "<b>✓ same class</b>" in text
    assert text.count('<figure class="right">') + text.count('<figure class="wrong">') == 6 * 5


@pytest.mark.parametrize(
    ("measured", "untrained", "said"),
    [
        (0.2, 0.2, "R: pretrained is not ahead of untrained."),
        (0.1, 0.2, "R: pretrained is not ahead of untrained."),
        (0.25, 0.2, "ahead of untrained by 5.0 points, which 84 test videos are too few"),
        (0.6, 0.2, ""),
    ],
)
def test_a_sentence_says_where_pretraining_is_not_ahead(
    measured: float, untrained: float, said: str
):
    line = FigureLine(
        name="R", data="", measured=(measured,), untrained=(untrained,), chance=0.1, num_test=84
    )
    assert said in line.lead
    assert bool(line.lead) == bool(said)
    assert replace(line, untrained=()).lead == ""
    # As in a table of Wilson's interval: 0 of 10 is 0 to 27.8 %.
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_empty_parts_are_left_out(shards: Path, tmp_path: Path):
    measurement = Measurement(rows=classifier_measurement(shards).rows)
    text = render(evaluation_result(shards, tmp_path / "a" / "b", finetune=[measurement]))
    for heading in ("By class", "Confusion", "Nearest", "Loss terms", "Training of", "Health"):
        assert heading not in text
    for heading in ("Temporal cues", "Variants", "Each split", "Learning curve"):
        assert heading not in text


def test_a_matrix_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="confusion matrix"):
        ClassCounts(names=("a",), shares={"top1": [None]}, confusion=np.zeros((1, 2), int))


def test_a_plot_shows_what_is_finite_and_the_level_of_chance():
    points = [(float(n), math.nan if n == 2 else 1.0 + n) for n in range(5)]
    curve = Curve(name="loss", unit="nats", points=points)
    assert curve.num_lost == 1
    text = curve_svg(curve)
    assert "nan" not in text.lower()
    assert "stroke-dasharray" not in text
    assert "stroke-dasharray" in curve_svg(replace(curve, chance=3.0))
    single = curve_svg(replace(curve, points=points[:1]))
    assert single.count("#3584d6") > text.count("#3584d6")


def test_a_film_strip_has_its_frames_side_by_side(shards: Path, tmp_path: Path):
    reader = ShardReader(shards / "train")
    (tmp_path / "film.jpg").write_bytes(film_strip(reader, 0, num_frames=4, height=48))
    with Image.open(tmp_path / "film.jpg") as film:
        assert film.size == (4 * 64, 48)
        wide = np.asarray(film, np.int16)
    frames = np.array([0, int(reader.num_frames[0]) - 1])
    (tmp_path / "tall.jpg").write_bytes(reader.strip(0, frames).tobytes())
    with Image.open(tmp_path / "tall.jpg") as tall:
        rows = np.asarray(tall, np.int16)
    assert np.abs(wide[:, :64] - rows[:48]).mean() < 4
    assert np.abs(wide[:, -64:] - rows[48:]).mean() < 4


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here; apt-get install chromium")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_it(
    browser: Browser, result: EvaluationResult, tmp_path: Path, width: int, dark: bool
):
    write_page(result, tmp_path / "report.html")
    asked = browser.open(tmp_path / "report.html", width=width, height=900, dark=dark)
    assert asked == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # Queries with their neighbours, one cue, the curves.
    assert browser.evaluate("document.images.length") == 6 * (1 + 5) + 1 + NUM_CURVES
    assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    ink, paper = ("228, 233, 240", "18, 23, 30") if dark else ("28, 36, 48", "255, 255, 255")
    style = "getComputedStyle(document.body)"
    assert browser.evaluate(f"{style}.color + {style}.backgroundColor") == f"rgb({ink})rgb({paper})"
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (width, 900)
        pixels = np.asarray(shot.convert("RGB"), np.int16)
    background = [int(v) for v in paper.split(", ")]
    assert np.abs(pixels[2, 2] - background).max() <= 2
    assert (np.abs(pixels - background).max(axis=2) > 60).mean() > 0.01


def test_the_page_of_a_grid_fits_a_phone(browser: Browser, tmp_path: Path):
    long = "a_row_with_a_long_name_" * 4
    rows = [["", "runs", *[f"retrieval R@{k}" for k in (1, 5, 10, 20, 50)]]]
    rows += [[long, "3", *["12.3 ± 4.5"] * 5], ["chance", "", *["1.0"] * 5]]
    text = page_of(
        "ablation.html.j2",
        title=f"A grid of <{long}>",
        incomplete=["INCOMPLETE: listed videos are missing."],
        tables=[("", "Mean ± deviation, in %.", rows)],
        lists=[("Rows", [(long, "configs/pretrain/ucf101_r3d18.yaml")])],
        footer="All figures of all runs: ablation.json.",
    )
    assert "A grid of &lt;a_row" in text
    (tmp_path / "ablation.html").write_text(text)
    assert browser.open(tmp_path / "ablation.html", width=400, height=900, dark=False) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 2


def test_the_browser_reports_a_request(browser: Browser, tmp_path: Path):
    (tmp_path / "other.html").write_text("<img src='http://127.0.0.1:9/a.png'><p>x</p>")
    asked = browser.open(tmp_path / "other.html", width=390, height=400, dark=False)
    assert asked == ["http://127.0.0.1:9/a.png"]


def test_published_figures_have_a_protocol_and_a_source():
    for row in PUBLISHED:
        assert row.protocol.startswith(row.kind)
        assert row.source
        assert re.fullmatch(r"\d+\.\d( / \d+\.\d)?", row.figure)
