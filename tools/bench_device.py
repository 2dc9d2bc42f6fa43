"""How fast a machine decodes, loads and trains: `python tools/bench.py device --shards DIR`.

Each part alone, on synthetic or repeated samples, so that parts can be set against each other. On a
GPU: JPEG strips by engine, single frames, the graph, the loader, the training step. On a CPU the
same at the size asked for.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from strata.dataload.augment import AugmentSpec, draw_view
from strata.dataload.clips import ClipSpec
from strata.dataload.loader import DataConfig, TrainLoader, open_plan
from strata.dataload.pipeline import ClipPipeline, GraphSpec, ViewSlice
from strata.dataload.reader import ShardReader
from strata.distributed import World
from strata.errors import ConfigError
from strata.train.method import Method, MethodConfig, VideoModel
from strata.train.models.backbones import BackboneConfig
from strata.train.schedules import ScheduleConfig, phase_at

__all__ = ["main"]

_CLIPS = ClipSpec()
_MATRIX = 8192
_NAMES = ("ceilings", "jpeg", "graph", "loader", "step")


class _Bench:
    """What all parts share: the device, the samples, how long to measure, where to write."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.reader = ShardReader(args.shards)
        self.form = self.reader.manifest.form
        rng = np.random.default_rng(0)
        self.strips = []
        for number in range(args.batch):
            sample = number % self.reader.num_samples
            frames = rng.integers(0, self.reader.num_frames[sample], _CLIPS.window_frames)
            self.strips.append(self.reader.strip(sample, np.sort(frames)))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rate(self, run: Callable[[], Any], items: int) -> float:
        """Items a second, after two calls that do not count."""
        for _ in range(2):
            run()
        self._wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < self.args.seconds:
            run()
            count += 1
        self._wait()
        return count * items / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def record(self, part: str, **fields: Any) -> None:
        """Print a measurement, and append it to the file that was asked for."""
        line = json.dumps({"part": part, **fields})
        print(line, flush=True)
        if self.args.out is not None:
            with self.args.out.open("a", encoding="utf-8") as out:
                out.write(line + "\n")

    def ceilings(self) -> None:
        """The card's own matrix product and copy, against which the rest is held."""
        if not self.on_gpu:
            self.record("ceilings", device="cpu", cores=len(os.sched_getaffinity(0)))
            return
        left = torch.randn(_MATRIX, _MATRIX, device=self.device, dtype=torch.bfloat16)
        products = self.rate(lambda: left @ left, 1)
        source = torch.empty(2**30, device=self.device)
        target = torch.empty_like(source)
        copies = self.rate(lambda: target.copy_(source), 1)
        self.record(
            "ceilings",
            device=torch.cuda.get_device_name(),
            torch=torch.__version__,
            matmul_bf16_tflops=2 * _MATRIX**3 * products / 1e12,
            copy_tb_per_s=2 * source.nbytes * copies / 1e12,
        )

    def jpeg(self) -> None:
        """Strips of a window's frames, and the same frames as single JPEGs."""
        single = []
        for strip in self.strips[:16]:
            with Image.open(io.BytesIO(strip.tobytes())) as picture:
                rows = np.asarray(picture.convert("RGB"))
            for frame in rows.reshape(-1, self.form.height, self.form.width, 3):
                out = io.BytesIO()
                Image.fromarray(frame).save(out, "JPEG", quality=self.form.quality)
                single.append(np.frombuffer(out.getvalue(), np.uint8))
        frames_per_strip = _CLIPS.window_frames
        for device in ("cpu", "mixed") if self.on_gpu else ("cpu",):
            for name, pictures, frames in (
                ("strip", self.strips, frames_per_strip),
                ("single", single, 1),
            ):
                decode = self._decoder(device, len(pictures))
                rate = self.rate(lambda d=decode, p=pictures: d(p), len(pictures) * frames)
                self.record("jpeg", device=device, stored=name, frames_per_s=rate)

    def _decoder(self, device: str, batch: int) -> Callable[[Sequence[np.ndarray]], Any]:
        @pipeline_def
        def graph() -> Any:
            coded = fn.external_source(name="coded")
            return fn.decoders.image(coded, device=device, output_type=types.DALIImageType.RGB)

        pipe: Any = graph(
            batch_size=batch,
            num_threads=self.args.threads,
            device_id=0 if self.on_gpu else None,
            prefetch_queue_depth=1,
        )
        pipe.build()

        def run(pictures: Sequence[np.ndarray]) -> Any:
            pipe.feed_input("coded", list(pictures))
            return pipe.run()

        return run

    def graph(self) -> None:
        """Decode and augment the paper recipe's three views."""
        batch, size = len(self.strips), self.args.size
        cuts = (
            ViewSlice(0, _CLIPS.clip_frames),
            ViewSlice(_CLIPS.clip_frames, _CLIPS.clip_frames),
            ViewSlice(0, _CLIPS.window_frames),
        )
        parameters = [
            draw_view(
                AugmentSpec(),
                height=self.form.height,
                width=self.form.width,
                size=size,
                frames=cuts[view].num_frames,
                seed=0,
                epoch=0,
                samples=np.arange(batch),
                view=view,
            )
            for view in range(len(cuts))
        ]
        places: tuple[tuple[Any, Any], ...] = (("cpu", "cpu"),)
        if self.on_gpu:
            places = (("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu"))
        for decode, augment in places:
            graph = ClipPipeline(
                GraphSpec(
                    batch_size=batch,
                    strip_frames=_CLIPS.window_frames,
                    height=self.form.height,
                    width=self.form.width,
                    size=size,
                    views=cuts,
                    photometric=True,
                    decode=decode,
                    augment=augment,
                    device_id=0 if self.on_gpu else None,
                    num_threads=self.args.threads,
                )
            )
            rate = self.rate(lambda g=graph: g.run(self.strips, parameters), batch)
            self.record("graph", decode=decode, augment=augment, samples_per_s=rate)

    def loader(self) -> None:
        """Batches as training gets them; the set must hold a batch."""
        config = DataConfig(
            shards=self.reader.location,
            batch_size=min(self.args.batch, self.reader.num_samples),
            size=self.args.size,
            threads=self.args.threads,
        )
        loader = TrainLoader(
            self.reader,
            config,
            open_plan(self.reader, config, 0),
            world=World(),
            device=self.device,
            epochs=(0, 1_000_000),
        )
        batches = iter(loader)
        rate = self.rate(lambda: next(batches), config.batch_size)
        self.record("loader", batch=config.batch_size, samples_per_s=rate)
        loader.close()

    def step(self) -> None:
        """Forward, losses, backward and update on random clips, without DeepSpeed."""
        args = self.args
        if self.on_gpu:
            torch.backends.cudnn.benchmark = True
        for stage in (1, 2):
            torch.manual_seed(0)
            recipe = MethodConfig(queue_length=max(1024, args.batch))
            backbone = BackboneConfig(name=args.model, width=args.width, in_channels=4)
            model = VideoModel(backbone, recipe, _CLIPS.clip_frames).to(self.device).train()
            model.backbone.channels_last()
            method = Method(model, recipe, World())
            phase = phase_at(ScheduleConfig(), 1 if stage == 1 else 60)
            optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-5)
            shape = (args.size, args.size, 3)
            short = self._random(args.batch, 2, _CLIPS.clip_frames, *shape)
            long = self._random(args.batch, _CLIPS.window_frames, *shape) if stage == 2 else None
            orders = [o.to(self.device) for o in model.orders(np.arange(args.batch), 0, 0, 16)]

            def run() -> None:
                with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
                    out = model(short, long, *orders, phase)  # noqa: B023 - called in this round
                method.losses(out, phase, with_health=False).total.backward()  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023

            rate = self.rate(run, args.batch)
            memory = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None
            self.record(
                "step", model=args.model, stage=stage, samples_per_s=rate, memory_gib=memory
            )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)


def main(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: A part is not known.
    """
    parser = argparse.ArgumentParser(prog="tools/bench.py device")
    parser.add_argument("--shards", type=Path, required=True, help="a folder of shards")
    parser.add_argument("--parts", nargs="+", default=list(_NAMES), help=" ".join(_NAMES))
    parser.add_argument("--batch", type=int, default=256, help="samples a step")
    parser.add_argument("--size", type=int, default=112, help="pixels of a view")
    parser.add_argument("--model", default="r3d18", choices=["r3d18", "s3d"])
    parser.add_argument("--width", type=int, default=64, help="channels of the stem")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines to append to")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - set(_NAMES))
    if unknown:
        raise ConfigError(
            f"tools/bench.py device has no part {unknown[0]}; use {', '.join(_NAMES)}"
        )
    bench = _Bench(args)
    for part in args.parts:
        getattr(bench, part)()
