"""Encoders with three levels, and the small networks of the method."""

from strata.train.models.backbones import Backbone, BackboneConfig, Levels, build_backbone
from strata.train.models.inputs import InputChoice

__all__ = ["Backbone", "BackboneConfig", "Levels", "build_backbone", "r3d18", "s3d"]


def r3d18(*, width: int = 64, input: InputChoice = "rgb") -> Backbone:
    """R3D-18 with random weights.

    Args:
        width: Channels of the stem, a multiple of 8; the high level has 8 times as many.
        input: `rgb`, or `difference` for differences of neighbouring frames.

    Returns:
        A network from `[N, 3, T, S, S]` to the levels `low`, `mid` and `high`.

    Raises:
        ConfigError: A setting is out of its range.
    """
    return build_backbone(BackboneConfig(name="r3d18", width=width, input=input))


def s3d(*, width: int = 64, input: InputChoice = "rgb") -> Backbone:
    """S3D with random weights; the arguments are those of `r3d18`, the high level has 16 times."""
    return build_backbone(BackboneConfig(name="s3d", width=width, input=input))
