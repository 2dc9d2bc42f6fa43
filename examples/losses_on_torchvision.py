"""Strata's losses on a model of torchvision: python examples/losses_on_torchvision.py SHARDS."""

import sys

import torch
from torch.nn import functional
from torchvision.models.video import r3d_18

import strata
from strata.dataload.clips import ClipSpec


def main(shards: str) -> None:
    """One step of instance discrimination and of prototypes."""
    model = r3d_18()
    model.fc = torch.nn.Linear(512, 64)
    prototypes = torch.nn.Linear(64, 16, bias=False)
    parameters = [*model.parameters(), *prototypes.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    batches = strata.pretraining_batches(
        shards, batch_size=4, size=32, clips=ClipSpec(clip_frames=4)
    )
    batch = next(iter(batches))
    embeddings = model(batch.short.flatten(0, 1)).unflatten(0, (-1, 2))  # [b, 2, 64]
    scores = functional.linear(
        functional.normalize(embeddings, dim=2), functional.normalize(prototypes.weight, dim=1)
    )
    assignments = strata.losses.sinkhorn(scores)
    instance = strata.losses.instance_loss(embeddings)
    prototype = strata.losses.prototype_loss(scores, assignments)
    optimizer.zero_grad()
    (instance + 0.5 * prototype).backward()
    optimizer.step()
    print(f"instance {instance.item():.3f} prototype {prototype.item():.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
