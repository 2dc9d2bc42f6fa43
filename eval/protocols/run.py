"""The evaluations: retrieval, linear probe, finetuning, both probes in one, and temporal cues."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from strata.config import plain
from strata.dataload.reader import ShardReader
from strata.distributed import all_equal, only_writer
from strata.errors import ConfigError, StoppedError
from strata.eval.accuracy import ClassSpace
from strata.eval.classifier.config import ClassifierConfig
from strata.eval.classifier.run import ClassifierRun
from strata.eval.pictures import encode_jpeg, write_video
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
from strata.eval.results import (
    Classified,
    Cue,
    Cues,
    Figures,
    Kind,
    Measurement,
    PairResult,
    Retrieved,
    Row,
    classified,
    retrieved,
)
from strata.eval.session import (
    Evaluation,
    NamedNetwork,
    OneNetwork,
    Session,
    network_name,
    open_session,
    untrained_network,
)
from strata.eval.sets import SetPair, open_pair, open_pairs
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

    RENAMED: ClassVar = {"gallery": "train", "query": "test"}

    train: Path | None = None
    """Shards of the training set: the gallery."""
    test: Path | None = None
    """Shards of the test set: the queries."""
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
    """Folder of the training; by default one by its settings, so that the same command resumes
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
    """augmented trains on augmented clips, encoded again each epoch (CoCLR). cached trains on the
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
    others: tuple[Path, ...] = ()
    """Further runs or checkpoints of the same architecture, for instance of other seeds. The page
    then shows mean, lowest and highest."""
    remark: str = ""
    """A sentence that the page shows above the figures."""
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
    """untrained draws the weights of the same network from the seed."""
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


def _level_text(session: Session) -> str:
    weights = getattr(session.config, "weights", "pretrained")
    if weights in PIXEL_MAPS:
        return PIXEL_MAPS[weights]
    config = session.features
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


def retrieval_text(session: Session, centre: Centring) -> str:
    """The protocol of a retrieval in words."""
    named = protocol_words(session.settings(), "retrieval")
    return (
        f"retrieval, {named}: test videos query the training set, cosine similarity, "
        f"{session.clips_text()}; "
        f"{_level_text(session)}, mean over clips, {_CENTRE_TEXT[centre]}"
    )


def cached_text(session: Session) -> str:
    """The protocol of the cached linear probe in words."""
    named = protocol_words(session.settings(), "cached")
    return (
        f"linear, cached, {named} with a probe of ours: a linear layer on frozen features of the "
        f"centre crops, {session.clips_text()}; {_level_text(session)}, unit length and batch "
        "norm; softmax probabilities averaged over a video's clips"
    )


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


def cam_text(session: Session, config: CamConfig) -> str:
    """The protocol of the temporal cues in words."""
    return (
        "temporal_cam: a linear head without bias on frozen features tells clips from the same "
        f"clips reversed in time (one logit, right above and below 0); {session.clips_text()}, "
        f"each once as it is and once reversed; {_level_text(session)}, logistic regression with "
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
    pairs = open_pairs(config.data, config.splits, config.train, config.test)
    with open_session(config) as session:
        measured = [_measure_retrieval(session, config, pair) for pair in pairs]
        text = retrieval_text(session, config.retrieval.centre)
        _report_one(session, _name("retrieval", config), "retrieval", text, pairs, measured)


def _report_one(
    session: Session,
    name: str,
    kind: Kind,
    text: str,
    pairs: Sequence[SetPair],
    measured: Sequence[Measurement],
    *,
    path: Path | None = None,
) -> None:
    """Report an evaluation by a single protocol."""
    results = [
        PairResult(sets=pair, measured={kind: found})
        for pair, found in zip(pairs, measured, strict=True)
    ]
    session.report(name, {kind: text}, results, path=path)


def _measure_retrieval(session: Session, config: RetrievalEvaluation, pair: SetPair) -> Measurement:
    level, centre = session.features.level, config.retrieval.centre
    rows: list[Row] = []
    variants: Figures = {}
    details: Retrieved | None = None
    chance: dict[str, float] = {}
    for network in config.networks:
        gallery = session.encode(pair.train, network.which)
        queries = session.encode(pair.test, network.which)
        shares = retrieval_figures(gallery, queries, level, centre)
        rows.append(Row(name=network.row, role=network.role, shares=shares))
        if network.role != "measured":
            continue
        chance = _chance_recall(gallery, queries)
        details = _retrieval_details(gallery, queries, level, config.retrieval)
        if config.retrieval.variants:
            variants = {
                f"{other} level, {_CENTRE_TEXT[way]}": retrieval_figures(
                    gallery, queries, other, way
                )
                for other in LEVEL_CHOICES
                for way in CENTRINGS
            }
    rows.append(Row(name="chance", role="chance", shares=chance))
    return Measurement(rows=tuple(rows), variants=variants, details=details)


def _retrieval_details(
    gallery: Features, queries: Features, level: Any, config: RetrievalConfig
) -> Retrieved:
    nearest, similarity = retrieve(
        queries.videos(level), gallery.videos(level), config.centre, max(RECALL_AT)
    )
    return retrieved(queries, gallery, nearest, similarity, config.shown)


def _name(protocol: str, config: OneNetwork) -> str:
    which = config.measured
    return protocol if which is None else f"{protocol}-{network_name(which)}"


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """A classifier of one network on one pair of sets."""

    shares: dict[str, float]
    training: dict[str, float]
    """On the training set; empty where it was not tested."""
    chance: dict[str, float]
    details: Classified


def _cached_probe(train: Features, test: Features, level: Any, config: LinearConfig) -> _Tested:
    """The cached linear probe of one network."""
    space = ClassSpace.of(train.labels, test.labels, train.classes, learned=True)
    result = linear_probe(
        train.clips(level),
        space.index(train.labels),
        test.clips(level),
        space.index(test.labels),
        len(space),
        config,
    )
    return _Tested(
        shares={"Top-1": result.accuracy.top1, "Top-5": result.accuracy.top5},
        training={"Top-1": result.train_top1},
        chance=chance_accuracy(len(space)),
        details=classified(result.accuracy, space),
    )


def _joined(tested: Sequence[tuple[NamedNetwork, _Tested]]) -> Measurement:
    """The classifiers of all networks on a pair; the first network is the evaluated one."""
    rows = [Row(name=n.row, role=n.role, shares=found.shares) for n, found in tested]
    first = tested[0][1]
    if first.training:
        rows.append(Row(name="training", role="training", shares=first.training))
    rows.append(Row(name="chance", role="chance", shares=first.chance))
    return Measurement(rows=tuple(rows), details=first.details)


def run_linear(config: LinearEvaluation) -> None:
    """Train a linear classifier on a frozen encoder and report Top-1 and Top-5."""
    if config.training.train != "head":
        raise ConfigError("training.train is all; the linear probe is for head, use finetune")
    if config.variant == "cached":
        _refuse_cached(config.protocol)
    else:
        _run_classifier("linear", config, config.training, config.train, config.test)
        return
    pairs = _labelled_pairs(config, config.train, config.test)
    with open_session(config) as session:
        measured = []
        for pair in pairs:
            tested = []
            for network in config.networks:
                train = session.encode(pair.train, network.which)
                test = session.encode(pair.test, network.which)
                found = _cached_probe(train, test, session.features.level, config.probe)
                tested.append((network, found))
            measured.append(_joined(tested))
        name, text = _name("linear-cached", config), cached_text(session)
        _report_one(session, name, "linear", text, pairs, measured)


def _labelled_pairs(config: OneNetwork, train: Path | None, test: Path | None) -> list[SetPair]:
    return open_pairs(config.data, config.splits, train, test)


def run_finetune(config: FinetuneEvaluation) -> None:
    """Train the whole network from the checkpoint's encoder and report Top-1 and Top-5."""
    if config.training.train != "all":
        raise ConfigError("training.train is head; finetuning is for all, use linear")
    if config.weights in PIXEL_MAPS:
        raise ConfigError(f"--weights {config.weights} has no network to finetune; use linear")
    _run_classifier("finetune", config, config.training, config.train, config.test)


def _run_classifier(
    kind: Literal["linear", "finetune"],
    config: FinetuneEvaluation | LinearEvaluation,
    training: ClassifierConfig,
    train: Path | None,
    test: Path | None,
) -> None:
    pairs = _labelled_pairs(config, train, test)
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
                (network, _train_and_test(kind, session, config, training, pair, network))
                for network in config.networks
            ]
            complete = [(network, found) for network, found in tested if found is not None]
            if len(complete) == len(tested):
                measured.append(_joined(complete))
        if len(measured) == len(pairs):
            text = training_text(kind, session, training)
            _report_one(session, _name(kind, config), kind, text, pairs, measured)


def _train_and_test(
    name: str,
    session: Session,
    config: FinetuneEvaluation | LinearEvaluation,
    training: ClassifierConfig,
    pair: SetPair,
    network: NamedNetwork,
) -> _Tested | None:
    """Train one network and test it; None where --training.max_steps stopped it before its end."""
    if network.which is not None:
        name = f"{name}-{network_name(network.which)}"
    backbone, identity = session.network(network.which)
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
    return _Tested(
        shares={"Top-1": accuracy.top1, "Top-5": accuracy.top5},
        training={},
        chance=chance_accuracy(len(run.space)),
        details=classified(accuracy, run.space, run=folder, curves=curves),
    )


def _curves(log: Path) -> dict[str, list[float]]:
    """The training's curves from its log; of a step that a resume repeated, the later record."""
    records, _ = read_json_lines(log)
    by_step = {r["step"]: r for r in records if r["kind"] == "step"}
    ordered: Sequence[dict[str, Any]] = [by_step[s] for s in sorted(by_step)]
    return {name: [r[name] for r in ordered] for name in ("step", "epoch", "loss", "top1")}


def run_compare(config: CompareEvaluation) -> None:
    """Both cached protocols on one or more checkpoints and on untrained networks."""
    pair = open_pair(config.train, config.test)
    networks = [
        NamedNetwork(row="pretrained", role="measured", which=None),
        *(
            NamedNetwork(row=f"pretrained, {other}", role="measured", which=other)
            for other in config.others
        ),
        *(untrained_network(seed) for seed in config.untrained_seeds),
    ]
    with open_session(config) as session:
        level, centre = session.features.level, config.retrieval.centre
        recalls: list[Row] = []
        probes: list[tuple[NamedNetwork, _Tested]] = []
        details: Retrieved | None = None
        chance: dict[str, float] = {}
        for network in networks:
            train = session.encode(pair.train, network.which)
            test = session.encode(pair.test, network.which)
            shares = retrieval_figures(train, test, level, centre)
            recalls.append(Row(name=network.row, role=network.role, shares=shares))
            found = _cached_probe(train, test, level, config.probe)
            probes.append((network, replace(found, training={})))
            if details is None:
                details = _retrieval_details(train, test, level, config.retrieval)
                chance = _chance_recall(train, test)
        recalls.append(Row(name="chance", role="chance", shares=chance))
        measured: dict[Kind, Measurement] = {
            "retrieval": Measurement(rows=tuple(recalls), details=details),
            "linear": _joined(probes),
        }
        protocols: dict[Kind, str] = {
            "retrieval": retrieval_text(session, centre),
            "linear": cached_text(session),
        }
        result = PairResult(sets=pair, measured=measured)
        session.report("compare", protocols, [result], remark=config.remark)


def run_temporal_cam(config: TemporalCamEvaluation) -> None:
    """Train the head, report how often it is right, and draw its maps. Rank 0 draws."""
    pairs = _labelled_pairs(config, config.train, config.test)
    with open_session(config) as session:
        found = [_measure_direction(session, config, pair) for pair in pairs]
        if not session.world.is_first:
            return
        name = _name("temporal_cam", config)
        path = session.report_path(name, pairs)
        path = path if config.out is None else config.out / "report.json"
        measured = []
        for pair, (measurement, head) in zip(pairs, found, strict=True):
            folder = path.parent / f"{pair.data}-{pair.split}" if config.data else path.parent
            cues = _draw_cues(session, config, pair, head, folder)
            measured.append(replace(measurement, details=cues))
        text = cam_text(session, config.cam)
        _report_one(session, name, "temporal_cam", text, pairs, measured, path=path)


def _measure_direction(
    session: Session, config: TemporalCamEvaluation, pair: SetPair
) -> tuple[Measurement, np.ndarray]:
    """How often each network's head is right, and the head of the evaluated network."""
    level = session.features.level
    rows: list[Row] = []
    heads: list[np.ndarray] = []
    for network in config.networks:
        train, test = (
            [session.encode(s, network.which, backwards=b).clips(level) for b in (False, True)]
            for s in (pair.train, pair.test)
        )
        flat = [part.reshape(-1, part.shape[2]) for part in train]
        head = fit_direction_head(flat[0], flat[1], config.cam.weight_decay)
        shares = direction_accuracy(head, test[0], test[1])
        rows.append(Row(name=network.row, role=network.role, shares=shares))
        if network.role == "measured":
            shares = direction_accuracy(head, train[0], train[1])
            rows.append(Row(name="training", role="training", shares=shares))
        heads.append(head)
    rows.append(Row(name="chance", role="chance", shares={"clips": 0.5, "videos": 0.5}))
    return Measurement(rows=tuple(rows)), heads[0]


def _draw_cues(
    session: Session,
    config: TemporalCamEvaluation,
    pair: SetPair,
    head: np.ndarray,
    folder: Path,
) -> Cues:
    """Write a picture and a video of each shown test video."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone, _ = session.network(config.measured)
    backbone.eval()
    reader = pair.test
    cues = []
    for number, sample in enumerate(shown_samples(reader.num_samples, config.cam.videos)):
        made = video_cam(
            backbone,
            reader,
            sample,
            session.features.clips(),
            head,
            session.features.level,
            max_clips=config.cam.max_clips,
            device=session.device,
        )
        key, label = reader.keys[sample], reader.manifest.classes[reader.labels[sample]]
        stem = f"{number:03d}-{file_stem(key)}"
        sheet = made.sheet(f"{key}   {label}   {session.features.level} level")
        sheet.save(folder / f"{stem}.png")
        write_video(folder / f"{stem}.mp4", made.video(), _CUE_RATE)
        forth, back = made.logits.mean(axis=1).tolist()
        cues.append(
            Cue(
                key=key,
                label=label,
                num_clips=made.logits.shape[1],
                num_frames=len(made.frames),
                logit=forth,
                logit_reversed=back,
                picture=folder / f"{stem}.png",
                video=folder / f"{stem}.mp4",
                sheet=encode_jpeg(sheet, 80),
            )
        )
    return Cues(shown=tuple(cues))


def run_features(config: FeaturesExport) -> None:
    """Export the features of a data set."""
    if config.out is None:
        raise ConfigError("features: give --out FILE.npz")
    reader = ShardReader(config.shards)
    with open_session(config) as session:
        seed = config.seed if config.weights == "untrained" else None
        features = session.encode(reader, seed)
        if session.world.is_first:
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
