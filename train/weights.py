"""Load and export weights under the names of torchvision and of the authors' release.

Encoders have torchvision's names where the modules are the same (`backbones.py`): the four stages
of R3D-18 and all of S3D except its classifier. R3D-18's stem differs from torchvision's (7x7x7
instead of 3x7x7, and a max-pool), so it is neither loaded from nor compatible with torchvision,
unless `stem_frames` is 3.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from strata.errors import CheckpointError
from strata.train.models.backbones import R3D18, Backbone

__all__ = ["Loaded", "export_backbone", "load_release", "load_torchvision", "read_weights"]

_NUM_COLOURS = 3
_CLASSIFIERS = ("fc.", "classifier.")
_STEM = "stem."
_BACKBONE = "backbone."


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Result of loading a file into a module; names are sorted."""

    taken: tuple[str, ...]
    """Names in the module that were loaded."""
    kept: tuple[str, ...]
    """Names in the module that the file does not have."""
    left: tuple[str, ...]
    """Names in the file that the module does not have."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or `torch.save` file, without executing its code.

    A state dict inside `state_dict` or `model` is unwrapped, and the prefix `module.` of data
    parallelism is removed.

    Raises:
        CheckpointError: The file is missing, damaged, or has other content.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # Of a damaged file, torch's reader raises what its parts do: KeyError, TypeError, struct.error.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not readable as weights: {reason}") from error
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict; give a file of named tensors")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _refuse_compressed(path: Path) -> None:
    """Refuse a file that would need far more memory than its size; `torch.save` writes none.

    Raises:
        CheckpointError: Its members are larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > path.stat().st_size:
        raise CheckpointError(
            f"{path} is not readable as weights: it is compressed, to {num_bytes} bytes when "
            "unpacked; save it again with torch.save"
        )


def export_backbone(backbone: Backbone) -> dict[str, Tensor]:
    """Export an encoder's weights and buffers with torchvision's names and RGB input.

    Returns:
        Contiguous copies on the CPU. A fourth input plane is dropped: its weights and inputs are
        zero.
    """
    weights = {name: value.detach().cpu() for name, value in backbone.state_dict().items()}
    first = _input_name(backbone)
    weights[first] = weights[first][:, :_NUM_COLOURS]
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}


def load_torchvision(backbone: Backbone, weights: Mapping[str, Tensor]) -> Loaded:
    """Load weights of torchvision's `r3d_18` or `s3d`, or of `export_backbone`.

    The classifier and torchvision's stem of `r3d_18` are ignored: our stem keeps its values.

    Args:
        backbone: Changed in place, of three or four input planes.
        weights: A state dict.

    Raises:
        CheckpointError: A weight is missing or has another shape; nothing is changed.
    """
    wanted = {k: v for k, v in weights.items() if not k.startswith(_CLASSIFIERS)}
    optional = ""
    if isinstance(backbone, R3D18):
        stem = weights.get(_input_name(backbone))
        if stem is None or stem.shape[2:] != backbone.input_conv().weight.shape[2:]:
            optional = _STEM
            wanted = {k: v for k, v in wanted.items() if not k.startswith(_STEM)}
    required = {k for k in backbone.state_dict() if not (optional and k.startswith(optional))}
    taken, kept = _load(backbone, wanted, required, _input_name(backbone))
    return Loaded(taken=taken, kept=kept, left=tuple(sorted(weights.keys() - set(taken))))


def load_release(model: nn.Module, weights: Mapping[str, Tensor]) -> Loaded:
    """Load a checkpoint of the authors' release (method.md, Part II) by its names.

    Motion excitation, heads and prototypes are loaded if the model has them; the release's unused
    classifier is ignored. The queue is not in its checkpoints.

    Args:
        model: A `VideoModel` with an R3D-18, or an `R3D18` alone; changed in place.
        weights: The release's state dict, see `read_weights`.

    Raises:
        CheckpointError: A weight of the encoder is missing or has another shape; nothing is
            changed.
    """
    encoder = model if isinstance(model, Backbone) else model.get_submodule("backbone")
    if not isinstance(encoder, R3D18):
        raise CheckpointError("the release has an R3D-18 only; set model.name r3d18")
    prefix = "" if encoder is model else _BACKBONE
    places = model.state_dict()
    wanted: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, value in weights.items():
        ours = _release_name(name)
        if ours is None:
            continue
        if ours.startswith(_BACKBONE):
            ours = prefix + ours.removeprefix(_BACKBONE)
        if ours in places:
            wanted[ours], sources[ours] = value, name
    required = {prefix + name for name in encoder.state_dict()}
    taken, kept = _load(model, wanted, required, prefix + _input_name(encoder))
    left = weights.keys() - {sources[name] for name in taken}
    return Loaded(taken=taken, kept=kept, left=tuple(sorted(left)))


# Names of modules in the release and here.
_RELEASE_NAMES = (
    (r"backbone\.conv1\.", "backbone.stem.0."),
    (r"backbone\.bn1\.", "backbone.stem.1."),
    (r"backbone\.(layer\d\.\d)\.conv(\d)\.", r"backbone.\1.conv\2.0."),
    (r"backbone\.(layer\d\.\d)\.bn(\d)\.", r"backbone.\1.conv\2.1."),
    (r"backbone\.(layer\d\.\d\.downsample)\.", r"backbone.\1."),
    (r"backbone\.me(low|mid)\.0\.conv1\.", r"motion.\1.squeeze."),
    (r"backbone\.me(low|mid)\.0\.bn1\.", r"motion.\1.squeeze_norm."),
    (r"backbone\.me(low|mid)\.0\.conv2\.weight", r"motion.\1.depthwise_weight"),
    (r"backbone\.me(low|mid)\.0\.conv3\.", r"motion.\1.expand."),
    (r"backbone\.me(low|mid)\.0\.bn3\.", r"motion.\1.expand_norm."),
    (r"project_global\.0\.", "global_head.hidden."),
    (r"project_global\.1\.", "global_head.norm."),
    (r"project_global\.3\.", "global_head.project."),
    (r"prototype\.", "prototypes."),
    (r"project\.(?=\d)", "instance_head."),
    (r"project_fine\.", "retrieval_heads.high."),
    (r"project_graph\.", "graph_heads.high."),
    (r"project_(low|mid)\.", r"augmentation_heads.\1."),
    (r"project_(low|mid)_fine\.", r"retrieval_heads.\1."),
    (r"project_(low|mid)_graph\.", r"graph_heads.\1."),
)


def _release_name(name: str) -> str | None:
    """Our name of a weight of the release; None if we do not have it."""
    for pattern, ours in _RELEASE_NAMES:
        renamed, found = re.subn("^" + pattern, ours, name)
        if found:
            # The two layers of a head, with a ReLU between them.
            renamed = re.sub(r"^(.*_heads?(?:\.\w+)?)\.0\.", r"\1.hidden.", renamed)
            return re.sub(r"^(.*_heads?(?:\.\w+)?)\.2\.", r"\1.project.", renamed)
    return None


def _input_name(backbone: Backbone) -> str:
    conv = backbone.input_conv()
    return next(f"{name}.weight" for name, m in backbone.named_modules() if m is conv)


def _load(
    module: nn.Module, wanted: Mapping[str, Tensor], required: set[str], first: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check all weights and copy those that the module has.

    Args:
        module: Changed in place.
        wanted: Weights by the module's names.
        required: Names that must be in the file.
        first: The weight of the first convolution, which may have one plane more than the file's.

    Returns:
        Names that were loaded, and names that were kept.
    """
    places = module.state_dict()
    fitting: dict[str, Tensor] = {}
    for name in sorted(wanted.keys() & places.keys()):
        shape, value = places[name].shape, wanted[name]
        if name == first and value.dim() == 5 and value.shape[1] == _NUM_COLOURS:
            value = functional.pad(value, (0, 0) * 3 + (0, shape[1] - _NUM_COLOURS))
        if _without_ones(value.shape) != _without_ones(shape):
            raise CheckpointError(
                f"{name} is {tuple(wanted[name].shape)} in the file and {tuple(shape)} in the "
                "model; use a model of the file's architecture and width"
            )
        fitting[name] = value.reshape(shape)
    # Files from before this counter existed are complete without it.
    missing = {n for n in required - fitting.keys() if not n.endswith("num_batches_tracked")}
    if missing:
        raise CheckpointError(
            f"the file lacks {len(missing)} of the encoder's {len(required)} weights, first "
            f"{min(missing)}; is it of another architecture?"
        )
    module.load_state_dict(fitting, strict=False)
    return tuple(sorted(fitting)), tuple(sorted(places.keys() - fitting.keys()))


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """A shape without trailing ones: a 1x1 convolution's weight is a linear layer's."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)
