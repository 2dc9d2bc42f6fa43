"""Every metric that Strata exports: the source of the exporter, docs/metrics.md and the dashboards.

Prometheus naming: base units, `_total` for counters, ratios from 0 to 1.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOGUE", "Metric", "Role", "Section"]

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["train", "evaluate", "preprocess"]
Section = Literal["Verdict", "Training", "Data path", "GPU", "Host", "Process"]


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Args:
        name: Full Prometheus name, with unit.
        kind: Its Prometheus type.
        unit: What a value counts, in base units.
        help: One sentence.
        section: Where docs/metrics.md explains it.
        advice: What to do when it looks wrong.
        labels: Label names.
        max_series: Most combinations of label values in a process; more are refused.
        buckets: Upper bounds, for histograms.
        roles: The processes that have it.
        absent: When it is not there; empty if it always is once training runs.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    section: Section
    advice: str
    labels: tuple[str, ...] = ()
    max_series: int = 1
    buckets: tuple[float, ...] = ()
    roles: tuple[Role, ...] = ("train",)
    absent: str = ""


_ALL: tuple[Role, ...] = ("train", "evaluate", "preprocess")
_LOADING: tuple[Role, ...] = ("train", "evaluate")
_STEP_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_NO_NVML = "Where there is no GPU or no NVML, or this GPU does not offer the reading."
_NO_GPM = "Where the GPU has no GPM (before Hopper), and in the first scrape: GPM compares two."
_ONE_A_NODE = "On local ranks other than 0: one process tells of the whole node."

_VERDICT = (
    Metric(
        "strata_bound",
        "gauge",
        "0 or 1",
        "1 for what held the last minute's steps back, 0 for the others.",
        "Verdict",
        "Read `by`: data: see the Data path dashboard; compute: good, unless SM activity is low; "
        "communication: see the straggler first, then the network; host: Python, the launches of "
        "kernels, a machine shared with others; checkpoint: save less often or to a faster disk.",
        labels=("by",),
        max_series=5,
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_time_share_ratio",
        "gauge",
        "ratio",
        "Share of the last minute that the slowest rank spent on a part.",
        "Verdict",
        "The verdict is the largest of these. The sum is 1.",
        labels=("part",),
        max_series=5,
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_data_bound_by",
        "gauge",
        "0 or 1",
        "1 for the loader's longer part: `read` (storage), `decode` (a decoding engine of the GPU "
        "is saturated) or `graph` (decoding and augmentation, no engine saturated).",
        "Verdict",
        "read: faster or more local storage, larger `data.pool_samples`; decode: store smaller "
        "frames; graph: give `data.threads`, decode on the GPU, augment less.",
        labels=("part",),
        max_series=3,
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_straggler_ratio",
        "gauge",
        "ratio",
        "Own time (without communication) of the slowest rank over the median of the others.",
        "Verdict",
        "Above 1.2 the others wait: look at `strata_straggler_rank`'s node for throttled clocks, "
        "other processes, a slower disk.",
        absent="With one rank.",
    ),
    Metric(
        "strata_straggler_rank",
        "gauge",
        "rank",
        "The rank with the largest own time.",
        "Verdict",
        "If it is always the same one, its machine is at fault; if it changes, nothing is.",
        absent="With one rank.",
    ),
    Metric(
        "strata_own_step_seconds",
        "gauge",
        "seconds",
        "Mean time of this rank's steps without communication, last interval.",
        "Verdict",
        "Compare ranks: they should agree within a few per cent.",
        absent="In the first interval of a run.",
    ),
)

_TRAINING = (
    Metric(
        "strata_samples_total",
        "counter",
        "samples",
        "Samples (videos) trained on, or whose features were extracted, by this rank.",
        "Training",
        "Flat: the run hangs or waits; see the verdict.",
        roles=_LOADING,
    ),
    Metric(
        "strata_clips_total",
        "counter",
        "clips",
        "Clips put through the backbone by this rank.",
        "Training",
        "Two a sample, three with the long sequence.",
        roles=_LOADING,
    ),
    Metric(
        "strata_steps_total",
        "counter",
        "steps",
        "Optimizer steps taken.",
        "Training",
        "Flat: see `strata_samples_total`.",
    ),
    Metric(
        "strata_skipped_steps_total",
        "counter",
        "steps",
        "Steps left out for a loss or a gradient that is not finite.",
        "Training",
        "One now and then is harmless; more: smaller `engine.learning_rate`, or "
        "`engine.grad_clip 1`.",
    ),
    Metric(
        "strata_step_duration_seconds",
        "histogram",
        "seconds",
        "Wall time of a training step on the host, waiting for data included.",
        "Training",
        "A second hump is a stall of storage, a checkpoint, or garbage collection.",
        buckets=_STEP_BUCKETS,
    ),
    Metric(
        "strata_device_seconds_total",
        "counter",
        "seconds",
        "Time that the device worked on steps, without communication.",
        "Training",
        "Its rate is the share of time in which the device had work.",
    ),
    Metric(
        "strata_optimizer_seconds_total",
        "counter",
        "seconds",
        "Of `strata_device_seconds_total`, the optimizer's update.",
        "Training",
        "More than a tenth of it: a larger batch, or `engine.zero 1` over many ranks.",
    ),
    Metric(
        "strata_communication_seconds_total",
        "counter",
        "seconds",
        "Time in which gradients were averaged, waiting for slower ranks included.",
        "Training",
        "High with a straggler: mend that rank. High without: the network, or too small a batch.",
    ),
    Metric(
        "strata_samples_per_second",
        "gauge",
        "samples/second",
        "Samples a second on all ranks, last interval.",
        "Training",
        "Compare with `--plan_only` and docs/benchmarks.md; the verdict says what holds it back.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_model_flops_per_second",
        "gauge",
        "operations/second",
        "Additions and multiplications of the encoder a second on this rank, last interval.",
        "Training",
        "Changes with the stage, as the long sequence is added.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_mfu_ratio",
        "gauge",
        "ratio",
        "`strata_model_flops_per_second` over the GPU's dense peak at the precision in use.",
        "Training",
        "3D convolutions of few channels stay far below 0.5; a drop at equal settings is a fault.",
        absent="On CPUs and on GPUs whose peak is not in train/throughput.py.",
    ),
    Metric(
        "strata_loss",
        "gauge",
        "nats",
        "A loss term, before its weight; `total` is weighted.",
        "Training",
        "At `strata_loss_chance` for long: nothing is learnt: see the health, the learning rate, "
        "the augmentation. NaN: see `strata_skipped_steps_total`.",
        labels=("term",),
        max_series=16,
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_loss_chance",
        "gauge",
        "nats",
        "What a term is if all its candidates look alike.",
        "Training",
        "A constant of the settings.",
        labels=("term",),
        max_series=16,
    ),
    Metric(
        "strata_health",
        "gauge",
        "see docs/method.md",
        "Label-free health of the representation.",
        "Training",
        "`embedding_std` towards 0 or `embedding_effective_rank` towards 1: collapse; "
        "few `prototypes_in_use`: smaller `method.sinkhorn_epsilon`; `cosine_altered_*` near 1 in "
        "stage 2: blind to time; `graph_off_diagonal_mass` below 0.001: the graph is the identity, "
        "and L_gr a plain contrast (docs/method.md).",
        labels=("measure",),
        max_series=32,
        absent="Before `monitor.health_every` steps.",
    ),
    Metric(
        "strata_probe_recall_ratio",
        "gauge",
        "ratio",
        "R@k of retrieval on the labelled set of `probe`, last measured.",
        "Training",
        "At `strata_probe_chance_ratio`, or below its value at epoch 0 (untrained): see health. "
        "Protocol: the `probe` records of log.jsonl.",
        labels=("k",),
        max_series=5,
        absent="Without `probe.every_epochs`, and on ranks other than 0.",
    ),
    Metric(
        "strata_probe_accuracy_ratio",
        "gauge",
        "ratio",
        "Top-1 on the labelled set of `probe`, last measured: `knn`, a vote of the nearest, and "
        "`linear`, logistic regression.",
        "Training",
        "As `strata_probe_recall_ratio`.",
        labels=("readout",),
        max_series=2,
        absent="Without `probe.every_epochs`, and on ranks other than 0.",
    ),
    Metric(
        "strata_probe_chance_ratio",
        "gauge",
        "ratio",
        "What R@k is in expectation if the gallery's order is random.",
        "Training",
        "A constant of the labelled set.",
        labels=("k",),
        max_series=5,
        absent="Without `probe.every_epochs`, and on ranks other than 0.",
    ),
    Metric(
        "strata_probe_epoch",
        "gauge",
        "epochs",
        "Epochs done when retrieval was last measured.",
        "Training",
        "Goes up by `probe.every_epochs`.",
        absent="Without `probe.every_epochs`, and on ranks other than 0.",
    ),
    Metric(
        "strata_probe_seconds_total",
        "counter",
        "seconds",
        "Time for which retrieval on the labelled set kept training waiting.",
        "Training",
        "Its rate is the share of time lost: fewer `probe.num_clips`, more `probe.every_epochs`.",
        absent="Without `probe.every_epochs`.",
    ),
    Metric(
        "strata_learning_rate",
        "gauge",
        "1",
        "Learning rate of the last step.",
        "Training",
        "Drops at `schedule.lr_drop_epochs`.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_grad_norm",
        "gauge",
        "1",
        "Norm of the gradient before clipping.",
        "Training",
        "Spikes come before NaN: use `engine.grad_clip`.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_epoch",
        "gauge",
        "epochs",
        "Epoch in progress, from 0.",
        "Training",
        "Goes back only where a run is resumed.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_step",
        "gauge",
        "steps",
        "Steps done since the run's start.",
        "Training",
        "Goes back only where a run is resumed.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_stage",
        "gauge",
        "stage",
        "Stage of the method, 1 or 2.",
        "Training",
        "Speed and losses change at the switch; that is as it should be.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_checkpoint_duration_seconds",
        "gauge",
        "seconds",
        "Time until the last checkpoint was whole on disk, most of it beside training.",
        "Training",
        "Longer than the time between two: save less often or to a faster disk.",
        absent="Before the first checkpoint, and on ranks other than 0.",
    ),
    Metric(
        "strata_checkpoint_blocked_seconds",
        "gauge",
        "seconds",
        "Time for which the last checkpoint kept training waiting.",
        "Training",
        "Copying the state; long if the one before is still being written.",
        absent="Before the first checkpoint.",
    ),
    Metric(
        "strata_checkpoint_seconds_total",
        "counter",
        "seconds",
        "Time for which checkpoints kept training waiting.",
        "Training",
        "Its rate is the share of time lost.",
    ),
    Metric(
        "strata_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "unix time",
        "When the last whole checkpoint was complete.",
        "Training",
        "Long ago: a full disk (see `strata_disk_free_bytes`) or a run that hangs.",
        absent="Before the first checkpoint, and on ranks other than 0.",
    ),
    Metric(
        "strata_restarts_total",
        "counter",
        "starts",
        "Times that this run was started again, counted in its log.jsonl.",
        "Training",
        "Grows by itself: the scheduler restarts a run that dies; read its last lines.",
        absent="On ranks other than 0.",
    ),
    Metric(
        "strata_log_records_lost_total",
        "counter",
        "records",
        "Records of log.jsonl that could not be written; the work continues without them.",
        "Training",
        "Grows: the disk of the run's folder is full or gone; a checkpoint will fail next.",
        absent="On ranks other than 0.",
    ),
)

_DATA = (
    Metric(
        "strata_frames_decoded_total",
        "counter",
        "frames",
        "Frames decoded by this rank.",
        "Data path",
        "Window frames times samples: no frame is decoded that is not used.",
        roles=_LOADING,
    ),
    Metric(
        "strata_bytes_read_total",
        "counter",
        "bytes",
        "Coded bytes read from shards by this rank.",
        "Data path",
        "Near what the storage gives: it is the limit.",
        roles=_LOADING,
    ),
    Metric(
        "strata_decode_faults_total",
        "counter",
        "samples",
        "Samples that failed to decode, each counted once.",
        "Data path",
        "`tools/verify_shards.py` names them all; shard these videos again.",
    ),
    Metric(
        "strata_data_wait_seconds_total",
        "counter",
        "seconds",
        "Time spent waiting for the loader.",
        "Data path",
        "Its rate is the share of time in which training waits.",
    ),
    Metric(
        "strata_data_wait_ratio",
        "gauge",
        "ratio",
        "Share of the last interval spent waiting for data.",
        "Data path",
        "Above 0.05: see `strata_data_bound_by`.",
        absent="In the first interval of a run.",
    ),
    Metric(
        "strata_loader_queue_depth",
        "gauge",
        "batches",
        "Batches that are ready, after the last was taken.",
        "Data path",
        "0: the loader is the slower side; full: training is.",
        absent="Before the first batch.",
    ),
    Metric(
        "strata_loader_seconds_total",
        "counter",
        "seconds",
        "Time of the loader's thread: `read` coded bytes, or run the `graph` that decodes and "
        "augments.",
        "Data path",
        "The larger one is what to mend when training waits for data.",
        labels=("part",),
        max_series=2,
    ),
    Metric(
        "strata_videos_sharded_total",
        "counter",
        "videos",
        "Source videos dealt with by preprocessing, by what became of them.",
        "Data path",
        "Many `rejected`: samples.jsonl beside the shards says why for each.",
        labels=("outcome",),
        max_series=4,
        roles=("preprocess",),
    ),
    Metric(
        "strata_frames_sharded_total",
        "counter",
        "frames",
        "Frames written to shards.",
        "Data path",
        "Compare its rate with docs/benchmarks.md; more `--workers`, more slices.",
        roles=("preprocess",),
    ),
)


def _gpu(
    name: str,
    unit: str,
    help: str,
    advice: str,
    *,
    kind: Kind = "gauge",
    gpm: bool = False,
    labels: tuple[str, ...] = (),
    max_series: int = 1,
) -> Metric:
    """An entry of the GPU: a label `gpu`, of this rank's GPU alone."""
    return Metric(
        f"strata_gpu_{name}",
        kind,
        unit,
        help,
        "GPU",
        advice,
        labels=("gpu", *labels),
        max_series=max_series,
        roles=_LOADING,
        absent=_NO_GPM if gpm else _NO_NVML,
    )


_GPU = (
    _gpu(
        "up",
        "0 or 1",
        "1 while NVML answers for this rank's GPU, 0 once it is lost.",
        "0: the GPU fell off the bus; `dmesg | grep Xid`, then reset or replace it.",
    ),
    _gpu(
        "utilization_ratio",
        "ratio",
        "Share of time in which any kernel ran.",
        "Low: see the verdict. High says little: one thread on one SM counts; see SM activity.",
    ),
    _gpu(
        "sm_activity_ratio",
        "ratio",
        "Share of the streaming multiprocessors that had work, over time.",
        "Low with high utilisation: kernels too small: larger batch.",
        gpm=True,
    ),
    _gpu(
        "sm_occupancy_ratio",
        "ratio",
        "Warps resident on the multiprocessors over the most possible.",
        "Low is no fault by itself.",
        gpm=True,
    ),
    _gpu(
        "tensor_activity_ratio",
        "ratio",
        "Share of time in which the tensor cores worked.",
        "Near 0 with `engine.precision bf16`: convolutions fell back to other kernels.",
        gpm=True,
    ),
    _gpu(
        "memory_bandwidth_ratio",
        "ratio",
        "Share of the device memory's bandwidth in use (GPM), or of time in which it was used.",
        "Near 1: bound by memory: normalisation, activation, channels-first layouts.",
    ),
    _gpu(
        "decoder_utilization_ratio",
        "ratio",
        "Share of time in which the video decoders worked, mean of the engines.",
        "Near 1 while bound by data: the decoders are the limit; use the `jpeg` payload.",
    ),
    _gpu(
        "jpeg_utilization_ratio",
        "ratio",
        "Share of time in which the JPEG engines worked, mean of the engines.",
        "Near 1 while bound by data: the limit; smaller frames, or a share on the SMs.",
    ),
    _gpu(
        "memory_used_bytes",
        "bytes",
        "Device memory in use, by all processes.",
        "Near the total: smaller batch, or `engine.zero 1`.",
    ),
    _gpu("memory_total_bytes", "bytes", "Device memory.", "A constant of the GPU."),
    _gpu("power_watts", "watts", "Power draw.", "At the limit: clocks drop; see throttling."),
    _gpu(
        "energy_joules_total",
        "joules",
        "Energy since the driver was loaded.",
        "Its rate is the mean power.",
        kind="counter",
    ),
    _gpu(
        "temperature_celsius",
        "celsius",
        "Temperature of the chip.",
        "Above 80: cooling; thermal throttling follows.",
    ),
    _gpu(
        "clock_hertz",
        "hertz",
        "Current clock.",
        "Below its usual value under load: see throttling.",
        labels=("domain",),
        max_series=3,
    ),
    _gpu(
        "throttled",
        "0 or 1",
        "1 while this reason holds the clocks down.",
        "power: raise the limit or accept; thermal: cooling; hardware: the power supply.",
        labels=("reason",),
        max_series=4,
    ),
    _gpu(
        "pcie_bytes_per_second",
        "bytes/second",
        "Traffic over PCIe in the last instant.",
        "High `rx`: batches come decoded from the host; decode on the GPU.",
        labels=("direction",),
        max_series=2,
    ),
    _gpu(
        "nvlink_bytes_per_second",
        "bytes/second",
        "Traffic over all NVLinks since the last scrape.",
        "0 with several GPUs on a machine that has NVLink: NCCL goes another way; NCCL_DEBUG=INFO.",
        gpm=True,
        labels=("direction",),
        max_series=2,
    ),
)


def _host(
    name: str,
    unit: str,
    help: str,
    advice: str,
    *,
    kind: Kind = "gauge",
    labels: tuple[str, ...] = (),
    max_series: int = 1,
    absent: str = _ONE_A_NODE,
) -> Metric:
    """An entry of the node."""
    return Metric(
        f"strata_{name}",
        kind,
        unit,
        help,
        "Host",
        advice,
        labels=labels,
        max_series=max_series,
        roles=_ALL,
        absent=absent,
    )


_HOST = (
    _host(
        "host_cpu_seconds_total",
        "seconds",
        "Time of all cores by mode.",
        "`iowait`: storage; `steal`: another virtual machine; `busy` at the number of cores: "
        "decoding on the CPU is the limit.",
        kind="counter",
        labels=("mode",),
        max_series=4,
    ),
    _host("host_cpus", "cores", "Cores that this process may use.", "A constant of the job."),
    _host("host_memory_total_bytes", "bytes", "Memory.", "A constant of the node."),
    _host(
        "host_memory_available_bytes",
        "bytes",
        "Memory that can be had without swapping.",
        "Near 0: fewer ranks, a smaller `data.prefetch`.",
    ),
    _host(
        "host_shm_free_bytes",
        "bytes",
        "Free space of /dev/shm.",
        "Near 0: NCCL and gloo fail; in a container use `--shm-size` or `--ipc=host`.",
    ),
    _host(
        "disk_size_bytes",
        "bytes",
        "Size of the file system of the `run` and of the `shards`.",
        "A constant of the disk.",
        labels=("place",),
        max_series=2,
    ),
    _host(
        "disk_free_bytes",
        "bytes",
        "Free space there.",
        "A checkpoint needs about three times the weights: lower `checkpoint.keep`.",
        labels=("place",),
        max_series=2,
    ),
    _host(
        "host_disk_bytes_total",
        "bytes",
        "Bytes moved by all disks.",
        "`read` near what the disk gives while bound by data: it is the limit.",
        kind="counter",
        labels=("direction",),
        max_series=2,
        absent=f"{_ONE_A_NODE} In containers that hide the disks.",
    ),
    _host(
        "host_network_bytes_total",
        "bytes",
        "Bytes over all network interfaces but loopback.",
        "Near the link's speed: communication or remote storage is the limit.",
        kind="counter",
        labels=("direction",),
        max_series=2,
        absent=f"{_ONE_A_NODE} Where there is loopback alone.",
    ),
)

_PROCESS = (
    Metric(
        "strata_process_cpu_seconds_total",
        "counter",
        "seconds",
        "CPU time of this process, all threads.",
        "Process",
        "Its rate is the cores in use; near all of them: decoding on the CPU is the limit.",
        roles=_ALL,
    ),
    Metric(
        "strata_process_resident_memory_bytes",
        "gauge",
        "bytes",
        "Memory of this process, mapped shards in use included.",
        "Process",
        "Grows without end: a leak; please report it.",
        roles=_ALL,
    ),
    Metric(
        "strata_build_info",
        "gauge",
        "1",
        "Always 1; the label tells the version.",
        "Process",
        "Compare ranks: all must be of one version.",
        labels=("version",),
        roles=_ALL,
    ),
)

CATALOGUE: tuple[Metric, ...] = (*_VERDICT, *_TRAINING, *_DATA, *_GPU, *_HOST, *_PROCESS)
