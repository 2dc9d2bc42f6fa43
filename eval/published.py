"""Published results that the page shows beside the measured figures, with protocol and source.

A name like R3D-18 stands for several networks (docs/method.md): each entry says which it was.
"""

from dataclasses import dataclass

from strata.eval.results import Kind

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that others published, in percent as they print it."""

    kind: Kind
    """Of which protocol."""
    what: str
    """Method, backbone, pretraining."""
    protocol: str
    figure: str
    source: str


_SUPPLEMENT = "supplement of Qian et al., ICCV 2021, Table 3"
_PAPER = "Qian et al., ICCV 2021, as listed by wizwand.com (backbone not named there)"
_TCLR = (
    "TCLR, torchvision's R3D-18 with temporal stride 1 in the last stage (here model.stem_pool "
    "false, stem_frames 3, last_temporal_stride 1), UCF101"
)
_TEMPORAL = {
    "neither temporal term": "55.9 / 28.1",
    "L_aug alone": "59.3 / 30.7",
    "L_ret alone": "60.4 / 31.9",
    "both (the full method)": "63.2 / 33.4",
}

PUBLISHED: tuple[Published, ...] = (
    *(
        Published(
            kind="linear",
            what=f"Qian et al., R3D-18 as here by default, Kinetics-400; {terms}",
            protocol="linear probe, Top-1, UCF101 / HMDB51",
            figure=figure,
            source=_SUPPLEMENT,
        )
        for terms, figure in _TEMPORAL.items()
    ),
    Published(
        kind="finetune",
        what="Qian et al., best listed, backbone not found",
        protocol="finetune, Top-1, UCF101 / HMDB51",
        figure="79.1 / 47.6",
        source=_PAPER,
    ),
    Published(
        kind="retrieval",
        what="Qian et al., best listed, backbone not found",
        protocol="retrieval R@1, UCF101 / HMDB51",
        figure="41.5 / 20.7",
        source=_PAPER,
    ),
    Published(
        kind="retrieval",
        what=_TCLR,
        protocol="retrieval R@1, UCF101",
        figure="56.2",
        source="Dave et al., CVIU 2022, arXiv 2101.07974; network: its code",
    ),
    Published(
        kind="finetune",
        what=_TCLR,
        protocol="finetune, Top-1, UCF101 / HMDB51",
        figure="82.4 / 52.9",
        source="Dave et al., CVIU 2022, arXiv 2101.07974; network: its code",
    ),
    Published(
        kind="linear",
        what=_TCLR,
        protocol="linear probe, Top-1, UCF101",
        figure="69.9",
        source="README of github.com/DAVEISHAN/TCLR; network: its code",
    ),
    Published(
        kind="finetune",
        what="RSPNet, R3D-18 (which one: not found), Kinetics-400, 200 epochs",
        protocol="finetune, Top-1, UCF101 / HMDB51",
        figure="74.3 / 41.8",
        source="Chen et al., AAAI 2021, README of its code",
    ),
)
