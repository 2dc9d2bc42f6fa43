"""Cost of monitoring in a training run: `python tools/bench.py monitor --help`.

A real run of one process is scraped many times a second in every second turn of steps, and not at
all in the others. The time that the steps of a scraped turn take longer, divided by the scrapes of
that turn, is the cost of one scrape.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.dataload.reader import ShardReader
from strata.distributed import current_world, join_world, leave_world
from strata.tools.benchmarks.measure import (
    append_record,
    machine,
    machine_line,
    parse_options,
    require_positive,
    table,
)
from strata.train.config import TrainConfig
from strata.train.engine_config import choose_device
from strata.train.loop import Trainer
from strata.train.monitor.run_monitor import serve_run
from strata.train.pretraining import Pretraining, open_pretraining

__all__ = ["main"]

_SCRAPE_INTERVAL_S = 5.0
"""The interval in monitoring/prometheus.yml."""
_NEVER = 1_000_000
"""Steps or epochs that no measurement reaches."""
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


@dataclass(frozen=True, kw_only=True)
class MonitorOptions(TrainConfig):
    """Cost of recording and scraping per training step; takes the settings of train/main.py too."""

    run: Path = Path("unset")
    """Not used: the run is in a temporary folder."""
    turns: int = 20
    """Turns with scrapes; there are as many without."""
    steps: int = 5
    """Steps of a turn."""
    warmup: int = 5
    """Steps before the first turn."""
    pause: float = 0.05
    """Seconds between two scrapes."""
    seconds: float = 5.0
    """Duration of scraping without training."""
    out: Path | None = None
    """JSON lines to append to."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        super().__post_init__()
        require_positive(self, "turns", "steps", "warmup")


class _Scraper:
    """A process that scrapes an exporter while it is switched on.

    Args:
        port: The exporter's port.
        pause_s: Seconds between two scrapes.
    """

    def __init__(self, port: int, pause_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRAPER, str(port), str(pause_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def switch(self, on: bool) -> int:
        """Start or stop scraping; returns the number of scrapes since the last switch."""
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
    """Measures a trainer's steps and switches the scraper on in every second turn.

    Args:
        trainer: Before it runs.
        scraper: Switched off.
        steps: Steps of a turn.
        warmup: Steps before the first turn.
    """

    def __init__(
        self, trainer: Trainer[Pretraining], scraper: _Scraper, *, steps: int, warmup: int
    ) -> None:
        self._scraper, self._steps, self._left = scraper, steps, warmup
        self._on = True  # The warm-up is not counted; a turn without scrapes follows.
        self._start = time.perf_counter()
        self.quiet_s: list[float] = []
        """Mean seconds of a step, of each turn without scrapes."""
        self.lost_s: list[float] = []
        """Seconds that a scrape added to the steps before it, of each scraped turn."""
        self.recording_s: list[float] = []
        """Seconds of `RunMonitor.count`, of each step."""
        self._count = trainer.task.monitor.count
        trainer.task.monitor.count = self._timed_count  # pyright: ignore[reportAttributeAccessIssue]

    def _timed_count(self, *args: Any) -> None:
        start = time.perf_counter()
        self._count(*args)
        self.recording_s.append(time.perf_counter() - start)
        self._left -= 1
        if self._left == 0:
            self._switch((time.perf_counter() - self._start) / self._steps)

    def _switch(self, step_s: float) -> None:
        number = self._scraper.switch(not self._on)
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
    """CPU seconds that a scrape takes in this process while it does nothing else."""
    scraper.switch(True)
    start = time.process_time()
    time.sleep(seconds)
    number = scraper.switch(False)
    return (time.process_time() - start) / max(number, 1)


def _measure(config: TrainConfig, options: MonitorOptions) -> dict[str, Any]:
    world = current_world()
    config.check_world(world)
    device = choose_device(config.engine, world)
    reader = ShardReader(config.data.shards, config.data.check, config.data.download)
    join_world(device)
    facts = machine(device)
    print(machine_line(facts))
    try:
        with (
            serve_run(config, world) as metrics,
            _scraping(config.monitor.port, options.pause) as scraper,
        ):
            trainer = open_pretraining(
                config, world=world, device=device, reader=reader, metrics=metrics
            )
            cpu_s = _cpu_of_a_scrape(scraper, options.seconds)
            turns = _Turns(trainer, scraper, steps=options.steps, warmup=options.warmup)
            trainer.fit()
    finally:
        leave_world()
    step_s, recording_s = statistics.mean(turns.quiet_s), statistics.mean(turns.recording_s)
    lost_s = statistics.median(turns.lost_s)
    return {
        **facts,
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


def cost_table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    low, _, high = record["lost_to_a_scrape_s_quartiles"]
    rows = [
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
    return table(["", "measured"], rows)


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: A setting is wrong.
    """
    options = parse_options(MonitorOptions, argv, "monitor")
    replace = dataclasses.replace
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig)}
    with tempfile.TemporaryDirectory() as folder:
        fields |= {
            "run": Path(folder) / "run",
            "stop_after_steps": options.warmup + 2 * options.turns * options.steps,
            "schedule": replace(options.schedule, epochs=_NEVER),
            "checkpoint": replace(options.checkpoint, every_steps=_NEVER),
            "monitor": replace(options.monitor, progress=False),
        }
        record = _measure(TrainConfig(**fields), options)
    print(cost_table(record))
    append_record(options.out, record)
