"""Video encoders with feature maps at three levels: R3D-18 and S3D of torchvision's blocks.

Shape suffixes: N clips, C channels, T frames or time steps, H rows, W columns.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.ops import Conv3dNormActivation

from strata.errors import ConfigError
from strata.ranges import check_range
from strata.train.models.inputs import INPUTS, InputChoice, frame_differences
from strata.train.models.stem import Fold, FramePool, StemConvolution

__all__ = [
    "LEVELS",
    "R3D18",
    "S3D",
    "Backbone",
    "BackboneConfig",
    "Level",
    "LevelStrides",
    "LevelWidths",
    "Levels",
    "build_backbone",
]


class Levels(NamedTuple):
    """Feature maps of a batch of clips, `[N, C, T, H, W]` each."""

    low: Tensor
    mid: Tensor
    high: Tensor


Level = Literal["low", "mid", "high"]
LEVELS: tuple[Level, ...] = ("low", "mid", "high")


class LevelWidths(NamedTuple):
    """Channels of each level."""

    low: int
    mid: int
    high: int


class LevelStrides(NamedTuple):
    """Frames of a clip per time step of each level."""

    low: int
    mid: int
    high: int


_MAX_WIDTH = 8192
"""A config from elsewhere may hold any number; torch cannot even describe a much wider network."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which encoder."""

    name: Literal["r3d18", "s3d"] = "r3d18"
    """The architecture."""
    width: int = 64
    """Channels of the stem, a positive multiple of 8; all other widths are in proportion. 64 is
    the published size, less is for small machines."""
    input: InputChoice = "rgb"
    """Input of the first convolution. TEXT: rgb. difference: frame differences, which the encoder
    computes from RGB clips. both: in pretraining, differences for the second short clip and RGB for
    all others, so that their embeddings learn to agree; afterwards RGB."""
    in_channels: Literal[3, 4] = 3
    """Channels of a clip. 4 is RGB and a plane of zeros, which changes no result and is faster on
    GPUs; exported weights have 3."""
    bn_momentum: float = 0.1
    """Weight of a batch in the running statistics of batch norm, in (0, 1]. torchvision's S3D has
    0.001, at which short runs end with statistics of the initial weights."""

    stem_pool: bool = True
    """Whether R3D-18's stem ends with a max-pool, as in TEXT's shapes; torchvision's has none, and
    its levels have four times the positions."""
    stem_frames: Literal[3, 7] = 7
    """Frames of R3D-18's first kernel: 7 is Hara's, 3 torchvision's."""
    last_temporal_stride: Literal[1, 2] = 2
    """Stride along time of R3D-18's last stage. With 1 its first convolution reads every second
    step instead (TCLR): the same parameters, and twice the steps at the high level."""

    def __post_init__(self) -> None:
        if self.name not in ("r3d18", "s3d"):
            raise ConfigError(f"backbone: name is {self.name!r}; use r3d18 or s3d")
        if self.input not in INPUTS:
            raise ConfigError(f"backbone: input is {self.input!r}; use {', '.join(INPUTS)}")
        if not 8 <= self.width <= _MAX_WIDTH or self.width % 8:
            raise ConfigError(
                f"backbone: width is {self.width}; use a multiple of 8 from 8 to {_MAX_WIDTH}"
            )
        for name, published, other in (
            ("stem_pool", True, False),
            ("stem_frames", 7, 3),
            ("last_temporal_stride", 2, 1),
        ):
            value = getattr(self, name)
            if value not in (published, other):
                raise ConfigError(f"backbone: {name} is {value}; use {published} or {other}")
            if value != published and self.name != "r3d18":
                raise ConfigError(f"backbone: {name} is for r3d18, not {self.name}; leave it out")
        if self.in_channels not in (3, 4):
            raise ConfigError(f"backbone: in_channels is {self.in_channels}; use 3 or 4")
        check_range(self, "bn_momentum", prefix="backbone: ", above=0, at_most=1)

    @property
    def is_variant(self) -> bool:
        """Whether R3D-18's stem or last stage differs from TEXT."""
        return (self.stem_pool, self.stem_frames, self.last_temporal_stride) != (True, 7, 2)

    @property
    def time_strides(self) -> LevelStrides:
        """Frames of a clip per time step of each level."""
        return LevelStrides(2, 4, 4 * self.last_temporal_stride)


class Backbone(nn.Module):
    """An encoder with three levels.

    Attributes:
        widths: Channels of each level.
        differences: Whether its input is the frame differences of the clips.
    """

    widths: LevelWidths
    differences: bool = False

    def forward(self, clips_NCTHW: Tensor) -> Levels:
        """Encode clips.

        Args:
            clips_NCTHW: `[N, C, T, H, W]`, normalised RGB, C as configured; channels-last strides
                are kept.

        Returns:
            The three levels; time is divided by `BackboneConfig.time_strides`, rows and columns by
            8, 16 and 32, or half of that without a max-pool in the stem (rounded up).
        """
        raise NotImplementedError

    def _seen(self, clips_NCTHW: Tensor) -> Tensor:
        """The input of the first convolution."""
        return frame_differences(clips_NCTHW) if self.differences else clips_NCTHW

    def channels_last(self) -> None:
        """Store the weights of convolutions channels last, as the clips, to avoid copies."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                weight = module.weight.data
                module.weight.data = weight.contiguous(memory_format=torch.channels_last_3d)

    def fold_stem(self, fold: Fold) -> None:
        """Compute the first convolution in another way, see `stem.Fold`; only R3D-18's can."""
        conv = self.input_conv()
        if isinstance(conv, StemConvolution):
            conv.fold = fold

    def input_conv(self) -> nn.Conv3d:
        """The first convolution, whose input is the clips."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """Number of input channels, 3 or 4."""
        return self.input_conv().in_channels


class R3D18(Backbone):
    """3D ResNet-18 with max-pool and a 7x7x7 stem, both of which keep time (method.md 2).

    Differs from torchvision's `r3d_18` in the stem (3x7x7 there) and the max-pool (none there, so
    its levels have four times the positions); the four stages are the same, names included. Hara's
    own pools time too. A clip of 3x16x112x112 gives 128x8x14x14, 256x4x7x7 and 512x2x4x4; the
    encoder has 33,203,904 parameters.

    Without the max-pool, with 3 frames and a last temporal stride of 1 it is the network of TCLR:
    128x8x28x28, 256x4x14x14 and 512x4x7x7, and 33,166,272 parameters.

    Source: Hara et al., arXiv 1708.07632; TCLR: arXiv 2101.07974 and its code, where the last
    stage's first convolution has temporal stride 1, padding 2 and dilation 2. Initialisation:
    convolutions Kaiming normal by fan out, batch norm 1 and 0.

    Args:
        config: All settings but `name` and, of `input`, `both`.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width, stem_frames = config.width, config.stem_frames
        self.widths = LevelWidths(2 * width, 4 * width, 8 * width)
        self.stem = nn.Sequential(
            StemConvolution(
                3,
                width,
                kernel_size=(stem_frames, 7, 7),
                stride=(1, 2, 2),
                padding=(stem_frames // 2, 3, 3),
                bias=False,
            ),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        if config.stem_pool:
            self.stem.append(FramePool())
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        if config.last_temporal_stride == 1:
            _keep_time(self.layer4)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        _finish(self, config)

    def forward(self, clips_NCTHW: Tensor) -> Levels:
        """See `Backbone.forward`."""
        low = self.layer2(self.layer1(self.stem(self._seen(clips_NCTHW))))
        mid = self.layer3(low)
        return Levels(low, mid, self.layer4(mid))

    def input_conv(self) -> nn.Conv3d:
        """See `Backbone.input_conv`."""
        return _first_conv(self.stem)


class S3D(Backbone):
    """S3D whose last max-pool pads ("SAME"), so that 7x7 becomes 4x4 (TEXT Table 2).

    torchvision's `s3d` without its classifier, names included; there the last max-pool drops the
    odd row and column, and 112 pixels end in 3x3. A clip of 3x16x112x112 gives 480x8x14x14
    (Mixed-3c), 832x4x7x7 (Mixed-4f) and 1024x2x4x4 (Mixed-5c).

    Source: Xie et al., arXiv 1712.04851.

    Args:
        config: Width, input channels, momentum, and of `input` whether it is differences.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm3d, eps=0.001)

        def scaled(*widths: int) -> Iterable[int]:
            return (w * config.width // 64 for w in widths)

        def mixed(*widths: int) -> nn.Module:
            return SepInceptionBlock3D(*scaled(*widths), norm_layer=norm)

        stem, second = scaled(64, 192)
        self.widths = LevelWidths(*scaled(480, 832, 1024))
        self.features = nn.Sequential(
            TemporalSeparableConv(3, stem, 7, 2, 3, norm),
            FramePool(),
            Conv3dNormActivation(stem, stem, kernel_size=1, stride=1, norm_layer=norm),
            TemporalSeparableConv(stem, second, 3, 1, 1, norm),
            FramePool(),
            mixed(192, 64, 96, 128, 16, 32, 32),
            mixed(256, 128, 128, 192, 32, 96, 64),
            nn.MaxPool3d(kernel_size=3, stride=2, padding=1),
            mixed(480, 192, 96, 208, 16, 48, 64),
            mixed(512, 160, 112, 224, 24, 64, 64),
            mixed(512, 128, 128, 256, 24, 64, 64),
            mixed(512, 112, 144, 288, 32, 64, 64),
            mixed(528, 256, 160, 320, 32, 128, 128),
            # Windows that start in the map but end outside of it: "SAME" for kernel 2, stride 2.
            nn.MaxPool3d(kernel_size=2, stride=2, ceil_mode=True),
            mixed(832, 256, 160, 320, 32, 128, 128),
            mixed(832, 384, 192, 384, 48, 128, 128),
        )
        _finish(self, config)

    def forward(self, clips_NCTHW: Tensor) -> Levels:
        """See `Backbone.forward`."""
        low = self.features[:_AFTER_MIXED_3C](self._seen(clips_NCTHW))
        mid = self.features[_AFTER_MIXED_3C:_AFTER_MIXED_4F](low)
        return Levels(low, mid, self.features[_AFTER_MIXED_4F:](mid))

    def input_conv(self) -> nn.Conv3d:
        """See `Backbone.input_conv`."""
        return _first_conv(self.features)


_AFTER_MIXED_3C = 7
_AFTER_MIXED_4F = 13


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build the encoder that the configuration names."""
    return R3D18(config) if config.name == "r3d18" else S3D(config)


def _stage(in_width: int, width: int, *, stride: int) -> nn.Sequential:
    """Two basic blocks; a 1x1x1 convolution where the shortcut changes shape (type B)."""
    shortcut = None
    if stride != 1 or in_width != width:
        shortcut = nn.Sequential(
            nn.Conv3d(in_width, width, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm3d(width),
        )
    return nn.Sequential(
        BasicBlock(in_width, width, Conv3DSimple, stride, shortcut),
        BasicBlock(width, width, Conv3DSimple),
    )


def _keep_time(stage: nn.Sequential) -> None:
    """Make a stage keep its time steps: temporal stride 1 and dilation 2 instead of stride 2."""
    block: Any = stage[0]
    first, shortcut = block.conv1[0], block.downsample[0]
    first.stride, first.padding, first.dilation = (1, 2, 2), (2, 1, 1), (2, 1, 1)
    shortcut.stride = (1, 2, 2)


def _first_conv(module: nn.Module) -> nn.Conv3d:
    return next(m for m in module.modules() if isinstance(m, nn.Conv3d))


def _finish(backbone: Backbone, config: BackboneConfig) -> None:
    """Set input and momentum, and widen the first convolution by zero planes to `in_channels`.

    The zero plane stays zero in training: its input is zero, so its gradient is zero, and weight
    decay does not change zero. Padding after initialisation keeps the draws of the other planes.
    """
    backbone.differences = config.input == "difference"
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = config.bn_momentum
    conv = backbone.input_conv()
    extra = config.in_channels - conv.in_channels
    if extra:
        with torch.no_grad():
            planes = conv.weight.new_zeros(conv.out_channels, extra, *conv.kernel_size)
            conv.weight = nn.Parameter(torch.cat([conv.weight, planes], dim=1))
        conv.in_channels = config.in_channels
