"""Cost of many ranks, computed: `python tools/bench.py ranks`.

Nothing is timed. The bytes follow from shapes. The memory of a term is counted by running its
forward and backward pass on tensors that have shapes and no values, so it is that of this code.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strata.tools.benchmarks.measure import parse_options, require_positive, table
from strata.train.losses.graph import distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss

__all__ = ["main", "peak_bytes"]

_FP32 = 4
_VIEWS = 2
_WITH_GRADIENT = 5
"""Tensors that `paper` gathers with gradient in stage 2: L_ins, L_gr and L_aug at low and mid."""


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """Bytes and memory of many ranks, computed for stage 2 of the paper recipe."""

    ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of GPUs."""
    batch: int = 256
    """Videos of a GPU."""
    size: int = 128
    """Numbers in an embedding."""
    prototypes: int = 1000
    """K."""
    parameters: int = 34_100_000
    """Parameters whose gradients are averaged."""
    step_ms: float = 582.0
    """Time of a step without communication; the default is an H200's at 440 samples/s."""
    gigabytes_per_s: float = 50.0
    """Rate at which a GPU receives."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A field is out of its range.
        """
        require_positive(self, "batch", "size", "prototypes", "parameters")


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that operators create, while they exist."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._now += size
        self.most = max(self.most, self._now)

        def freed(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, freed)


def peak_bytes(term: Callable[..., Tensor], *shapes: tuple[int, ...]) -> int:
    """Peak memory of a term's forward and backward pass, without that of its inputs.

    Args:
        term: Computes a scalar from float32 tensors of the shapes.
        shapes: Of its inputs, which all get a gradient.
    """
    with FakeTensorMode():
        inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
        with _Allocated() as allocated:
            term(*inputs).backward()
    return allocated.most


def _memory(options: RanksOptions, ranks: int) -> dict[str, int]:
    """Peak of each term on one rank; a batch's own anchors against the global batch."""
    own, every = options.batch, options.batch * ranks
    anchors = slice(0, own)
    clips = (every, _VIEWS, options.size)
    queued = (max(1024, every), _VIEWS, options.prototypes)

    def prototype(scores: Tensor) -> Tensor:
        return prototype_loss(scores[anchors], sinkhorn(scores.detach())[anchors])

    def graph(embedded: Tensor, assignments: Tensor, rows: slice | None) -> Tensor:
        target = distribution_graphs(embedded, hard_labels(assignments), anchors=rows).target_RB
        return graph_loss(embedded, target[anchors], anchors=anchors)

    def augmentation(embedded: Tensor, altered: Tensor) -> Tensor:
        return augmentation_loss(embedded, altered, anchors=anchors)

    assignments = (every, _VIEWS, options.prototypes)
    return {
        "L_ins": peak_bytes(lambda z: instance_loss(z, anchors=anchors), clips),
        "scores and queue": 2 * _FP32 * math.prod(queued),
        "L_pro, Sinkhorn": peak_bytes(prototype, queued),
        "E, L_gr": peak_bytes(lambda z, q: graph(z, q.detach(), anchors), clips, assignments),
        "E, L_gr before": peak_bytes(lambda z, q: graph(z, q.detach(), None), clips, assignments),
        "L_aug": peak_bytes(augmentation, clips, (own, 2, _VIEWS, options.size)),
    }


def _bytes(options: RanksOptions, ranks: int) -> dict[str, float]:
    """Bytes that a rank receives in a step, by ring algorithms."""
    others = (ranks - 1) * options.batch * _VIEWS * _FP32
    vectors = _WITH_GRADIENT * options.size
    averaged = 2 * (ranks - 1) / ranks * options.parameters
    return {
        # The vectors that the scores are computed from are gathered without gradient.
        "gathered": others * (vectors + options.size),
        "gathered before": others * (vectors + options.prototypes),
        "returned": others * vectors,
        "returned before": 2 * others * vectors,
        "averaged, fp32": 4 * averaged,
        "averaged, bf16": 2 * averaged,
    }


def main(argv: Sequence[str]) -> None:
    """Print the table.

    Raises:
        ConfigError: An option is wrong.
    """
    options = parse_options(RanksOptions, argv, "ranks")
    rows = []
    for ranks in options.ranks:
        moved, memory = _bytes(options, ranks), _memory(options, ranks)

        def share(*names: str, moved: dict[str, float] = moved) -> str:
            seconds = sum(moved[name] for name in names) / (options.gigabytes_per_s * 1e9)
            return f"{seconds / (options.step_ms / 1e3):.1%}"

        def pair(name: str, values: dict[str, Any], unit: float) -> str:
            return f"{values[name] / unit:,.2f} ({values[f'{name} before'] / unit:,.2f})"

        rows.append(
            [
                ranks,
                pair("gathered", moved, 1e9),
                pair("returned", moved, 1e9),
                f"{share('gathered', 'returned')} ({share('gathered before', 'returned before')})",
                f"{share('averaged, bf16')}, {share('averaged, fp32')}",
                f"{memory['L_ins'] / 1e9:.2f}",
                f"{memory['L_aug'] / 1e9:.2f}",
                f"{memory['scores and queue'] / 1e9:.2f}",
                f"{memory['L_pro, Sinkhorn'] / 1e9:.2f}",
                pair("E, L_gr", memory, 1e9),
            ]
        )
    head = ["GPUs", "gathered, GB", "gradients returned, GB", "share of a step"]
    head += ["averaging, bf16, fp32", "L_ins, GB", "L_aug, GB", "scores and queue, GB"]
    print(table([*head, "L_pro with Sinkhorn, GB", "E and L_gr, GB"], rows))
