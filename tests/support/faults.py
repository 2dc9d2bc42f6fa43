"""Faults that tests inject into a training process; each is called before training starts."""

import os
import time
from typing import Any

import torch


def _nan(step: int, rank: str) -> None:
    from strata.train import pretraining

    original = pretraining.Pretraining._part

    def part(self: Any, batch: Any, *more: Any) -> Any:
        if os.environ["RANK"] == rank and more[-1] == step - 1:
            losses = self.method.losses

            def broken(out: Any, *args: Any, **kwargs: Any) -> Any:
                # The second video of the rank: its embedding, and so the terms that use it.
                factor = torch.ones_like(out.instance)
                factor[1] = torch.nan
                object.__setattr__(out, "instance", out.instance * factor)
                return losses(out, *args, **kwargs)

            self.method.losses = broken
            try:
                return original(self, batch, *more)
            finally:
                self.method.losses = losses
        return original(self, batch, *more)

    setattr(pretraining.Pretraining, "_part", part)  # noqa: B010


def nan_at_step_5_on_rank_1() -> None:
    _nan(5, "1")


def nan_at_step_5() -> None:
    _nan(5, "0")


def stall_in_step_4_on_rank_1() -> None:
    from strata.train import pretraining

    original = pretraining.Pretraining.step

    def step(self: Any, batch: Any, state: Any) -> Any:
        if os.environ["RANK"] == "1" and state.step == 3:
            time.sleep(3600)
        return original(self, batch, state)

    pretraining.Pretraining.step = step


def other_code_on_rank_1() -> None:
    from strata import code_digest

    if os.environ["RANK"] == "1":
        code_digest.code_digest = lambda: "other"


def full_disk() -> None:
    """Limit files to 64 KB, as if the disk were full; the log is smaller."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, resource.RLIM_INFINITY))


def disk_full_once() -> None:
    """Writing the second checkpoint fails for lack of space; the others succeed."""
    from strata.train.run import checkpoint

    original, calls = checkpoint.save_file, []

    def save_file(*args: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(*args, **more)

    checkpoint.save_file = save_file


def renew_often() -> None:
    """Renew locks many times per second."""
    from strata.files import FolderLock

    FolderLock.BEAT_S = 0.05


def log_full_from_the_fifth_record() -> None:
    """Writing the log fails after four records; all other files are written."""
    from strata import logs

    original, calls = logs.os.write, []

    def write(handle: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("log.jsonl"):
            calls.append(1)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
        return original(handle, data)

    logs.os.write = write


def slow_steps() -> None:
    """Steps take 0.3 s more, so that a Prometheus sees each of them."""
    from strata.train import loop

    original = loop.Trainer._advance

    def advance(self: Any) -> None:
        time.sleep(0.3)
        original(self)

    setattr(loop.Trainer, "_advance", advance)  # noqa: B010


def slow_nan_at_step_30() -> None:
    """Late enough that a Prometheus, which finds targets in 5 s, has seen the run without it."""
    slow_steps()
    _nan(30, "0")


def blocked_reads_on_rank_1() -> None:
    """The storage does not answer any more after eight batches of rank 1."""
    from strata.dataload.reader import ShardReader

    slow_steps()
    original, calls = ShardReader.strips, []

    def strips(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) > 8:
            time.sleep(3600)
        return original(self, *args, **more)

    setattr(ShardReader, "strips", strips)  # noqa: B010


def full_disk_for_one_save() -> None:
    """The second checkpoint fails, and all disks but /dev/shm report 1 GB of 1 TB as free."""
    from strata.telemetry import host

    slow_steps()
    disk_full_once()
    original = host.psutil.disk_usage

    def disk_usage(path: str) -> Any:
        found = original(path)
        return found if path == "/dev/shm" else found._replace(total=10**12, free=10**9)

    setattr(host.psutil, "disk_usage", disk_usage)  # noqa: B010
