import copy

import pytest
import torch

from strata.errors import ConfigError
from strata.train.losses.prototypical import sinkhorn
from strata.train.method.score_queue import ScoreQueue
from tests.support import reference_losses


def batch(step: int, num_videos: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(num_videos, 2, 3, generator=generator)


def test_rows_are_the_last_pushed_the_current_batch_at_the_end():
    queue = ScoreQueue(num_rows=10, num_prototypes=3)
    pushed: list[torch.Tensor] = []
    for step in range(6):
        pushed.append(batch(step))
        queue.push(pushed[-1])
        assert queue.rows().tolist() == reference_losses.running_queue(pushed, 10)
        assert len(queue) == min(10, 4 * (step + 1)) == int(queue.filled)
        assert torch.equal(queue.rows()[-4:], pushed[-1])


def test_rows_never_pushed_take_no_part():
    queue = ScoreQueue(num_rows=100, num_prototypes=3)
    assert queue.rows().shape == (0, 2, 3)
    queue.push(batch(0))
    assert torch.equal(sinkhorn(queue.rows()), sinkhorn(batch(0)))
    assert sinkhorn(queue.rows()).isfinite().all()
    # And if they did, it would show.
    assert not queue.scores.isfinite().all()


def test_sinkhorn_uses_the_batch_and_then_the_full_queue():
    queue = ScoreQueue(num_rows=1024, num_prototypes=3)
    for step in range(5):
        queue.push(batch(step, 256))
        assert len(queue) == min(1024, 256 * (step + 1))


def test_a_restored_queue_continues_as_the_original():
    queue = ScoreQueue(num_rows=10, num_prototypes=3)
    queue.push(batch(0))
    state = copy.deepcopy(queue.state_dict())
    assert set(state) == {"scores", "filled"}
    outer = torch.nn.ModuleDict({"queue": ScoreQueue(num_rows=10, num_prototypes=3)})
    outer.load_state_dict({f"queue.{k}": v for k, v in state.items()})
    restored = outer["queue"]
    assert isinstance(restored, ScoreQueue)
    assert len(restored) == 4
    for step in (1, 2):
        queue.push(batch(step))
        restored.push(batch(step))
        assert torch.equal(queue.rows(), restored.rows())
    assert len(copy.deepcopy(queue)) == 10


def test_gradient_and_later_changes_of_the_batch_stay_outside():
    queue = ScoreQueue(num_rows=10, num_prototypes=3)
    scores = batch(0).requires_grad_()
    queue.push(scores)
    with torch.no_grad():
        scores.zero_()
    assert torch.equal(queue.rows(), batch(0))
    assert not queue.rows().requires_grad


def test_half_precision_is_widened():
    queue = ScoreQueue(num_rows=4, num_prototypes=3)
    queue.push(batch(0).bfloat16())
    assert queue.rows().dtype == torch.float32


def test_a_batch_longer_than_the_queue_is_refused():
    with pytest.raises(ConfigError, match="a global batch of 4 does not fit 3 rows; lengthen"):
        ScoreQueue(num_rows=3, num_prototypes=3).push(batch(0))
    with pytest.raises(ConfigError, match="0 rows"):
        ScoreQueue(num_rows=0)
