"""Settings of the method: weights of the loss terms, temperatures, prototypes, queue."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from strata.errors import ConfigError
from strata.ranges import check_range
from strata.train.models.backbones import LEVELS, Level, LevelStrides

__all__ = ["MethodConfig", "TermWeights"]


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """Weight of each loss term; 0 disables the term and its head. Default: `paper`."""

    instance: float = 1.0
    """L_ins at the high level."""
    prototype: float = 0.5
    """L_pro at the high level."""
    graph_low: float = 0.3
    """Graph constraint at the low level."""
    graph_mid: float = 0.5
    """Graph constraint at the mid level."""
    graph_high: float = 0.0
    """Graph constraint at the high level; the release has 1."""
    augmentation_low: float = 0.3
    """L_aug at the low level."""
    augmentation_mid: float = 0.5
    """L_aug at the mid level."""
    augmentation_high: float = 0.0
    """L_aug at the high level, with a separate motion excitation. A clip of 16 frames has two steps
    there, which can be reversed but not shuffled (method.shuffle)."""
    retrieval_low: float = 0.3
    """L_ret at the low level."""
    retrieval_mid: float = 0.5
    """L_ret at the mid level."""
    retrieval_high: float = 1.0
    """L_ret at the high level."""
    distillation: float = 0.0
    """L_dis at the high level, from method.teacher; 0 in both recipes."""

    def __post_init__(self) -> None:
        check_range(self, *vars(self), prefix="method.weights.", at_least=0)
        if not (self.instance or self.prototype or self.distillation):
            raise ConfigError(
                "method.weights: the first stage needs instance, prototype or distillation above 0"
            )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of the method; the defaults are the `paper` recipe (method.md Part I)."""

    weights: TermWeights = field(default_factory=TermWeights)
    """Weight of each term."""
    teacher: Path | None = None
    """A run, checkpoint or export whose frozen encoder teaches this one (weights.distillation): for
    instance one with model.input difference, for an encoder that sees RGB."""
    temperature: float = 0.07
    """tau of the contrastive terms. TEXT: 0.07."""
    prototype_temperature: float = 0.1
    """Temperature of the prototype prediction. Release: 0.1."""
    sinkhorn_epsilon: float = 0.05
    """Regularisation of the assignment. Release: 0.05."""
    num_prototypes: int = 1000
    """K. TEXT: 1000."""
    queue_length: int = 1024
    """Length of the queue of scores for Sinkhorn, in videos. TEXT: 1024."""
    graph_threshold: float = 0.05
    """eta of G_ins. TEXT: 0.05."""
    shuffle: bool = True
    """Whether L_aug also has randomly shuffled clips as negatives (TEXT), or reversed ones only."""
    temporal_from_stage: Literal[1, 2] = 2
    """First stage with L_aug and L_ret. TEXT: 2; release: 1."""
    gather_with_grad: bool = True
    """Whether gradient flows to the embeddings of other ranks; in the release it does not."""
    graph_divides_by_batch: bool = False
    """Whether the graph constraint is divided by B once more, as in the release."""
    embedding_size: int = 128
    """D of all heads. Release: 128."""

    def __post_init__(self) -> None:
        check = partial(check_range, self, prefix="method.")
        check("temperature", "prototype_temperature", "sinkhorn_epsilon", above=0)
        check("num_prototypes", "queue_length", "embedding_size", at_least=1)
        check("graph_threshold", at_least=0, at_most=1)
        if (self.teacher is not None) != (self.weights.distillation > 0):
            raise ConfigError(
                f"method.teacher is {self.teacher} and method.weights.distillation is "
                f"{self.weights.distillation:g}; give both, or neither"
            )

    def uses(self, term: str, level: Level) -> bool:
        """Whether a term has a weight at a level."""
        return getattr(self.weights, f"{term}_{level}", 0.0) > 0

    def active(self, stage: int) -> frozenset[str]:
        """Names of the terms of a stage, as in `TermWeights`; others are not computed."""
        first_stage = {
            "instance": 1,
            "prototype": 1,
            "distillation": 1,
            "graph": 2,
            "augmentation": self.temporal_from_stage,
            "retrieval": self.temporal_from_stage,
        }
        return frozenset(
            name
            for name, weight in vars(self.weights).items()
            if weight > 0 and stage >= first_stage[name.partition("_")[0]]
        )

    def check_clips(self, clip_frames: int, long_frames: int, strides: LevelStrides) -> None:
        """Check that the short clips' time steps line up with the long sequence's.

        Args:
            clip_frames: Frames of a short clip.
            long_frames: Frames of the long sequence.
            strides: Temporal strides of the encoder's levels.

        Raises:
            ConfigError: The steps cannot be matched for L_ret.
        """
        for level in LEVELS:
            stride = getattr(strides, level)
            short, long = (-(-frames // stride) for frames in (clip_frames, long_frames))
            pool, rest = divmod(2 * short, long)
            if self.uses("retrieval", level) and (rest or pool == 0 or short % pool):
                raise ConfigError(
                    f"data.clips.clip_frames {clip_frames} gives two short clips of {short} steps "
                    f"at the {level} level and a long one of {long}, which do not line up; use a "
                    "multiple of 8 (of 16 with data.clips.long_stride 2), or "
                    f"method.weights.retrieval_{level} 0"
                )

    def wants_long(self, stage: int) -> bool:
        """Whether a stage needs the long sequence."""
        return any(name.startswith("retrieval_") for name in self.active(stage))
