"""What being watched costs training: `python tools/bench.py monitor --help`.

A real run of one process is scraped many times a second and not at all, by turns. The time that its
steps take longer in a turn, over the scrapes of that turn, is what one scrape costs them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from strata.config import parse_config
from strata.dataload.reader import ShardReader
from strata.distributed import current_world, join_world, leave_world
from strata.errors import ConfigError
from strata.train.config import TrainConfig
from strata.train.engine import choose_device
from strata.train.loop import Trainer
from strata.train.monitor import serve_run

__all__ = ["main"]

_SCRAPE_INTERVAL_S = 5.0
"""Of monitoring/prometheus.yml."""
_SCRAPER = """
import select, socket, sys
port, pause, on, number = int(sys.argv[1]), float(sys.argv[2]), False, 0
while True:
    if select.select([sys.stdin], [], [], pause if on else None)[0]:
        word = sys.stdin.readline().strip()
        if not word:
            break
        on = word == "on"
        print(number, flush=True)
        number = 0
        continue
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 200 " in answer[:20], answer[:200]
    number += 1
"""


class _Scraper:
    """A process that scrapes while it is told to.

    Args:
        port: Of the exporter.
        pause_s: Between two scrapes.
    """

    def __init__(self, port: int, pause_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRAPER, str(port), str(pause_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, on: bool) -> int:
        """Scrape from now on or not; how often it has scraped since it was last told."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("on\n" if on else "off\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class _Turns:
    """Watches a trainer's steps and has them scraped in every second turn.

    Args:
        trainer: Before it runs.
        scraper: Silent.
        steps: Of a turn.
        warmup: Steps before the first turn.
    """

    def __init__(self, trainer: Trainer, scraper: _Scraper, *, steps: int, warmup: int) -> None:
        self._scraper, self._steps, self._left = scraper, steps, warmup
        self._on = True  # The warm-up is no turn; a quiet one follows.
        self._start = time.perf_counter()
        self.quiet_s: list[float] = []
        """Mean step of each quiet turn."""
        self.lost_s: list[float] = []
        """Of each scraped turn: by how much a scrape made its steps longer than those before."""
        self.recording_s: list[float] = []
        """Of each step, what `RunMonitor.count` took."""
        self._count = trainer.monitor.count
        trainer.monitor.count = self._watch  # pyright: ignore[reportAttributeAccessIssue]

    def _watch(self, *args: Any) -> None:
        start = time.perf_counter()
        self._count(*args)
        self.recording_s.append(time.perf_counter() - start)
        self._left -= 1
        if self._left == 0:
            self._switch((time.perf_counter() - self._start) / self._steps)

    def _switch(self, step_s: float) -> None:
        number = self._scraper.tell(not self._on)
        if not self._on:
            self.quiet_s.append(step_s)
        elif self.quiet_s:
            self.lost_s.append((step_s - self.quiet_s[-1]) * self._steps / max(number, 1))
        self._on, self._left = not self._on, self._steps
        self._start = time.perf_counter()


@contextmanager
def _scraping(port: int, pause_s: float) -> Iterator[_Scraper]:
    scraper = _Scraper(port, pause_s)
    try:
        yield scraper
    finally:
        scraper.close()


def _cpu_of_a_scrape(scraper: _Scraper, seconds: float) -> float:
    """CPU seconds of this process a scrape, while it does nothing else."""
    scraper.tell(True)
    start = time.process_time()
    time.sleep(seconds)
    number = scraper.tell(False)
    return (time.process_time() - start) / max(number, 1)


def _measure(config: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    world = current_world()
    config.check_world(world)
    device = choose_device(config.engine, world)
    reader = ShardReader(config.data.shards, config.data.check, config.data.download)
    join_world(device)
    try:
        with (
            serve_run(config, world) as metrics,
            _scraping(config.monitor.port, args.pause) as scraper,
        ):
            trainer = Trainer(config, world=world, device=device, reader=reader, metrics=metrics)
            cpu_s = _cpu_of_a_scrape(scraper, args.seconds)
            turns = _Turns(trainer, scraper, steps=args.steps, warmup=args.warmup)
            trainer.fit()
    finally:
        leave_world()
    step_s, recording_s = statistics.mean(turns.quiet_s), statistics.mean(turns.recording_s)
    lost_s = statistics.median(turns.lost_s)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "turns": len(turns.lost_s),
        "step_s": step_s,
        "recording_s": recording_s,
        "recording_ratio": recording_s / step_s,
        "cpu_of_a_scrape_s": cpu_s,
        "lost_to_a_scrape_s": lost_s,
        "lost_to_a_scrape_s_quartiles": statistics.quantiles(turns.lost_s, n=4)
        if len(turns.lost_s) > 1
        else [lost_s] * 3,
        "scraping_ratio": lost_s / _SCRAPE_INTERVAL_S,
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    low, _, high = record["lost_to_a_scrape_s_quartiles"]
    rows = [
        ("", "measured"),
        ("---", "---"),
        ("step, ms", f"{record['step_s'] * 1e3:.1f}"),
        ("recording a step, ms", f"{record['recording_s'] * 1e3:.3f}"),
        ("its share of a step", f"{record['recording_ratio']:.3%}"),
        ("CPU time of a scrape, ms", f"{record['cpu_of_a_scrape_s'] * 1e3:.2f}"),
        (
            "steps longer by a scrape, ms (quartiles)",
            f"{record['lost_to_a_scrape_s'] * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})",
        ),
        (
            f"share of step time, scraped every {_SCRAPE_INTERVAL_S:.0f} s",
            f"{record['scraping_ratio']:.3%}",
        ),
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: A setting is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="tools/bench.py monitor",
        description="What recording and scraping cost a step of one process. Other options "
        "are those of train/main.py, such as --config and --data.shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--turns", type=int, default=20, help="scraped ones; as many are quiet")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first turn")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two scrapes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of scrapes without training")
    args, words = parser.parse_known_args(argv)
    if min(args.turns, args.steps, args.warmup) < 1:
        raise ConfigError("tools/bench.py monitor: --turns, --steps and --warmup must be 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "run": f"{folder}/run",
            "stop_after_steps": args.warmup + 2 * args.turns * args.steps,
            "schedule.epochs": 1_000_000,
            "checkpoint.every_steps": 1_000_000,
            "monitor.progress": "false",
        }
        overrides = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
        config = parse_config(
            TrainConfig, [*words, *overrides], prog="tools/bench.py monitor", description=""
        )
        record = _measure(config, args)
    print(table(record))
    print(json.dumps(record), flush=True)
