"""From embeddings to loss terms and their weighted sum, over the global batch.

The equations are in train/losses, one file each, and docs/method.md states the deviations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strata.distributed import (
    World,
    gather,
    gather_keeping_own_grad,
    gather_with_grad,
    mean_over_ranks,
)
from strata.train.losses.distillation import distillation_loss
from strata.train.losses.graph import distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss
from strata.train.losses.precision import widen
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss
from strata.train.method.model import Embeddings, VideoModel
from strata.train.method.schedules import Phase
from strata.train.method.settings import MethodConfig
from strata.train.models.backbones import LEVELS
from strata.train.monitor.health import (
    alteration_health,
    chance_levels,
    embedding_health,
    graph_health,
    prototype_health,
)

__all__ = ["LossTerms", "Method"]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The named terms of a step, on the device."""

    total: Tensor
    """Weighted sum; the mean over ranks is the loss of the global batch."""
    terms: dict[str, Tensor]
    """Each term before its weight, detached."""
    health: dict[str, Tensor]
    """Health of the representation, if requested."""


class Method:
    """Computes the loss terms over the global batch from embeddings.

    Args:
        model: The model, which has the queue.
        config: Settings of the method.
        world: This rank and the world size.
    """

    def __init__(self, model: VideoModel, config: MethodConfig, world: World) -> None:
        self._model, self._config, self._world = model, config, world
        self._gather = gather_with_grad if config.gather_with_grad else gather_keeping_own_grad

    def losses(
        self,
        out: Embeddings,
        phase: Phase,
        *,
        with_health: bool,
        teacher: Tensor | None = None,
    ) -> LossTerms:
        """Compute all terms of a step, outside autocast.

        The queue takes the global batch's scores before the assignment, as in the release.

        Args:
            out: This rank's embeddings.
            phase: Phase of the epoch.
            with_health: Whether to measure the health of the representation too.
            teacher: `[b, V, C]`, the teacher's features of this rank's short clips, for L_dis.

        Returns:
            The terms; every rank must call this at every step.
        """
        config = self._config
        num_local = out.instance.shape[0]
        own = slice(self._world.rank * num_local, (self._world.rank + 1) * num_local)
        local = {"instance": out.instance, "scored": out.scored}
        local |= {f"graph_{level}": each for level, each in out.graph.items()}
        local |= {f"augmentation_{level}": each for level, each in out.clips.items()}
        gathered = self._gather(*map(widen, local.values()))
        of_all = dict(zip(local, gathered, strict=True))
        instance = of_all["instance"]

        self._model.queue.push(self._scores(out, of_all["scored"]))
        num_rows = len(self._model.queue) if phase.queue else num_local * self._world.size
        rows = self._model.queue.rows()[-num_rows:]
        assignments = sinkhorn(rows, epsilon=config.sinkhorn_epsilon)
        batch_assignments = assignments[-num_local * self._world.size :]

        terms = {
            "instance": instance_loss(instance, temperature=config.temperature, anchors=own),
            "prototype": prototype_loss(
                out.scores, batch_assignments[own], temperature=config.prototype_temperature
            ),
        }
        if out.taught is not None:
            assert teacher is not None
            # Not with the others: it has the width of the encoder and no gradient.
            terms["distillation"] = distillation_loss(
                out.taught, gather(teacher), temperature=config.temperature, anchors=own
            )
        health: dict[str, Tensor] = {}
        if out.graph or with_health:
            graphs = distribution_graphs(
                instance.detach(),
                hard_labels(batch_assignments),
                temperature=config.temperature,
                threshold=config.graph_threshold,
                anchors=own,
            )
            for level in out.graph:
                terms[f"graph_{level}"] = graph_loss(
                    of_all[f"graph_{level}"],
                    graphs.target_RB,
                    temperature=config.temperature,
                    anchors=own,
                    divide_by_batch=config.graph_divides_by_batch,
                )
            if with_health:
                health |= graph_health(graphs, own) | prototype_health(rows, assignments)
                health |= embedding_health(instance.detach().flatten(0, 1))
        for level, clips in out.clips.items():
            terms[f"augmentation_{level}"] = augmentation_loss(
                of_all[f"augmentation_{level}"],
                out.altered[level],
                temperature=config.temperature,
                anchors=own,
            )
            if with_health:
                cosines = alteration_health(clips.detach(), out.altered[level].detach())
                health |= {f"{name}_{level}": value for name, value in cosines.items()}
        for level, long_steps in out.long_steps.items():
            terms[f"retrieval_{level}"] = retrieval_loss(
                out.steps[level], long_steps, temperature=config.temperature
            )
        weights = {name: w for name, w in vars(config.weights).items() if w > 0}
        terms = {name: value for name, value in terms.items() if name in weights}
        weighted = [weights[name] * value for name, value in terms.items()]
        return LossTerms(
            total=torch.stack(weighted).sum(),
            terms={name: value.detach() for name, value in terms.items()},
            health=health,
        )

    @torch.no_grad()
    def _scores(self, out: Embeddings, scored: Tensor) -> Tensor:
        """Scores of the global batch, `[B, V, K]`, the same on all ranks.

        The vectors are gathered and not the scores, which are K / D times as large.
        """
        if self._world.size == 1:
            return widen(out.scores.detach())
        return self._model.prototypes(scored)

    def chance(self, num_videos: int, clip_frames: int, long_frames: int) -> dict[str, float]:
        """Value of each term at chance, in nats, by name."""
        by_kind = chance_levels(
            num_videos=num_videos,
            num_prototypes=self._config.num_prototypes,
            num_alterations=2 if self._config.shuffle else 1,
            num_long_steps={
                v: -(-long_frames // getattr(self._model.time_strides, v)) for v in LEVELS
            },
            divide_by_batch=self._config.graph_divides_by_batch,
        )
        chance = {name: by_kind[name] for name in ("instance", "prototype", "distillation")}
        for level in LEVELS:
            chance[f"graph_{level}"] = by_kind["graph"]
            chance[f"augmentation_{level}"] = by_kind["augmentation"]
            chance[f"retrieval_{level}"] = by_kind[f"retrieval_{level}"]
        return {k: v for k, v in chance.items() if getattr(self._config.weights, k, 0.0) > 0}

    @staticmethod
    def averaged(values: dict[str, Tensor]) -> dict[str, float]:
        """Mean over ranks of named scalars, on the host, by one transfer. All ranks call it."""
        if not values:
            return {}
        mean = mean_over_ranks(torch.stack([v.float() for v in values.values()])).tolist()
        return dict(zip(values, mean, strict=True))
