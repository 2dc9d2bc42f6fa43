"""The evaluations: retrieval, linear probe, finetuning, both probes in one, and temporal cues."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.distributed import all_equal, only_writer
from strata.errors import ConfigError
from strata.eval.accuracy import ClassSpace
from strata.eval.classifier import ClassifierConfig, ClassifierRun
from strata.eval.pictures import jpeg, write_video
from strata.eval.protocols.features import LEVEL_CHOICES, FeatureConfig, Features, write_features
from strata.eval.protocols.linear import LinearConfig, linear_probe
from strata.eval.protocols.named import PROTOCOLS, ProtocolName, protocol_words
from strata.eval.protocols.pixels import PIXEL_MAPS
from strata.eval.protocols.retrieval import (
    CENTRINGS,
    RECALL_AT,
    Centring,
    RetrievalConfig,
    chance_recall,
    recall_at,
    retrieve,
)
from strata.eval.protocols.temporal_cam import (
    CamConfig,
    direction_accuracy,
    fit_direction_head,
    shown_samples,
    video_cam,
)
from strata.eval.report_page import Cue
from strata.eval.results import Figures, PairResult, accuracy_result, retrieval_result
from strata.eval.session import (
    Bench,
    Evaluation,
    Network,
    OneNetwork,
    SetPair,
    network_name,
    open_bench,
    set_pairs,
)
from strata.logs import read_json_lines
from strata.untrusted import file_stem

__all__ = [
    "CompareEvaluation",
    "FeaturesExport",
    "FinetuneEvaluation",
    "LinearEvaluation",
    "RetrievalEvaluation",
    "TemporalCamEvaluation",
    "run_compare",
    "run_features",
    "run_finetune",
    "run_linear",
    "run_retrieval",
    "run_temporal_cam",
]

_CUE_RATE = 12.0
"""Frames a second of the videos of temporal cues: about half of the usual speed."""

_CENTRE_TEXT: dict[Centring, str] = {
    "none": "no centring",
    "gallery": "centred by the gallery's mean",
    "each": "each set centred by its own mean (uses statistics of the test set)",
}


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(OneNetwork):
    """Settings of `eval/main.py retrieval`."""

    gallery: Path | None = None
    """Shards of the training set."""
    query: Path | None = None
    """Shards of the test set."""
    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Centring, and what the report shows."""


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluation(OneNetwork):
    """Settings of `eval/main.py finetune`."""

    train: Path | None = None
    """Shards of the training set."""
    test: Path | None = None
    """Shards of the test set."""
    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].finetune)
    """How the network is trained."""
    run: Path | None = None
    """Folder of the training; by default one by its settings, so that the same command goes on
    where it was stopped."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(OneNetwork):
    """Settings of `eval/main.py linear`."""

    train: Path | None = None
    """Shards of the training set."""
    test: Path | None = None
    """Shards of the test set."""
    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md."""
    variant: Literal["augmented", "cached"] = "augmented"
    """augmented trains on augmented clips, encoded anew each epoch (CoCLR). cached trains on the
    features of the training videos' test clips, encoded once: minutes instead of hours."""
    training: ClassifierConfig = field(default_factory=lambda: PROTOCOLS["supplement"].linear)
    """Of the augmented variant."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """Of the cached variant."""
    run: Path | None = None
    """Folder of the augmented variant's training, see finetune."""


@dataclass(frozen=True, kw_only=True)
class CompareEvaluation(Evaluation):
    """Settings of `eval/main.py compare`: retrieval and cached probe, beside untrained networks."""

    train: Path
    """Shards of the training set: the gallery, and what the probe learns from."""
    test: Path
    """Shards of the test set."""
    untrained_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the untrained networks."""
    protocol: ProtocolName = "supplement"
    """What is set that is not given here, docs/evaluation.md; the cached probe is ours."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Centring of the retrieval, and what the report shows."""
    probe: LinearConfig = field(default_factory=LinearConfig)
    """Of the cached linear probe."""

    def __post_init__(self) -> None:
        """Check the protocol.

        Raises:
            ConfigError: It has no cached probe.
        """
        _refuse_cached(self.protocol)


@dataclass(frozen=True, kw_only=True)
class FeaturesExport(Evaluation):
    """Settings of `eval/main.py features`: features as an .npz file, for use elsewhere."""

    shards: Path
    """The data set."""
    weights: Literal["pretrained", "untrained"] = "pretrained"
    """untrained draws the same network anew from the seed."""
    seed: int = 0
    """Of the untrained weights."""


@dataclass(frozen=True, kw_only=True)
class TemporalCamEvaluation(OneNetwork):
    """Settings of `eval/main.py temporal_cam`: where an encoder sees the direction of time."""

    train: Path | None = None
    """Shards of the training set, which the head learns from."""
    test: Path | None = None
    """Shards of the test set, which the maps are shown of."""
    features: FeatureConfig = field(default_factory=lambda: FeatureConfig(level="mid"))
    """How a video becomes features; `level` is the map that the head acts upon. mid has 4 time
    steps and 7x7 places for a clip of 16x112x112, high but 2 and 4x4, and low sees little of the
    surroundings of a place."""
    cam: CamConfig = field(default_factory=CamConfig)
    """The head, and what is shown of it."""
    out: Path | None = None
    """Folder for report.json, its page, and pictures and videos of the maps; by default one of its
    own under the checkpoint's run, in eval/."""

    def __post_init__(self) -> None:
        """Check the level.

        Raises:
            ConfigError: Several levels have no common map.
        """
        if self.features.level == "all":
            raise ConfigError("features.level all has no map of its own; use low, mid or high")


def _level_text(bench: Bench) -> str:
    weights = getattr(bench.config, "weights", "pretrained")
    if weights in PIXEL_MAPS:
        return PIXEL_MAPS[weights]
    config = bench.features
    if config.level == "all":
        return "the three levels' averages over time and space, of unit length each, joined"
    return f"the {config.level} level's average over time and space"


def _refuse_cached(protocol: ProtocolName) -> None:
    """Refuse to give CoCLR's name to a probe that is not CoCLR's.

    Raises:
        ConfigError: The protocol is CoCLR's.
    """
    if protocol == "coclr":
        raise ConfigError(
            "--protocol coclr trains its probe on augmented clips, the cached probe is ours; use "
            "linear with --variant augmented, or --protocol supplement or ours"
        )


def retrieval_text(bench: Bench, centre: Centring) -> str:
    """The protocol of a retrieval in words."""
    named = protocol_words(bench.settings(), "retrieval")
    return (
        f"retrieval, {named}: test videos query the training set, cosine similarity, "
        f"{bench.clips_text()}; "
        f"{_level_text(bench)}, mean over clips, {_CENTRE_TEXT[centre]}"
    )


def cached_text(bench: Bench) -> str:
    """The protocol of the cached linear probe in words."""
    named = protocol_words(bench.settings(), "cached")
    return (
        f"linear, cached, {named} with a probe of ours: a linear layer on frozen features of the "
        f"centre crops, {bench.clips_text()}; {_level_text(bench)}, unit length and batch "
        "norm; softmax probabilities averaged over a video's clips"
    )


def training_text(name: str, bench: Bench, config: ClassifierConfig) -> str:
    """The protocol of a trained classifier in words."""
    learns = "the encoder frozen" if config.train == "head" else "all weights learn"
    norm = "unit length and batch norm" if config.normalised else "no normalisation"
    low = config.views.crop_area[0]
    drops = ", ".join(map(str, config.lr_drop_epochs)) or "no epoch"
    optimizer = "Adam" if config.optimizer == "adam" else "SGD with momentum 0.9"
    encoder = f" (encoder x{config.backbone_lr_factor:g})" if config.train == "all" else ""
    crops = "" if config.test_crops == 1 else f", {config.test_crops} crops of each"
    return (
        f"{name}, {protocol_words(bench.settings(), name)}: {learns}, {config.epochs} epochs of one"
        f" augmented clip a video at stride {config.stride} (crop from {low:g} of the area, jitter "
        f"with probability {config.views.jitter:g}, flip), {optimizer} {config.learning_rate:g}"
        f"{encoder}, x{config.lr_drop_factor:g} at {drops}, batch {config.batch_size}, L2 "
        f"{config.weight_decay:g}, {norm}, dropout {config.dropout:g}; test of the last epoch's "
        f"weights: {bench.clips_text()}{crops}, softmax probabilities averaged"
    )


def cam_text(bench: Bench, config: CamConfig) -> str:
    """The protocol of the temporal cues in words."""
    return (
        "temporal_cam: a linear head without bias on frozen features tells clips from the same "
        f"clips reversed in time (one logit, right above and below 0); {bench.clips_text()}, each "
        f"once as it is and once reversed; {_level_text(bench)}, logistic regression with "
        f"L2 {config.weight_decay:g}; videos: the mean of their clips' logits"
    )


def retrieval_figures(
    gallery: Features, queries: Features, level: Any, centre: Centring
) -> dict[str, float]:
    """R@k of one level and centring."""
    nearest, _ = retrieve(queries.videos(level), gallery.videos(level), centre, max(RECALL_AT))
    return {f"R@{k}": v for k, v in recall_at(queries.labels, gallery.labels, nearest).items()}


def _chance_recall(gallery: Features, queries: Features) -> dict[str, float]:
    return {f"R@{k}": v for k, v in chance_recall(queries.labels, gallery.labels).items()}


def chance_accuracy(num_classes: int) -> dict[str, float]:
    """Accuracy of drawing classes at random."""
    return {"Top-1": 1 / num_classes, "Top-5": min(5, num_classes) / num_classes}


def run_retrieval(config: RetrievalEvaluation) -> None:
    """Retrieve each test video's nearest training videos and report R@k."""
    pairs = set_pairs(config, config.gallery, config.query, ("gallery", "query"))
    with open_bench(config) as bench:
        results = [_retrieval_of_pair(bench, config, pair) for pair in pairs]
        text = retrieval_text(bench, config.retrieval.centre)
        bench.write(_name("retrieval", config), text, results, {})


def _retrieval_of_pair(bench: Bench, config: RetrievalEvaluation, pair: SetPair) -> PairResult:
    level, centre = bench.features.level, config.retrieval.centre
    figures: Figures = {}
    variants: Figures = {}
    details: dict[str, Any] = {}
    for row, seed in config.networks.items():
        gallery, queries = bench.encode(pair.train, seed), bench.encode(pair.test, seed)
        figures[row] = retrieval_figures(gallery, queries, level, centre)
        if row != "measured":
            continue
        figures["chance"] = _chance_recall(gallery, queries)
        found = retrieve(queries.videos(level), gallery.videos(level), centre, max(RECALL_AT))
        details = retrieval_result(queries, gallery, *found, config.retrieval.shown)
        if config.retrieval.variants:
            variants = {
                f"{other} level, {_CENTRE_TEXT[way]}": retrieval_figures(
                    gallery, queries, other, way
                )
                for other in LEVEL_CHOICES
                for way in CENTRINGS
            }
    return PairResult(
        data=pair.data,
        split=pair.split,
        sets=pair.facts(),
        figures=figures,
        variants=variants,
        details=details,
    )


def _name(protocol: str, config: OneNetwork) -> str:
    which = config.networks["measured"]
    return protocol if which is None else f"{protocol}-{network_name(which)}"


def _probe(
    train: Features, test: Features, level: Any, config: LinearConfig
) -> tuple[Figures, dict[str, Any]]:
    """The cached linear probe: figures, and details for the page."""
    space = ClassSpace.of(train.labels, test.labels, train.classes, learned=True)
    result = linear_probe(
        train.clips(level),
        space.index(train.labels),
        test.clips(level),
        space.index(test.labels),
        len(space),
        config,
    )
    figures = {
        "measured": {"Top-1": result.accuracy.top1, "Top-5": result.accuracy.top5},
        "training": {"Top-1": result.train_top1},
        "chance": chance_accuracy(len(space)),
    }
    return figures, accuracy_result(result.accuracy, space, test.keys)


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on a frozen encoder and report Top-1 and Top-5."""
    if config.training.train != "head":
        raise ConfigError("training.train is all; the linear probe is for head, use finetune")
    if config.variant == "cached":
        _refuse_cached(config.protocol)
    else:
        _run_classifier("linear", config, config.training, config.train, config.test)
        return
    pairs = set_pairs(config, config.train, config.test, ("train", "test"))
    with open_bench(config) as bench:
        results = []
        for pair in pairs:
            figures: Figures = {}
            details: dict[str, Any] = {}
            for row, seed in config.networks.items():
                train, test = bench.encode(pair.train, seed), bench.encode(pair.test, seed)
                found, more = _probe(train, test, bench.features.level, config.probe)
                if row == "measured":
                    figures |= found
                    details = more
                figures[row] = found["measured"]
            results.append(
                PairResult(
                    data=pair.data,
                    split=pair.split,
                    sets=pair.facts(),
                    figures=figures,
                    details=details,
                )
            )
        bench.write(_name("linear-cached", config), cached_text(bench), results, {})


def run_finetune(config: FinetuneEvaluation) -> None:
    """Train the whole network from the checkpoint's encoder and report Top-1 and Top-5."""
    if config.training.train != "all":
        raise ConfigError("training.train is head; finetuning is for all, use linear")
    if config.weights in PIXEL_MAPS:
        raise ConfigError(f"--weights {config.weights} has no network to finetune; use linear")
    _run_classifier("finetune", config, config.training, config.train, config.test)


def _run_classifier(
    name: str,
    config: FinetuneEvaluation | LinearEvaluation,
    training: ClassifierConfig,
    train: Path | None,
    test: Path | None,
) -> None:
    pairs = set_pairs(config, train, test, ("train", "test"))
    if config.features.level != "high":
        raise ConfigError(
            f"features.level is {config.features.level}; {name} trains on the high level, other "
            "levels are for retrieval and the cached probe"
        )
    with open_bench(config) as bench:
        results = []
        for pair in pairs:
            # Every network is trained before it is asked whether one was told to stop.
            tested = {
                row: _train_and_test(name, bench, config, training, pair, row, seed)
                for row, seed in config.networks.items()
            }
            results.append(_joined(pair, tested))
        if all(r is not None for r in results):
            text = training_text(name, bench, training)
            bench.write(_name(name, config), text, [r for r in results if r is not None], {})


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """A classifier of one network on one pair of sets."""

    figures: dict[str, float]
    chance: dict[str, float]
    details: dict[str, Any]


def _joined(pair: SetPair, tested: dict[str, _Tested | None]) -> PairResult | None:
    """All networks of a pair; None where one was told to stop before its end."""
    whole = {row: one for row, one in tested.items() if one is not None}
    if len(whole) < len(tested):
        return None
    main = whole["measured"]
    figures = {row: one.figures for row, one in whole.items()} | {"chance": main.chance}
    return PairResult(
        data=pair.data,
        split=pair.split,
        sets=pair.facts(),
        figures=figures,
        details=main.details,
    )


def _train_and_test(
    name: str,
    bench: Bench,
    config: FinetuneEvaluation | LinearEvaluation,
    training: ClassifierConfig,
    pair: SetPair,
    row: str,
    seed: Network,
) -> _Tested | None:
    """One training; None where it was told to stop before its end."""
    name = name if seed is None else f"{name}-{network_name(seed)}"
    backbone, identity = bench.network(seed)
    sets = pair.facts()
    clips = bench.features.clips()
    described = {
        "evaluation": name,
        "network": identity,
        "digests": {k: v["manifest_digest"] for k, v in sets.items()},
        "training": plain(replace(training, max_steps=0)),
        "size": clips.size,
        "clip_frames": clips.clip_frames,
        "model": bench.state.config["model"],
    }
    if config.run is None:
        folder = bench.folder(name, described)
    else:
        folder = config.run / f"{pair.data}-{pair.split}" if config.data else config.run
        folder = folder if row == "measured" else folder / f"untrained-{seed}"
    all_equal("folder of the training", str(folder))
    advice = "wait for it, or use another --run"
    with only_writer(folder, "training a classifier", bench.world, advice=advice):
        run = ClassifierRun(
            backbone,
            pair.train,
            pair.test,
            training,
            clips,
            folder=folder,
            described=described,
            world=bench.world,
            device=bench.device,
        )
        run.fit()
    if run.state.epoch < training.epochs:
        if bench.world.is_first:
            print(
                f"{name} stopped at step {run.state.step}; the same command without "
                f"--training.max_steps goes on ({folder})",
                flush=True,
            )
        return None
    accuracy = run.test()
    return _Tested(
        figures={"Top-1": accuracy.top1, "Top-5": accuracy.top5},
        chance=chance_accuracy(len(run.space)),
        details={
            **accuracy_result(accuracy, run.space, pair.test.keys),
            "run": str(folder),
            "curves": _curves(folder / "log.jsonl") if bench.world.is_first else {},
        },
    )


def _curves(log: Path) -> dict[str, list[float]]:
    """The training's curves from its log; where a resume repeated steps, the later counts."""
    records, _ = read_json_lines(log)
    by_step = {r["step"]: r for r in records if r["kind"] == "step"}
    ordered: Sequence[dict[str, Any]] = [by_step[s] for s in sorted(by_step)]
    return {name: [r[name] for r in ordered] for name in ("step", "epoch", "loss", "top1")}


def run_compare(config: CompareEvaluation) -> None:
    """Both cached protocols on the checkpoint and on untrained networks of its architecture."""
    shared = OneNetwork(checkpoint=config.checkpoint)
    (pair,) = set_pairs(shared, config.train, config.test, ("train", "test"))
    with open_bench(config) as bench:
        figures: Figures = {}
        details: dict[str, Any] = {}
        chance: dict[str, float] = {}
        level, centre = bench.features.level, config.retrieval.centre
        for seed in (None, *config.untrained_seeds):
            name = "pretrained" if seed is None else f"untrained, seed {seed}"
            train, test = bench.encode(pair.train, seed), bench.encode(pair.test, seed)
            recalls = retrieval_figures(train, test, level, centre)
            accuracy, linear = _probe(train, test, level, config.probe)
            figures[name] = recalls | accuracy["measured"]
            if seed is None:
                nearest = retrieve(test.videos(level), train.videos(level), centre, max(RECALL_AT))
                details["retrieval"] = retrieval_result(
                    test, train, *nearest, config.retrieval.shown
                )
                details["linear"] = linear
                chance = _chance_recall(train, test) | accuracy["chance"]
        figures["chance"] = chance
        result = PairResult(
            data=pair.data,
            split=pair.split,
            sets=pair.facts(),
            figures=figures,
            details=details,
        )
        protocols = {"retrieval": retrieval_text(bench, centre), "linear": cached_text(bench)}
        bench.write("compare", "; ".join(protocols.values()), [result], {"protocols": protocols})


def run_temporal_cam(config: TemporalCamEvaluation) -> None:
    """Train the head, report how often it is right, and draw its maps. Rank 0 draws."""
    pairs = set_pairs(config, config.train, config.test, ("train", "test"))
    with open_bench(config) as bench:
        heads: list[np.ndarray] = []
        results = []
        for pair in pairs:
            figures, head = _direction_figures(bench, config, pair)
            heads.append(head)
            results.append(
                PairResult(data=pair.data, split=pair.split, sets=pair.facts(), figures=figures)
            )
        if not bench.world.is_first:
            return
        name = _name("temporal_cam", config)
        path = bench.report_path(name, results)
        path = path if config.out is None else config.out / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        cues: list[Cue] = []
        for k, (pair, head) in enumerate(zip(pairs, heads, strict=True)):
            folder = path.parent / f"{pair.data}-{pair.split}" if config.data else path.parent
            drawn, found = _draw_cues(bench, config, pair, head, folder)
            cues += drawn
            results[k] = replace(results[k], details={"cues": found})
        remark = (
            "Class activation maps of the head over test videos, evenly spaced in the set, not "
            "chosen. Red speaks for the original order, blue for the reversed one; the mean of a "
            "map is the logit. Maps are coarser than the picture and are interpolated. Beside the "
            "report lies a video (mp4) of each: the frames, the map, the map of the reversed clips."
        )
        bench.write(
            name,
            cam_text(bench, config.cam),
            results,
            {},
            path=path,
            decorate=lambda page: replace(page, cues=tuple(cues), cues_remark=remark),
        )


def _direction_figures(
    bench: Bench, config: TemporalCamEvaluation, pair: SetPair
) -> tuple[Figures, np.ndarray]:
    """How often each network's head is right, and the head of the first."""
    level = bench.features.level
    figures: Figures = {}
    heads: list[np.ndarray] = []
    for row, seed in config.networks.items():
        train, test = (
            [bench.encode(s, seed, backwards=b).clips(level) for b in (False, True)]
            for s in (pair.train, pair.test)
        )
        flat = [part.reshape(-1, part.shape[2]) for part in train]
        head = fit_direction_head(flat[0], flat[1], config.cam.weight_decay)
        figures[row] = direction_accuracy(head, test[0], test[1])
        if row == "measured":
            figures["training"] = direction_accuracy(head, train[0], train[1])
        heads.append(head)
    figures["chance"] = {"clips": 0.5, "videos": 0.5}
    return figures, heads[0]


def _draw_cues(
    bench: Bench,
    config: TemporalCamEvaluation,
    pair: SetPair,
    head: np.ndarray,
    folder: Path,
) -> tuple[list[Cue], list[dict[str, Any]]]:
    """Write a picture and a video of each shown test video; what the page and the report hold."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone, _ = bench.network(config.networks["measured"])
    backbone.eval()
    reader = pair.test
    cues, found = [], []
    for number, sample in enumerate(shown_samples(reader.num_samples, config.cam.videos)):
        made = video_cam(
            backbone,
            reader,
            sample,
            bench.features.clips(),
            head,
            bench.features.level,
            max_clips=config.cam.max_clips,
            device=bench.device,
        )
        key, label = reader.keys[sample], reader.manifest.classes[reader.labels[sample]]
        stem = f"{number:03d}-{file_stem(key)}"
        sheet = made.sheet(f"{key}   {label}   {bench.features.level} level")
        sheet.save(folder / f"{stem}.png")
        write_video(folder / f"{stem}.mp4", made.video(), _CUE_RATE)
        forth, back = made.logits.mean(axis=1).tolist()
        caption = (
            f"mean logit of {made.logits.shape[1]} clips {forth:+.2f} as they are "
            f"({_verdict(forth > 0)}), {back:+.2f} reversed ({_verdict(back <= 0)}); {stem}.mp4"
        )
        cues.append(Cue(key=key, label=label, caption=caption, sheet=jpeg(sheet, 80)))
        found.append(
            {
                "key": key,
                "class": label,
                "num_clips": made.logits.shape[1],
                "num_frames": len(made.frames),
                "logit": forth,
                "logit_reversed": back,
                "picture": str(folder / f"{stem}.png"),
                "video": str(folder / f"{stem}.mp4"),
            }
        )
    return cues, found


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def run_features(config: FeaturesExport) -> None:
    """Export the features of a data set."""
    if config.out is None:
        raise ConfigError("features: give --out FILE.npz")
    reader = ShardReader(config.shards)
    with open_bench(config) as bench:
        seed = config.seed if config.weights == "untrained" else None
        features = bench.encode(reader, seed)
        if bench.world.is_first:
            write_features(features, config.out)
            print(
                f"features of {len(features.keys)} videos (listed {reader.num_listed}) written to "
                f"{config.out}",
                flush=True,
            )


RUNNERS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "retrieval": (RetrievalEvaluation, run_retrieval),
    "linear": (LinearEvaluation, run_linear),
    "finetune": (FinetuneEvaluation, run_finetune),
    "compare": (CompareEvaluation, run_compare),
    "features": (FeaturesExport, run_features),
    "temporal_cam": (TemporalCamEvaluation, run_temporal_cam),
}
"""By the command's first word: its settings and what runs it."""
