"""A Prometheus with the project's configuration and short intervals, for tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, free_port


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; a launcher does not always take its ranks along."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Prometheus:
    """A Prometheus that scrapes the targets listed in `folder/targets`.

    Args:
        folder: For its configuration and data.
        interval: Of scrapes, rules and refreshes.
        hold: Replaces how long alerts must hold before they fire, up to those of 10 minutes;
            "" leaves it.
    """

    def __init__(self, folder: Path, *, interval: str = "2s", hold: str = "") -> None:
        if shutil.which("prometheus") is None:
            pytest.skip("no prometheus: install Debian's package (apt-get install prometheus)")
        shutil.copytree(ROOT / "monitoring" / "rules", folder / "rules")
        alerts = folder / "rules" / "alerts.yml"
        if hold:
            short = r"(?m)^(    for: )(?:\d+s|[1-9]m|10m)$"
            alerts.write_text(re.sub(short, rf"\g<1>{hold}", alerts.read_text()))
        settings = (ROOT / "monitoring" / "prometheus.yml").read_text()
        for slow in ("scrape_interval: 5s", "evaluation_interval: 15s", "refresh_interval: 5s"):
            assert slow in settings
            settings = settings.replace(slow, f"{slow.split()[0]} {interval}")
        (folder / "prometheus.yml").write_text(settings)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The answer to an instant query."""
        return self._ask(f"query?{urllib.parse.urlencode({'query': expr})}")["result"]

    def firing(self) -> list[dict[str, Any]]:
        """Alerts that fire now, with their texts."""
        return [a for a in self._ask("alerts")["alerts"] if a["state"] == "firing"]

    def eventually(
        self,
        expr: str,
        enough: Callable[[list[dict[str, Any]]], Any] = bool,
        limit_s: float = 30,
    ) -> list[dict[str, Any]]:
        """The first answer that is enough."""
        deadline = time.monotonic() + limit_s
        while True:
            found = self.query(expr)
            if enough(found):
                return found
            assert time.monotonic() < deadline, f"{expr}: {found}"
            time.sleep(0.5)
