"""Pretrain a video encoder: parse, build, fit, close.

deepspeed train/main.py --config configs/pretrain/ucf101_r3d18.yaml \
    --data.shards shards/ucf101/train01 --run runs/a
"""

import dataclasses
import sys
from collections.abc import Sequence

import torch

from strata import commands
from strata.code_digest import code_digest
from strata.config import dotted, dump_config, parse_config, plain
from strata.dataload.augment_choice import AugmentChoice, choose_augment
from strata.dataload.reader import ShardReader
from strata.dataload.recipes import open_plan
from strata.distributed import (
    World,
    agree,
    broadcast_object,
    current_world,
    join_world,
    leave_world,
    only_writer,
)
from strata.errors import EXIT_PREEMPTED, ConfigError, run_rank
from strata.logs import set_up_logging
from strata.train.config import TrainConfig
from strata.train.engine_config import choose_device
from strata.train.method.teacher import Teacher
from strata.train.monitor.run_monitor import serve_run
from strata.train.pretraining import open_pretraining
from strata.train.representation.online_retrieval import OnlineProbe
from strata.train.run.checkpoint import read_state
from strata.train.run.history import find_checkpoint
from strata.train.run.run_plan import describe_run


def main(argv: Sequence[str]) -> int:
    """Run one rank of a pretraining run and return its exit status."""
    set_up_logging()
    config = parse_config(
        TrainConfig, argv, prog="train/main.py", description="Pretrain a video encoder."
    )
    config.check_world(current_world())
    reader = ShardReader(config.data.shards, config.data.check, config.data.download)
    probe = None
    if config.probe.every_epochs:
        clip_frames = config.data.clips.clip_frames
        probe = OnlineProbe(config.probe, size=config.data.size, clip_frames=clip_frames)
    teacher = None if config.method.teacher is None else Teacher(config.method.teacher)
    device = choose_device(config.engine, current_world())
    if config.plan_only:
        _print_plan(config, device, reader)
        return 0
    world = join_world(device, config.engine.world_timeout_s)
    agree(_facts(config, reader, teacher) | ({} if probe is None else probe.digests()))
    alone = only_writer(config.run, "training", world, advice="wait for it, or use another --run")
    with alone as lock, serve_run(config, world) as metrics:
        config, choice = settle_augment(config, reader, world=world, device=device)
        trainer = open_pretraining(
            config,
            world=world,
            device=device,
            reader=reader,
            metrics=metrics,
            probe=probe,
            teacher=teacher,
            lock=lock,
            augment_choice=choice,
        )
        trainer.resume(config.resume)
        if world.is_first:
            _write_config(config)
        finished = trainer.fit()
    # Not after an error: destroying a group that has lost a rank may hang.
    leave_world()
    if finished:
        if world.is_first:
            print(f"the encoder is in {find_checkpoint(config.run)}; to evaluate it:")
            words = ("--checkpoint", config.run, "--train", config.data.shards, "--test", "DIR")
            print(f"  {commands.line('evaluate', 'compare', *words)}", flush=True)
        return 0
    print(
        f"stopped at step {trainer.state.step} after a signal; resume with --resume auto "
        f"(exit code {EXIT_PREEMPTED})",
        file=sys.stderr,
        flush=True,
    )
    return EXIT_PREEMPTED


def settle_augment(
    config: TrainConfig, reader: ShardReader, *, world: World, device: torch.device
) -> tuple[TrainConfig, AugmentChoice | None]:
    """Replace `data.augment: auto` on a GPU by the device that the run augments on.

    A run that is resumed uses the device that its checkpoint names, so that its batches have the
    same bits as before. All ranks call it.

    Returns:
        The configuration, and the measurement if there was one.
    """
    if config.data.augment != "auto" or device.type != "cuda":
        return config, None
    found = find_checkpoint(config.run) if config.resume == "auto" else None
    before = {} if found is None else dotted(read_state(found).config)
    augment, choice = broadcast_object(before.get("data.augment", "auto")), None
    if augment not in ("cpu", "gpu"):
        plan = open_plan(reader, config.data, config.seed)
        choice = choose_augment(reader, config.data, plan, world=world, device=device)
        augment = "auto" if choice is None else choice.augment
    data = dataclasses.replace(config.data, augment=augment)
    return dataclasses.replace(config, data=data), choice


def _write_config(config: TrainConfig) -> None:
    """Write the resolved configuration to the run's folder.

    Raises:
        ConfigError: The file cannot be written.
    """
    path = config.run / "config.yaml"
    try:
        dump_config(config, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; free space") from error


def _facts(config: TrainConfig, reader: ShardReader, teacher: Teacher | None) -> dict[str, str]:
    """Facts that must be equal on all ranks; the paths of files may differ by node."""
    facts = {f"setting {k}": repr(v) for k, v in dotted(plain(config)).items()}
    for name in ("data.shards", "probe.train", "probe.test", "method.teacher"):
        del facts[f"setting {name}"]
    digests = {"data manifest": reader.manifest.digest, "code version": code_digest()}
    return facts | digests | {"teacher": "none" if teacher is None else teacher.digest}


def _print_plan(config: TrainConfig, device: torch.device, reader: ShardReader) -> None:
    """Print the run plan without writing files or forming a process group."""
    world = current_world()
    if world.is_first:
        plan = open_plan(reader, config.data, config.seed)
        page = describe_run(config, world=world, device=device, reader=reader, plan=plan)
        print(page.text())


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
