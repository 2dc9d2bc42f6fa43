"""Where an encoder sees the direction of time: figures, pictures and videos."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from strata.errors import ConfigError
from strata.eval.evaluations.common import level_text, report_name, report_one
from strata.eval.pictures import encode_jpeg, write_video
from strata.eval.protocols.features import FeatureConfig
from strata.eval.protocols.temporal_cam import (
    CamConfig,
    direction_accuracy,
    fit_direction_head,
    shown_samples,
    video_cam,
)
from strata.eval.results import Cue, Cues, Measurement, Row
from strata.eval.session import Session, open_session
from strata.eval.sets import SetPair
from strata.eval.settings import OneNetwork
from strata.untrusted import file_stem

__all__ = ["TemporalCamEvaluation", "run_temporal_cam"]

_CUE_RATE = 12.0
"""Frames a second of the videos of temporal cues: about half of the usual speed."""


@dataclass(frozen=True, kw_only=True)
class TemporalCamEvaluation(OneNetwork):
    """Settings of `eval/main.py temporal_cam`: where an encoder sees the direction of time."""

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
        if self.features.level == "all":
            raise ConfigError("features.level all has no map of its own; use low, mid or high")


def run_temporal_cam(config: TemporalCamEvaluation) -> None:
    """Train the head, report how often it is right, and draw its maps. Rank 0 draws."""
    pairs = config.open_pairs()
    with open_session(config) as session:
        found = [_measure_direction(session, config, pair) for pair in pairs]
        if not session.world.is_first:
            return
        name = report_name("temporal_cam", config)
        path = session.report_path(name, pairs)
        path = path if config.out is None else config.out / "report.json"
        measured = []
        for pair, (measurement, head) in zip(pairs, found, strict=True):
            folder = path.parent / f"{pair.data}-{pair.split}" if config.data else path.parent
            cues = _draw_cues(session, config, pair, head, folder)
            measured.append(replace(measurement, details=cues))
        text = cam_text(session, config.cam)
        report_one(session, name, "temporal_cam", text, pairs, measured, path=path)


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
    backbone, _ = session.networks.open(config.measured)
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


def cam_text(session: Session, config: CamConfig) -> str:
    """The protocol of the temporal cues in words."""
    return (
        "temporal_cam: a linear head without bias on frozen features separates clips from the same "
        f"clips reversed in time (one logit, right above and below 0); {session.clips_text()}, "
        f"each once as it is and once reversed; {level_text(session)}, logistic regression with "
        f"L2 {config.weight_decay:g}; videos: the mean of their clips' logits"
    )
