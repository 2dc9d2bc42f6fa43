"""Classifiers of one or more networks on pairs of sets: trained, tested, and their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from strata.config import plain
from strata.distributed import all_equal, only_writer
from strata.errors import ConfigError
from strata.eval.accuracy import Accuracy, ClassSpace
from strata.eval.classifier import ClassifierConfig, ClassifierRun
from strata.eval.protocols.named import PROTOCOLS, ProtocolName, protocol_words
from strata.eval.reporting import report_one
from strata.eval.results import Measurement, Row, classified
from strata.eval.session import NamedNetwork, OneNetwork, Session, network_name, open_session
from strata.eval.sets import SetPair
from strata.logs import read_json_lines

__all__ = ["ClassifierEvaluation", "NetworkAccuracy", "join_rows", "run_classifier"]


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluation(OneNetwork):
    """Settings that the linear probe and finetuning share."""

    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].finetune)
    """How the network is trained."""
    run: Path | None = None
    """Folder of the training; by default one by its settings, so that the same command resumes
    where it was stopped."""


def training_text(name: str, session: Session, config: ClassifierConfig) -> str:
    """The protocol of a trained classifier in words."""
    learns = "the encoder frozen" if config.train == "head" else "all weights learn"
    norm = "unit length and batch norm" if config.normalised else "no normalisation"
    low = config.views.crop_area[0]
    drops = ", ".join(map(str, config.lr_drop_epochs)) or "no epoch"
    optimizer = "Adam" if config.optimizer == "adam" else "SGD with momentum 0.9"
    encoder = f" (encoder x{config.backbone_lr_factor:g})" if config.train == "all" else ""
    crops = "" if config.test_crops == 1 else f", {config.test_crops} crops of each"
    return (
        f"{name}, {protocol_words(session.settings(), name)}: {learns}, {config.epochs} epochs of "
        f"one augmented clip a video at stride {config.stride} (crop from {low:g} of the area, "
        f"jitter with probability {config.views.jitter:g}, flip), {optimizer} "
        f"{config.learning_rate:g}{encoder}, x{config.lr_drop_factor:g} at {drops}, "
        f"batch {config.batch_size}, L2 {config.weight_decay:g}, {norm}, "
        f"dropout {config.dropout:g}; test of the last epoch's weights: "
        f"{session.clips_text()}{crops}, softmax probabilities averaged"
    )


@dataclass(frozen=True, kw_only=True)
class NetworkAccuracy:
    """The accuracy of a classifier of one network on one pair of sets."""

    network: NamedNetwork
    test: Accuracy
    space: ClassSpace
    train_top1: float | None = None
    """On the training set, where it was tested."""
    run: Path | None = None
    """Folder of the training, where it has one."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Of the training."""


def join_rows(tested: Sequence[NetworkAccuracy]) -> Measurement:
    """The classifiers of all networks on a pair; the first network is the evaluated one."""
    rows = [
        Row(
            name=found.network.row,
            role=found.network.role,
            shares={"Top-1": found.test.top1, "Top-5": found.test.top5},
        )
        for found in tested
    ]
    first = tested[0]
    if first.train_top1 is not None:
        rows.append(Row(name="training", role="training", shares={"Top-1": first.train_top1}))
    chance = {f"Top-{k}": min(k, len(first.space)) / len(first.space) for k in (1, 5)}
    rows.append(Row(name="chance", role="chance", shares=chance))
    details = classified(first.test, first.space, run=first.run, curves=first.curves)
    return Measurement(rows=tuple(rows), details=details)


def run_classifier(kind: Literal["linear", "finetune"], config: ClassifierEvaluation) -> None:
    """Train a classifier of each network on each pair, test it, and report Top-1 and Top-5.

    Raises:
        ConfigError: Another level than the high one is asked for.
    """
    pairs = config.open_pairs()
    if config.features.level != "high":
        raise ConfigError(
            f"features.level is {config.features.level}; {kind} trains on the high level, other "
            "levels are for retrieval and the cached probe"
        )
    with open_session(config) as session:
        measured = []
        for pair in pairs:
            # All networks are trained, also after one that --training.max_steps stopped.
            tested = [
                _train_and_test(kind, session, config, pair, network) for network in config.networks
            ]
            complete = [found for found in tested if found is not None]
            if len(complete) == len(tested):
                measured.append(join_rows(complete))
        if len(measured) == len(pairs):
            text = training_text(kind, session, config.training)
            report_one(session, config.report_name(kind), kind, text, pairs, measured)


def _train_and_test(
    name: str,
    session: Session,
    config: ClassifierEvaluation,
    pair: SetPair,
    network: NamedNetwork,
) -> NetworkAccuracy | None:
    """Train one network and test it; None where --training.max_steps stopped it before its end."""
    training = config.training
    if network.which is not None:
        name = f"{name}-{network_name(network.which)}"
    backbone, identity = session.network(network.which)
    sets = pair.facts()
    clips = session.features.clips()
    described = {
        "evaluation": name,
        "network": identity,
        "digests": {k: v["manifest_digest"] for k, v in sets.items()},
        "training": plain(replace(training, max_steps=0)),
        "size": clips.size,
        "clip_frames": clips.clip_frames,
        "model": session.state.config["model"],
    }
    if config.run is None:
        folder = session.folder(name, described)
    else:
        folder = config.run / f"{pair.data}-{pair.split}" if config.data else config.run
        if network.role != "measured":
            folder = folder / network_name(network.which)
    all_equal("folder of the training", str(folder))
    advice = "wait for it, or use another --run"
    with only_writer(folder, "training a classifier", session.world, advice=advice):
        run = ClassifierRun(
            backbone,
            pair.train,
            pair.test,
            training,
            clips,
            folder=folder,
            described=described,
            world=session.world,
            device=session.device,
        )
        run.fit()
    if run.state.epoch < training.epochs:
        if session.world.is_first:
            print(
                f"{name} stopped at step {run.state.step}; the same command without "
                f"--training.max_steps resumes it ({folder})",
                flush=True,
            )
        return None
    accuracy = run.test()
    curves = _curves(folder / "log.jsonl") if session.world.is_first else {}
    return NetworkAccuracy(
        network=network, test=accuracy, space=run.space, run=folder, curves=curves
    )


def _curves(log: Path) -> dict[str, list[float]]:
    """The training's curves from its log; of a step that a resume repeated, the later record."""
    records, _ = read_json_lines(log)
    by_step = {r["step"]: r for r in records if r["kind"] == "step"}
    ordered: Sequence[dict[str, Any]] = [by_step[s] for s in sorted(by_step)]
    return {name: [r[name] for r in ordered] for name in ("step", "epoch", "loss", "top1")}
