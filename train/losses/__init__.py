"""The loss terms of the method, one file each; all of them are plain functions."""

from strata.train.losses.graph import DistributionGraphs, distribution_graphs, graph_loss
from strata.train.losses.instance import instance_loss, pair_contrast
from strata.train.losses.prototypical import hard_labels, prototype_loss, sinkhorn
from strata.train.losses.temporal import augmentation_loss, retrieval_loss

__all__ = [
    "DistributionGraphs",
    "augmentation_loss",
    "distribution_graphs",
    "graph_loss",
    "hard_labels",
    "instance_loss",
    "pair_contrast",
    "prototype_loss",
    "retrieval_loss",
    "sinkhorn",
]
