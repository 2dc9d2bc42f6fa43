"""The model card of an export: what the encoder is, how it is loaded, what was measured."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from strata.errors import CheckpointError
from strata.train.models.inputs import DIFFERENCE_SCALE
from strata.train.run.checkpoint import read_marker
from strata.untrusted import decode_json

__all__ = ["PROGRAM", "card", "example_code", "figures_of"]

PROGRAM = "encoder.pt2"
"""The file of a program."""
_NUM_COLOURS = 3
_MAX_REPORT_BYTES = 1 << 28


class _ReportResult(msgspec.Struct, frozen=True):
    data: str
    split: str
    figures: dict[str, dict[str, float]]


class _Report(msgspec.Struct, frozen=True):
    """The part of an evaluation's report.json that the card shows."""

    evaluation: str
    protocol: str
    checkpoint_digest: str
    results: list[_ReportResult]
    incomplete: str = ""


def figures_of(checkpoint: Path, reports: Sequence[Path]) -> str:
    """The figures of a checkpoint as text of the card.

    Args:
        checkpoint: The checkpoint's folder.
        reports: Files report.json to take besides those in the run's folder `eval/`; those of
            other checkpoints are refused, in the run's folder they are left out.

    Raises:
        CheckpointError: A report is damaged, or of another checkpoint.
    """
    digest = hashlib.sha256(read_marker(checkpoint).encode()).hexdigest()
    own = sorted((checkpoint.parent.parent / "eval").glob("*/report.json"))
    parts = []
    for path in (*own, *reports):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"report {path} cannot be read: {error}") from error
        report = decode_json(content, _Report, path, CheckpointError, max_bytes=_MAX_REPORT_BYTES)
        if report.checkpoint_digest != digest:
            if path in reports:
                raise CheckpointError(f"{path} is the report of another checkpoint; leave it out")
            continue
        parts.append(_figures(report))
    return "\n\n".join(parts) or "None were measured."


def _figures(report: _Report) -> str:
    lines = [f"{report.evaluation}: {report.protocol}"]
    lines += [report.incomplete] if report.incomplete else []
    for result in report.results:
        names = list(dict.fromkeys(n for row in result.figures.values() for n in row))
        lines += ["", f"| {result.data}, {result.split} | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for row, shares in result.figures.items():
            cells = [f"{shares[n]:.1%}" if n in shares else "" for n in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


_TORCHVISION_CODE = {
    "r3d18": """\
from safetensors.torch import load_file
from torch import nn
from torchvision.models.video import r3d_18

model = r3d_18()
model.stem = nn.Sequential(  # Hara's stem instead of torchvision's: 7x7x7, then a max-pool
    nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False),
    nn.BatchNorm3d(64),
    nn.ReLU(inplace=True),
    nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
)
model.fc = nn.Identity()
model.load_state_dict(load_file("{folder}/model.safetensors"))
features = model.eval()(clips)
""",
    "s3d": """\
from safetensors.torch import load_file
from torch import nn
from torchvision.models.video import s3d

model = s3d()
model.features[13] = nn.MaxPool3d(2, stride=2, ceil_mode=True)  # keeps an odd last row and column
model.avgpool = model.classifier = nn.Identity()
model.load_state_dict(load_file("{folder}/model.safetensors"))
features = model.eval()(clips)
""",
}

_DIFFERENCES_CODE = f"""\
import torch

change = {DIFFERENCE_SCALE:g} * clips.diff(dim=2)  # it was trained on differences of frames
clips = torch.cat([change, change[:, :, -1:]], dim=2)
"""

_STRATA_CODE = """\
import strata

encoder = strata.load_encoder("{folder}", device="cpu")
features = encoder(clips)
"""

_PROGRAM_CODE = """\
import torch

model = torch.export.load("{folder}/encoder.pt2").module()
low, mid, high = model(clips)
features = high.mean(dim=(2, 3, 4))
"""


def example_code(described: Mapping[str, Any], folder: str) -> str:
    """Python code that loads an export and turns `clips` into `features`.

    Args:
        described: Content of config.json.
        folder: Folder of the export.
    """
    if described["file"] == PROGRAM:
        code = _PROGRAM_CODE
    elif described["names"] == "strata":
        code = _STRATA_CODE
    else:
        code = _TORCHVISION_CODE[described["backbone"]["name"]]
        if described["backbone"].get("input", "rgb") == "difference":
            code = _DIFFERENCES_CODE + code
    return code.replace("{folder}", folder)


def card(described: Mapping[str, Any], *, figures: str, licence: str) -> str:
    """Text of the model card.

    Args:
        described: Content of config.json.
        figures: See `figures_of`.
        licence: Identifier of the weights' licence; empty if the user has named none.
    """
    backbone, clips, training = described["backbone"], described["input"], described["training"]
    settings = training["settings"]
    terms = {k: v for k, v in settings["method"]["weights"].items() if v > 0}
    name = {"r3d18": "R3D-18", "s3d": "S3D"}[backbone["name"]]
    size = clips["size"]
    shape = f"[N, {backbone['in_channels']}, {clips['frames']}, {size}, {size}]"
    length = backbone["width"] * _FEATURES[backbone["name"]]
    planes = "" if backbone["in_channels"] == _NUM_COLOURS else ", then a plane of zeros"
    seen = (
        f"\n| sees | differences of neighbouring frames, times {DIFFERENCE_SCALE:g}, the last one "
        "repeated; the code below has them computed from these clips |"
        if backbone["input"] == "difference"
        else ""
    )
    trust = (
        "A `.pt2` may hold pickled parts, which run code when they are loaded: load it only if you "
        "trust its source."
        if described["file"] == PROGRAM
        else "Loading executes nothing from the file."
    )
    return f"""\
---
license: {licence or "unknown"}
library_name: strata-video
pipeline_tag: feature-extraction
tags: [video, self-supervised]
---

# {name} pretrained without labels on {settings["data"]["shards"]}

A video encoder, pretrained by multi-level feature optimization (Qian et al., ICCV 2021) with Strata
{described["strata"]}. It turns a clip into a vector of {length} numbers; it has no classifier.

| | |
|---|---|
| architecture | {name}, width {backbone["width"]} |
| input | `{shape}`: clips of RGB frames in [0, 1], minus the mean {list(clips["mean"])}, divided \
by {list(clips["std"])}{planes} |{seen}
| data | `{settings["data"]["shards"]}`, manifest {training["manifest_digest"]} |
| trained | {training["step"]} steps of {settings["data"]["batch_size"]} videos, \
{training["epoch"]} epochs, seed {settings["seed"]} |
| terms of the loss | {", ".join(f"{weight:g} {term}" for term, weight in terms.items())} |
| file | `{described["file"]}`, names of {described["names"]} |

All settings are in `config.json`.

## Use

`clips` is a batch as described above; `features` becomes one vector a clip.

```python
{example_code(described, ".").rstrip()}
```

{trust}

## Figures

{figures}

## Limits

The encoder reflects the content and the biases of its training videos. Its quality was measured
only as stated above. The rights in the videos are their owners'. The licence of these weights is
{licence or "not stated"}.
"""


_FEATURES = {"r3d18": 8, "s3d": 16}
"""Length of a feature vector relative to the width."""
