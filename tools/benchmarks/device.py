"""How fast a machine decodes, loads and trains: `python tools/bench.py device --shards DIR`.

Each part alone, then the complete training, in one run, so that the parts can be compared:
decoders, decoding with augmentation, the loader, the training step on clips that are already in
memory (each variant differs from the plain one in one thing), the step's speed and gradient at each
precision, and the real run. On a CPU the same, at the size asked for.
"""

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from strata.dataload.augment import AugmentSpec, draw_view
from strata.dataload.clips import ClipSpec
from strata.dataload.config import DataConfig
from strata.dataload.graph_spec import GraphSpec, ViewSlice
from strata.dataload.graphs import pipeline_class
from strata.dataload.loader import TrainLoader
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import World
from strata.limits import usable_cpus
from strata.tools.benchmarks import train as bench_train
from strata.tools.benchmarks.decoders import decodings
from strata.tools.benchmarks.measure import (
    append_record,
    best_device,
    machine,
    machine_line,
    parse_options,
    rate,
    require_known,
    table,
    wait_for,
)
from strata.tools.benchmarks.step import (
    VARIANTS,
    Variant,
    bytes_moved,
    measure_precisions,
    random_step,
)
from strata.train.config import TrainConfig
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import BackboneConfig
from strata.train.monitor.cost_model import step_cost

__all__ = ["main"]

_CLIPS = ClipSpec()
_PARTS = ("ceilings", "decode", "graph", "loader", "step", "precision", "training")


def _default_variants() -> tuple[str, ...]:
    """All variants on a GPU, those that suit a CPU on a CPU."""
    if torch.cuda.is_available():
        return tuple(name for name in VARIANTS if not name.startswith("bf16"))
    return ("plain", "channels first", "bf16", "bf16, folded frames", "s3d")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How fast a machine decodes, loads and trains, each part alone and then together."""

    shards: Path
    """A folder of jpeg shards."""
    parts: tuple[str, ...] = _PARTS
    """Parts to measure: ceilings, decode, graph, loader, step, precision, training."""
    variants: tuple[str, ...] = dataclasses.field(default_factory=_default_variants)
    """Variants of the step."""
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    """Stages of the recipe to measure."""
    batch: int = 256
    """Samples in a step."""
    size: int = 112
    """Rows and columns of a view."""
    width: int = 64
    """Channels of the stem."""
    threads: tuple[int, ...] = (usable_cpus(),)
    """Threads of DALI's pool, one value after the other."""
    seconds: float = 4.0
    """Duration of each measurement."""
    steps: int = 20
    """Steps of the real run, of each stage."""
    out: Path | None = None
    """JSON lines to append to."""
    plot: Path | None = None
    """Picture to write (.png, .svg, .pdf)."""

    def __post_init__(self) -> None:
        require_known("part", self.parts, _PARTS)
        require_known("variant", self.variants, list(VARIANTS))


class _Bench:
    """Shared by all parts: device, samples, duration of a measurement, output file."""

    def __init__(self, args: DeviceOptions) -> None:
        self.args = args
        self.device = best_device()
        self.reader = ShardReader(args.shards)
        self.form = self.reader.manifest.form
        self.records: list[dict[str, Any]] = []
        self.peaks: dict[str, float] = {}
        self._copy_rate = 0.0
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
        """Items a second, after two calls that are not measured."""
        return rate(run, self.args.seconds, items=items, warmup=2, wait=self._wait)

    def _wait(self) -> None:
        wait_for(self.device)

    def record(self, part: str, name: str, **fields: Any) -> None:
        """Print a measurement, and append it to the file that was asked for.

        Args:
            part: The part of the benchmark.
            name: What distinguishes it from others of its part.
            fields: The figures, and what they depend on.
        """
        record = {"part": part, "name": name, **fields}
        self.records.append(record)
        append_record(self.args.out, record)

    def peak(self, precision: str) -> float:
        """Operations a second of the machine's own matrix product, measured once per precision."""
        if precision not in self.peaks:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.peaks[precision] = bench_train.measured_peak(self.device, dtype, self.args.seconds)
        return self.peaks[precision]

    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes, measured once."""
        if not self._copy_rate:
            source = torch.empty(2**30 if self.on_gpu else 2**26, device=self.device)
            target = torch.empty_like(source)
            self._copy_rate = 2 * source.nbytes * self.rate(lambda: target.copy_(source), 1)
        return self._copy_rate

    def ceilings(self) -> None:
        """The machine's own matrix product and copy, to which the other parts are compared."""
        precision = "bf16" if self.on_gpu else "fp32"
        facts, copy = machine(self.device), self.copy_rate() / 1e9
        self.record(
            "ceilings",
            f"{facts['device']}, {precision} matrix product; copy {copy:,.0f} GB/s",
            **facts,
            precision=precision,
            tflops=self.peak(precision) / 1e12,
            copy_gb_per_s=copy,
        )

    def decode(self) -> None:
        """Strips of a window's frames, the same frames as single JPEGs, and video."""
        for each in decodings(
            self.reader, self.strips, threads=self.args.threads, on_gpu=self.on_gpu
        ):
            fields = {n: v for n, v in vars(each).items() if n != "run"}
            rate = self.rate(each.run, each.frames)
            samples = rate / _CLIPS.window_frames
            name = f"{each.stored}, {each.device}, {each.threads} threads"
            if each.start:
                name += f", from frame {each.start}"
            if each.hardware_share is not None:
                name += f", {each.hardware_share:.0%} to the engines"
            self.record("decode", name, **fields, frames_per_s=rate, samples_per_s=samples)

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
        for threads in self.args.threads:
            for decode, augment in places:
                spec = GraphSpec(
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
                    num_threads=threads,
                )
                graph = pipeline_class(spec.augment)(spec)
                rate = self.rate(lambda g=graph: g.start(self.strips, parameters)(), batch)
                places_of = {"decode": decode, "augment": augment, "threads": threads}
                name = f"decode {decode}, augment {augment}, {threads} threads"
                self.record("graph", name, **places_of, samples_per_s=rate)

    def loader(self) -> None:
        """Batches as training gets them; the set must hold a batch."""
        batch = min(self.args.batch, self.reader.num_samples)
        places: tuple[Any, ...] = ("cpu", "gpu") if self.on_gpu else ("cpu",)
        for decode in places:
            config = DataConfig(
                shards=self.reader.location,
                batch_size=batch,
                size=self.args.size,
                threads=self.args.threads[-1],
                decode=decode,
            )
            loader = TrainLoader(
                self.reader,
                config,
                open_plan(self.reader, config, 0),
                world=World(),
                device=self.device,
                epochs=(0, 1_000_000),
            )
            with loader:
                batches = iter(loader)
                rate = self.rate(lambda b=batches: next(b), batch)
            name = f"decode {decode}"
            self.record("loader", name, decode=decode, batch=batch, samples_per_s=rate)

    def step(self) -> None:
        """Forward, losses, backward and update on random clips, without DeepSpeed."""
        for name in self.args.variants:
            for stage in self.args.stages:
                self._step(name, VARIANTS[name], stage)
                gc.collect()
                if self.on_gpu:
                    torch.cuda.empty_cache()

    def _step(self, name: str, variant: Variant, stage: int) -> None:
        batch = max(int(self.args.batch * variant.batch_share), 2)
        config = TrainConfig(
            run=Path("unset"),
            data=DataConfig(shards=self.reader.location, batch_size=batch, size=self.args.size),
            model=BackboneConfig(
                name=variant.model,  # type: ignore[arg-type]
                width=self.args.width,
                in_channels=variant.in_channels,  # type: ignore[arg-type]
            ),
            method=MethodConfig(queue_length=max(1024, batch)),
            engine=variant.engine,
        )
        dtype = variant.engine.autocast_on(self.device)
        precision = "fp32" if dtype is None else "bf16"
        if self.on_gpu:
            torch.backends.cudnn.benchmark = True
            torch.cuda.reset_peak_memory_stats()
        step = random_step(config, stage, self.device)
        rate = self.rate(step.run, batch)
        flops = step_cost(config, videos=batch, stage=stage).flops * rate / batch
        moved = bytes_moved(config, stage=stage, dtype=dtype) * rate / batch
        self.record(
            "step",
            f"{name}, stage {stage}, batch {batch}",
            variant=name,
            stage=stage,
            batch=batch,
            precision=precision,
            samples_per_s=rate,
            tflops=flops / 1e12,
            mfu=flops / self.peak(precision),
            of_copy=moved / self.copy_rate(),
            memory_gib=torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
        )

    def precision(self) -> None:
        """The step's speed at each precision, and its gradient against fp32's."""
        for found in measure_precisions(
            self.reader,
            self.device,
            batch=min(self.args.batch, self.reader.num_samples),
            size=self.args.size,
            width=self.args.width,
            stages=self.args.stages,
            rate=self.rate,
        ):
            name = f"{found['precision']}, stage {found['stage']}, batch {found['batch']}"
            self.record("precision", name, **found)

    def training(self) -> None:
        """The real run, and its rate as a share of the step's alone."""
        batch = min(self.args.batch, self.reader.num_samples)
        words = ["--data.shards", self.reader.location, "--data.batch_size", batch]
        words += ["--data.size", self.args.size, "--data.threads", self.args.threads[-1]]
        words += ["--model.width", self.args.width, "--model.in_channels", 4]
        words += ["--method.queue_length", max(1024, batch)]
        words += ["--steps", self.args.steps, "--seconds", self.args.seconds]
        words += ["--stages", *self.args.stages]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "train.jsonl"
            bench_train.main([*map(str, words), "--out", str(out)])
            lines = out.read_text(encoding="utf-8").splitlines()
        for found in map(json.loads, lines):
            shares = {n: s / found["step_s"] for n, s in found["parts_s"].items()}
            alone = [
                r["samples_per_s"]
                for r in self.records
                if r["part"] == "step"
                and r["variant"] == "plain"
                and (r["stage"], r["batch"]) == (found["stage"], batch)
            ]
            self.record(
                "training",
                f"stage {found['stage']}, batch {batch}",
                stage=found["stage"],
                batch=batch,
                precision="bf16" if found["autocast"] else "fp32",
                samples_per_s=found["samples_per_s"],
                of_step_alone=found["samples_per_s"] / alone[0] if alone else None,
                tflops=found["flops_per_s"] / 1e12,
                mfu=found["mfu"],
                memory_gib=found["memory_bytes"] / 2**30,
                shares=shares,
            )


def device_table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table; decoders in windows of 32 frames, as a sample has."""
    rows = []
    columns = {
        "samples_per_s": ",.1f",
        "frames_per_s": ",.0f",
        "tflops": ".2f",
        "mfu": ".1%",
        "of_copy": ".0%",
        "memory_gib": ".1f",
    }
    for record in records:
        figures = [(record.get(name), form) for name, form in columns.items()]
        cells = ["" if value is None else f"{value:{form}}" for value, form in figures]
        rows.append([record["part"], record["name"], *cells])
    text = table(
        ["part", "", "samples/s", "frames/s", "TFLOP/s", "of peak", "of copy", "GiB"], rows
    )
    for record in records:
        if record["part"] == "precision":
            text += (
                f"\n\nprecision, {record['name']}: the encoder's gradient has cosine "
                f"{record['cosine']:.3f} with fp32's and {record['norm_ratio']:.3f} of its norm, "
                f"all other parameters' cosine {record['rest_cosine']:.3f}"
            )
        if record["part"] == "training":
            parts = ", ".join(f"{n} {s:.1%}" for n, s in record["shares"].items())
            alone = record["of_step_alone"]
            ratio = "step alone not measured" if alone is None else f"{alone:.2f} of the step alone"
            text += f"\n\ntraining, {record['name']}: {ratio}; {parts}"
    return text


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Samples a second of all parts as bars, on a logarithmic scale."""
    from matplotlib.figure import Figure

    shown = [r for r in records if "samples_per_s" in r][::-1]
    figure = Figure(figsize=(9, 0.6 + 0.24 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    parts = [p for p in _PARTS if any(r["part"] == p for r in shown)]
    colours = {part: f"C{place}" for place, part in enumerate(parts)}
    rates = [r["samples_per_s"] for r in shown]
    names = [f"{r['part']}: {r['name']}" for r in shown]
    bars = axes.barh(names, rates, color=[colours[r["part"]] for r in shown])
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=7)
    axes.set(xscale="log", xlabel="samples/s (32 frames each)", xlim=(None, 3 * max(rates)))
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str]) -> None:
    """Run the benchmark.

    Raises:
        ConfigError: A part or a variant is not known.
    """
    options = parse_options(DeviceOptions, argv, "device")
    print(machine_line(machine(best_device())))
    bench = _Bench(options)
    for part in options.parts:
        getattr(bench, part)()
    print(device_table(bench.records))
    if options.plot is not None:
        plot(bench.records, options.plot)
