"""Lines and bars on stderr."""

import io
import json
import sys
import time
from pathlib import Path

import pytest

from strata.logs import get_logger, progress_bar, set_up_logging


def test_a_bar_in_a_file_is_a_few_lines(capsys: pytest.CaptureFixture[str]):
    for _ in progress_bar(range(50)):
        time.sleep(0.01)  # on a terminal, with a line every 0.1 s, five
    assert capsys.readouterr().err.count("\r") <= 3


def test_a_bar_outlives_a_full_disk(monkeypatch: pytest.MonkeyPatch):
    raw = Path("/dev/full").open("wb", buffering=0)
    with io.TextIOWrapper(raw, write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert sum(progress_bar(range(3))) == 3
        monkeypatch.undo()


def test_records_can_be_json_lines(capsys: pytest.CaptureFixture[str]):
    set_up_logging(as_json=True)
    try:
        raise OSError("no space")
    except OSError:
        get_logger("test").exception("first\nsecond %d", 2)
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["event"] == "error"
    assert record["message"].startswith("first\nsecond 2\nTraceback")
