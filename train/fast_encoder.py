"""How the encoder is computed on a device: memory order, folded stem, compilation.

None of it changes parameters or, beyond rounding, results.
"""

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable

import torch
from torch import Tensor

from strata.logs import get_logger, warn_once
from strata.train.engine_config import EngineConfig
from strata.train.method.model import VideoModel
from strata.train.models.backbones import R3D18, Levels
from strata.train.models.stem import Fold, folded_channels

__all__ = ["arrange_encoder", "choose_fold", "compiles"]

logger = get_logger(__name__)

_CPU_WIDTH = 32
"""Width from which a CPU folds frames."""
_SHARE = 0.25
"""Share of a GPU's memory that the folded input of a step may take."""


def arrange_encoder(
    model: VideoModel, config: EngineConfig, device: torch.device, *, num_frames: int, size: int
) -> None:
    """Bring the encoder into the form that is fastest on a device. After the engine's start.

    Args:
        model: The model, on the device.
        config: The settings; `auto` is decided here.
        device: The device to compute on.
        num_frames: Frames that this rank encodes in a step.
        size: Rows and columns of a frame.
    """
    if config.zero == 0 and config.channels_last:
        # DeepSpeed's start broadcasts contiguous weights; ZeRO has a copy of its own.
        model.backbone.channels_last()
    fold = choose_fold(model, config, device, num_frames=num_frames, size=size)
    model.backbone.fold_stem(fold)
    is_compiled = compiles(model, config, device)
    if is_compiled:
        model.compiled = _Compiled(model.encoder)
    logger.info("encoder: stem folded: %s; compiled: %s", fold, "yes" if is_compiled else "no")


def choose_fold(
    model: VideoModel, config: EngineConfig, device: torch.device, *, num_frames: int, size: int
) -> Fold:
    """How the stem is computed, see `arrange_encoder`.

    On GPUs frames are folded unless the folded input, which the backward pass keeps, would take too
    much memory; then only pixels are. On CPUs folding is slower, except in bf16 with a matrix unit
    (AMX) and from a width of 32 on (docs/log.md).
    """
    if config.fold_stem != "auto":
        return config.fold_stem
    if not isinstance(model.backbone, R3D18):
        return "off"
    conv = model.backbone.input_conv()
    half = config.autocast_on(device) is not None
    if device.type == "cpu":
        is_wide = conv.out_channels >= _CPU_WIDTH
        return "frames" if half and is_wide and torch.cpu._is_amx_tile_supported() else "off"
    elements = num_frames * (size // 2 + 3) ** 2 * folded_channels("frames", conv.kernel_size[0])
    memory = torch.cuda.get_device_properties(device).total_memory
    return "frames" if elements * (2 if half else 4) <= _SHARE * memory else "pixels"


def compiles(model: VideoModel, config: EngineConfig, device: torch.device) -> bool:
    """Whether the encoder is compiled, see `arrange_encoder`.

    `auto` compiles R3D-18 on GPUs (S3D is slower compiled), if the machine has what the compiler
    needs.
    """
    if config.compile != "auto":
        return config.compile == "on"
    if device.type != "cuda" or not isinstance(model.backbone, R3D18):
        return False
    compiler = os.environ.get("CC") or "cc"
    missing = [
        what
        for what, is_there in (
            ("the package triton", importlib.util.find_spec("triton") is not None),
            (f"the C compiler {compiler}", shutil.which(compiler) is not None),
        )
        if not is_there
    ]
    if missing:
        warn_once(
            logger,
            f"the encoder is not compiled, which is about a fifth slower: {' and '.join(missing)} "
            "not found; install it, or set engine.compile off",
        )
    return not missing


class _Compiled:
    """An encoder that torch.compile compiles at the first step of each shape of clips.

    Compiled code is kept on disk (torch's own cache, `TORCHINDUCTOR_CACHE_DIR`) for later runs.
    """

    def __init__(self, encoder: Callable[[Tensor, Tensor, Tensor, int], Levels]) -> None:
        # A dynamic shape would give slower code for all shapes; there are two or three.
        self._encoder = torch.compile(encoder, dynamic=False)
        self._started: dict[tuple[object, ...], float] = {}
        """For each shape: when its first step began; infinity once that is logged."""

    def __call__(self, clips: Tensor, mean: Tensor, scale: Tensor, second_of: int) -> Levels:
        shape = (tuple(clips.shape), second_of, torch.is_grad_enabled())
        shown, now = "x".join(map(str, clips.shape)), time.perf_counter()
        started = self._started.get(shape)
        if started is None:
            logger.info("compiling the encoder for clips of %s: minutes, less if cached", shown)
            self._started[shape] = now
        elif started < now:
            # The backward pass is compiled when it first runs.
            logger.info("the step that compiled it for %s took %.0f s", shown, now - started)
            self._started[shape] = math.inf
        return self._encoder(clips, mean, scale, second_of)
