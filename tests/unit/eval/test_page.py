"""The page holds what it was given, needs nothing from elsewhere, and a browser can show it."""

import dataclasses
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strata.dataload.reader import ShardReader
from strata.eval.film import film_strip
from strata.eval.page import (
    Curve,
    FigureRow,
    Neighbour,
    Page,
    Query,
    render,
    write_page,
)
from strata.eval.published import PUBLISHED

_VOID = {"meta", "img", "br", "line", "polyline"}


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
        title="A report <of> two classes & more",
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
        per_class={"a": (4, 0.75), "b<script>": (4, 0.5)},
        confusion=((3, 1), (2, 2)),
        classified_by="linear probe on frozen features",
        queries=(Query(key="query-0", label="a", film=films[3], neighbours=near),),
        curves=(
            Curve(name="instance", unit="nats", points=steps, chance=5.5),
            Curve(name="broken", unit="nats", points=((0.0, 1.0), (1.0, math.nan))),
        ),
        health=(Curve(name="effective rank", unit="", points=((0.0, 2.0),)),),
        provenance={"commit": "abc1234"},
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
    ):
        assert shown in text
    assert text.count("<figure class='right'>") == 2
    assert text.count("<figure class='wrong'>") == 1


def test_what_is_empty_is_left_out():
    text = render(Page(title="t", note="n", figures=()))
    for heading in ("By class", "Confusion", "neighbours", "Loss terms", "Published", "What was"):
        assert heading not in text


def test_a_matrix_that_does_not_fit_is_refused(page: Page):
    with pytest.raises(ValueError, match="confusion matrix"):
        render(dataclasses.replace(page, confusion=((1, 2),)))


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


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, False), (1280, True)])
def test_a_browser_shows_it(page: Page, tmp_path: Path, width: int, dark: bool):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium here; apt-get install chromium")
    write_page(page, tmp_path / "report.html")
    call = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    call += [f"--user-data-dir={tmp_path / 'profile'}", "--force-device-scale-factor=1"]
    call += ["--blink-settings=preferredColorScheme=0"] if dark else []
    picture = tmp_path / "page.png"
    call += [f"--window-size={width},3000", f"--screenshot={picture}"]
    subprocess.run(
        [*call, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    with Image.open(picture) as shot:
        pixels = np.asarray(shot.convert("RGB"), np.int16)
    paper = (18, 23, 30) if dark else (255, 255, 255)
    assert np.abs(pixels[2, 2] - paper).max() <= 2
    # Something is drawn in the upper part, and the body is not cut off at the right edge.
    assert (np.abs(pixels[:1000] - paper).max(axis=2) > 60).mean() > 0.01
    assert (np.abs(pixels[:, -4:] - paper).max(axis=2) > 60).mean() < 0.01


def test_published_figures_have_a_protocol_and_a_source():
    for row in PUBLISHED:
        assert row.protocol
        assert row.source
        assert re.fullmatch(r"\d+\.\d( / \d+\.\d)?", row.figure)
