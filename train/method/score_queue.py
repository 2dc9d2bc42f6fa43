"""The queue of prototype scores, which gives Sinkhorn more samples than one batch has.

Shape suffixes: Q rows of the queue, B videos of the global batch, S filled rows, V = 2 views, K
prototypes.
"""

import torch
from torch import Tensor, nn

from strata.errors import ConfigError

__all__ = ["ScoreQueue"]


class ScoreQueue(nn.Module):
    """Queue of the scores of the last Q videos, the newest last (method.md 4.3).

    Scores are stored as computed, with the prototypes of that step. Deviation from the release: its
    queue starts with random content, different on each rank, which is used until it is pushed out;
    here only pushed rows are used. The global batch is pushed, so the queue is the same on all
    ranks; its buffers are saved with the model.

    Args:
        num_rows: Q, the length of the queue.
        num_prototypes: K.

    Raises:
        ConfigError: The queue has no rows.
    """

    scores: Tensor
    filled: Tensor

    def __init__(self, num_rows: int = 1024, num_prototypes: int = 1000) -> None:
        super().__init__()
        if num_rows < 1:
            raise ConfigError(f"score queue: {num_rows} rows; use at least the global batch")
        # Infinity in empty rows: a wrong read shows, and unlike NaN it equals itself.
        self.register_buffer("scores", torch.full((num_rows, 2, num_prototypes), torch.inf))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        # The same count on the host, so that reading it does not wait for the device.
        self._num_filled = 0
        self.register_load_state_dict_post_hook(_count_rows)

    def __len__(self) -> int:
        """S, the number of rows pushed and not yet dropped."""
        return self._num_filled

    @torch.no_grad()
    def push(self, scores_BVK: Tensor) -> None:
        """Append the global batch's scores at the end and drop the oldest rows.

        Args:
            scores_BVK: `[B, V, K]`, the same on all ranks; gradient is dropped.

        Raises:
            ConfigError: The batch has more videos than the queue has rows.
        """
        num_rows, batch = self.scores.shape[0], scores_BVK.shape[0]
        if batch > num_rows:
            raise ConfigError(
                f"score queue: a global batch of {batch} does not fit {num_rows} rows; "
                "lengthen the queue or shrink the batch"
            )
        # cat makes a new tensor first: source and target overlap. 8 MB at the published size.
        self.scores.copy_(torch.cat([self.scores[batch:], scores_BVK.to(self.scores.dtype)]))
        self._num_filled = min(self._num_filled + batch, num_rows)
        self.filled.fill_(self._num_filled)

    @property
    def is_full(self) -> bool:
        """Whether the queue is full, so that each push drops rows."""
        return self._num_filled == self.scores.shape[0]

    def recount(self) -> None:
        """Copy the count from the buffer to the host, after a step was undone."""
        self._num_filled = int(self.filled)

    def rows(self) -> Tensor:
        """The filled rows, `[S, V, K]`, the newest last; a view of the buffer."""
        return self.scores[self.scores.shape[0] - self._num_filled :]


def _count_rows(queue: nn.Module, _: object) -> None:
    """After loading a state, copy its count to the host."""
    assert isinstance(queue, ScoreQueue)
    queue.recount()
