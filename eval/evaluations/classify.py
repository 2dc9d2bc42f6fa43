"""Classifiers that are trained: the linear probe and finetuning."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from strata.config import plain
from strata.distributed import all_equal, only_writer
from strata.errors import ConfigError, StoppedError
from strata.eval.classifier.config import ClassifierConfig
from strata.eval.classifier.run import ClassifierRun
from strata.eval.evaluations.cached_probe import (
    Tested,
    cached_probe,
    cached_text,
    chance_accuracy,
    joined,
    refuse_cached,
)
from strata.eval.evaluations.common import report_name, report_one
from strata.eval.networks import NamedNetwork, network_name
from strata.eval.protocols.linear import LinearConfig
from strata.eval.protocols.named import PROTOCOLS, ProtocolName, protocol_words
from strata.eval.protocols.pixels import PIXEL_MAPS
from strata.eval.results import classified
from strata.eval.session import Session, open_session
from strata.eval.sets import SetPair
from strata.eval.settings import OneNetwork
from strata.logs import read_json_lines

__all__ = ["FinetuneEvaluation", "LinearEvaluation", "run_finetune", "run_linear"]


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluation(OneNetwork):
    """Settings of `eval/main.py finetune`."""

    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].finetune)
    """How the network is trained."""
    run: Path | None = None
    """Folder of the training; by default one by its settings, so that the same command resumes
    where it was stopped."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(OneNetwork):
    """Settings of `eval/main.py linear`."""

    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    variant: Literal["augmented", "cached"] = "augmented"
    """augmented trains on augmented clips, encoded again each epoch (CoCLR). cached trains on the
    features of the training videos' test clips, encoded once: minutes instead of hours."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].linear)
    """Of the augmented variant."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """Of the cached variant."""
    run: Path | None = None
    """Folder of the augmented variant's training, see finetune."""


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on a frozen encoder and report Top-1 and Top-5."""
    if config.training.train != "head":
        raise ConfigError("training.train is all; the linear probe is for head, use finetune")
    if config.variant == "cached":
        refuse_cached(config.protocol)
    else:
        _run_classifier("linear", config)
        return
    pairs = config.open_pairs()
    with open_session(config) as session:
        measured = []
        for pair in pairs:
            tested = []
            for network in config.networks:
                train = session.encode(pair.train, network.which)
                test = session.encode(pair.test, network.which)
                found = cached_probe(train, test, session.features.level, config.probe)
                tested.append((network, found))
            measured.append(joined(tested))
        name, text = report_name("linear-cached", config), cached_text(session)
        report_one(session, name, "linear", text, pairs, measured)


def run_finetune(config: FinetuneEvaluation) -> None:
    """Train the complete network from the checkpoint's encoder and report Top-1 and Top-5."""
    if config.training.train != "all":
        raise ConfigError("training.train is head; finetuning is for all, use linear")
    if config.weights in PIXEL_MAPS:
        raise ConfigError(f"--weights {config.weights} has no network to finetune; use linear")
    _run_classifier("finetune", config)


def _run_classifier(
    kind: Literal["linear", "finetune"], config: FinetuneEvaluation | LinearEvaluation
) -> None:
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
                (network, _train_and_test(kind, session, config, pair, network))
                for network in config.networks
            ]
            complete = [(network, found) for network, found in tested if found is not None]
            if len(complete) == len(tested):
                measured.append(joined(complete))
        if len(measured) == len(pairs):
            text = training_text(kind, session, config.training)
            report_one(session, report_name(kind, config), kind, text, pairs, measured)


def _train_and_test(
    name: str,
    session: Session,
    config: FinetuneEvaluation | LinearEvaluation,
    pair: SetPair,
    network: NamedNetwork,
) -> Tested | None:
    """Train one network and test it; None where --training.max_steps stopped it before its end."""
    training = config.training
    if network.which is not None:
        name = f"{name}-{network_name(network.which)}"
    backbone, identity = session.networks.open(network.which)
    sets = pair.facts()
    clips = session.features.clips()
    # How many steps may be done or skipped does not change what is trained.
    same = {k: v for k, v in plain(training).items() if k != "max_skipped_steps"}
    described = {
        "evaluation": name,
        "network": identity,
        "digests": {k: v["manifest_digest"] for k, v in sets.items()},
        "training": same | {"max_steps": 0},
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
    with only_writer(folder, "training a classifier", session.world, advice=advice) as lock:
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
            lock=lock,
        )
        if not run.fit():
            raise StoppedError(
                f"{name} was stopped at step {run.state.step} by a signal; the same command "
                f"resumes it ({folder})"
            )
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
    return Tested(
        shares={"Top-1": accuracy.top1, "Top-5": accuracy.top5},
        training={},
        chance=chance_accuracy(len(run.space)),
        details=classified(accuracy, run.space, run=folder, curves=curves),
    )


def _curves(log: Path) -> dict[str, list[float]]:
    """The training's curves from its log; of a step that a resume repeated, the later record."""
    records, _ = read_json_lines(log)
    # A report has no figures if all of its steps were skipped.
    reports = (r for r in records if r["kind"] == "step" and r["loss"] is not None)
    by_step = {r["step"]: r for r in reports}
    ordered: Sequence[dict[str, Any]] = [by_step[s] for s in sorted(by_step)]
    return {name: [r[name] for r in ordered] for name in ("step", "epoch", "loss", "top1")}


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
