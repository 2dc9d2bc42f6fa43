"""The page holds what it was given, needs nothing from elsewhere, and a browser can show it."""

import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.dataload.reader import ShardReader
from strata.eval.pictures import film_strip
from strata.eval.published import PUBLISHED
from strata.eval.report_page import (
    ClassResult,
    Cue,
    Curve,
    FigureRow,
    Neighbour,
    Page,
    Query,
    Retrieved,
    Table,
    render,
    write_page,
)
from tests.support.headless_browser import Browser

_VOID = {"meta", "img", "br", "line", "polyline", "circle"}


@pytest.fixture
def page(shards: Path) -> Page:
    reader = ShardReader(shards / "train")
    films = [film_strip(reader, sample) for sample in range(4)]
    near = tuple(
        Neighbour(key=f"video-{k}", label="ab"[k % 2], similarity=0.9 - 0.1 * k, film=films[k])
        for k in range(3)
    )
    steps = tuple((float(step), 6.0 * math.exp(-step / 40)) for step in range(0, 200, 10))
    return Page(
        title="A report <of> two classes & more, of " + "a_folder_with_a_long_name/" * 3,
        note="Generated videos.",
        figures=(
            FigureRow(
                name="Retrieval R@1",
                protocol="10 clips, centre crop, cosine, not centred",
                measured=(0.5, 0.7),
                untrained=(0.2,),
                chance=0.125,
            ),
            FigureRow(name="Finetune Top-1", protocol="as CoCLR", measured=()),
        ),
        published=PUBLISHED,
        tables=(
            Table(
                title="Variants",
                remark="of the level",
                columns=("R@1",),
                rows={"mid level": (0.437,), "none": (None,)},
            ),
        ),
        classes=(
            ClassResult(
                title="made, split 1",
                protocol="linear probe on frozen features",
                per_class={"a": (4, 0.75), "b<script>": (4, 0.5), "nobody": (0, None)},
                confusion=((3, 1, 0), (2, 2, 0), (0, 0, 0)),
            ),
        ),
        retrieved=(
            Retrieved(
                title="made, split 1",
                protocol="cosine",
                queries=(Query(key="query-0", label="a", film=films[3], neighbours=near),),
            ),
        ),
        cues=(Cue(key="video-9", label="a", caption="logit +1.25", sheet=films[2]),),
        cues_remark="Red speaks for the original.",
        curves=(
            Curve(name="instance", unit="nats", points=steps, chance=5.5),
            Curve(name="broken", unit="nats", points=((0.0, 1.0), (1.0, math.nan))),
        ),
        health=(Curve(name="effective rank", unit="", points=((0.0, 2.0),)),),
        provenance={"commit": "abc1234", "a name of many words, split 1, train set": "0123" * 20},
        config="model: {name: r3d18}",
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


def test_the_page_is_whole_and_asks_for_nothing(page: Page):
    text = render(page)
    balance = _Balance()
    balance.feed(text.replace("/>", ">"))
    assert balance.open == []
    assert balance.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in balance.links)
    assert "url(" not in text
    assert "<script" not in text


def test_it_shows_what_it_was_given(page: Page):
    text = render(page)
    for shown in (
        "60.0% (50.0% to 70.0%)",
        "not measured",
        "12.5%",
        "as CoCLR",
        "A report &lt;of&gt; two classes &amp; more",
        "b&lt;script&gt;",
        "cosine 0.900",
        "1 readings are not finite",
        "63.2 / 33.4",
        "abc1234",
        "r3d18",
        "43.7%",
        "logit +1.25",
        "Red speaks for the original.",
        "<circle",
    ):
        assert shown in text
    assert text.count("<figure class='right'>") == 2
    assert text.count("<figure class='wrong'>") == 1


def test_what_is_empty_is_left_out():
    text = render(Page(title="t", note="n", figures=()))
    for heading in ("By class", "Confusion", "neighbours", "Loss", "Training", "Health"):
        assert heading not in text
    for heading in ("Published", "What was", "cues", "Variants"):
        assert heading not in text


def test_a_matrix_that_does_not_fit_is_refused(page: Page):
    wrong = dataclasses.replace(page.classes[0], confusion=((1, 2),))
    with pytest.raises(ValueError, match="confusion matrix"):
        render(dataclasses.replace(page, classes=(wrong,)))


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
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_it(browser: Browser, page: Page, tmp_path: Path, width: int, dark: bool):
    write_page(page, tmp_path / "report.html")
    asked = browser.open(tmp_path / "report.html", width=width, height=900, dark=dark)
    assert asked == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.images.length") == 5
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


def test_the_browser_would_tell_of_a_request(browser: Browser, tmp_path: Path):
    (tmp_path / "other.html").write_text("<img src='http://127.0.0.1:9/a.png'><p>x</p>")
    asked = browser.open(tmp_path / "other.html", width=390, height=400, dark=False)
    assert asked == ["http://127.0.0.1:9/a.png"]


def test_published_figures_have_a_protocol_and_a_source():
    for row in PUBLISHED:
        assert row.protocol
        assert row.source
        assert re.fullmatch(r"\d+\.\d( / \d+\.\d)?", row.figure)
