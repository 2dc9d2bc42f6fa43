"""Python's garbage collection at fixed steps, at the same time on all ranks.

By default the collector runs when a rank's counters reach a threshold; that rank is then late, and
all others wait for it in the next collective. Objects that exist after the first step (modules,
graphs, DeepSpeed) are frozen, so that a collection looks only at what later steps allocate.
"""

import gc

__all__ = ["StepGarbage"]


class StepGarbage:
    """Disables automatic garbage collection after the first step and runs it at fixed steps.

    Args:
        every_steps: Steps between collections; 0 keeps Python's automatic collection.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._in_charge = False

    def step_done(self, step: int) -> None:
        """Collect garbage if this is one of the chosen steps.

        Args:
            step: Steps done since the run's start, the same on all ranks.
        """
        if not self._every_steps:
            return
        if not self._in_charge:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._in_charge = True
        elif step % self._every_steps == 0:
            gc.collect()

    def close(self) -> None:
        """Restore Python's automatic collection."""
        if self._in_charge:
            gc.unfreeze()
            gc.enable()
            self._in_charge = False
