"""Altered orders of time steps: reversal and random shuffle of feature maps.

Shape suffixes: A orders, N clips, T time steps, C channels.
"""

import math

import torch
from torch import Tensor

from strata.errors import ConfigError

__all__ = ["MAX_SHUFFLED_STEPS", "draw_permutations", "time_orders"]

MAX_SHUFFLED_STEPS = 18
"""18! fits the 53 bits of a float64 draw; 19! does not."""


def draw_permutations(uniforms_N2: Tensor, num_steps: int) -> Tensor:
    """Draw permutations uniformly among those other than the identity and the reversal.

    These two are the first and the last in lexicographic order, so a uniform rank between them is
    converted by its factorial digits, without rejection and with a fixed number of draws per clip.

    Args:
        uniforms_N2: `[N, 2]`, float64 in [0, 1), two draws of 32 random bits for each clip, as
            `strata.counter_random.uniforms` gives them.
        num_steps: T, from 3 to `MAX_SHUFFLED_STEPS`.

    Returns:
        `[N, T]`, int64, each row a permutation of 0..T-1.

    Raises:
        ConfigError: No such permutation exists (T below 3), or T is too large to draw exactly.
    """
    if not 3 <= num_steps <= MAX_SHUFFLED_STEPS:
        raise ConfigError(
            f"cannot shuffle {num_steps} time steps: 3 to {MAX_SHUFFLED_STEPS} are needed (two "
            "steps have no order besides identity and reversal); use longer clips, or turn the "
            "shuffle off"
        )
    num_orders = math.factorial(num_steps) - 2
    draw_N = uniforms_N2[:, 0] + uniforms_N2[:, 1] * 2.0**-32
    # The sum of the two can round up to 1.
    rank_N = 1 + (draw_N * num_orders).long().clamp(max=num_orders - 1)
    columns: list[Tensor] = []
    for position in range(num_steps):
        weight = math.factorial(num_steps - 1 - position)
        columns.append(rank_N // weight)
        rank_N = rank_N % weight
    orders_NT = torch.stack(columns, dim=1)
    # A digit counts only unused steps: later equal or larger digits increase by one.
    for position in reversed(range(num_steps - 1)):
        later = orders_NT[:, position + 1 :]
        later += later >= orders_NT[:, position, None]
    return orders_NT


def time_orders(num_clips: int, num_steps: int, permutations_NT: Tensor | None = None) -> Tensor:
    """The orders of time steps of a level: the original, then the altered ones.

    Args:
        num_clips: N.
        num_steps: T.
        permutations_NT: `[N, T]`, the shuffled orders; None for no shuffle.

    Returns:
        `[A, N, T]`, int64, on the CPU: the identity, the reversal and, if given, the permutations.
    """
    identity = torch.arange(num_steps).expand(num_clips, -1)
    shuffled = [] if permutations_NT is None else [permutations_NT]
    return torch.stack([identity, identity.flip(1), *shuffled])
