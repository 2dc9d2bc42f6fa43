"""The batch of a step that was not finite, written to a file."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from strata.dataload.loader import TrainLoader
from strata.files import open_atomic
from strata.logs import get_logger
from strata.train.run.non_finite import Report

__all__ = ["write_bad_batch"]

logger = get_logger(__name__)


def write_bad_batch(loader: TrainLoader, report: Report, run: Path, rank: int) -> None:
    """Write the first batch of a loader, to `bad-batches` in the run's folder.

    A batch is a function of its position, so it is made again and need not be kept. A disk that
    cannot be written costs the file and not the run.

    Args:
        loader: Starts at the step of the report.
        report: On the step.
        run: The run's folder.
        rank: This rank.
    """
    with loader:
        batch = next(iter(loader))
    path = run / "bad-batches" / f"step-{report.step:09d}-rank-{rank}.safetensors"
    tensors = {"short": batch.short, "samples": torch.from_numpy(batch.samples)}
    if batch.long is not None:
        tensors["long"] = batch.long
    try:
        path.parent.mkdir(exist_ok=True)
        with open_atomic(path, sync=False) as out:
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, out.name)
    except (OSError, SafetensorError) as error:
        logger.warning("the batch of rank %d cannot be written: %s", rank, error)
        return
    logger.warning("the batch of rank %d is in %s", rank, path)
