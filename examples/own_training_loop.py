"""Your own loop with Strata's loader: python examples/own_training_loop.py SHARDS STATE."""

import sys
from pathlib import Path

import torch

import strata
from strata.dataload.clips import ClipSpec


def main(shards: str, state: str, steps: int = 4) -> None:
    """Train for some steps; the same call continues where the last one stopped."""
    batches = strata.pretraining_batches(
        shards, batch_size=4, epochs=8, size=32, clips=ClipSpec(clip_frames=8)
    )
    torch.manual_seed(0)
    encoder = strata.models.r3d18(width=8)
    head = torch.nn.Linear(64, 32)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    if Path(state).exists():
        kept = torch.load(state, weights_only=True)
        batches.load_state_dict(kept["batches"])
        encoder.load_state_dict(kept["encoder"])
    for step, batch in enumerate(batches, start=1):
        clips = batch.short.flatten(0, 1)  # two clips of each video: [2 b, 3, T, S, S]
        embeddings = head(encoder(clips).high.mean(dim=(2, 3, 4)))
        loss = strata.losses.instance_loss(embeddings.unflatten(0, (-1, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"videos {batch.samples.tolist()} loss {loss.item():.3f}")
        if step == steps:
            break
    torch.save({"batches": batches.state_dict(), "encoder": encoder.state_dict()}, state)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
