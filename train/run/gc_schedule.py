"""Python's garbage collected at chosen steps, the same on all ranks.

Left to itself the collector runs when some rank's counters say so; that rank is late, and in a
collective all others wait for it. What exists after the first step (modules, graphs, DeepSpeed) is
set aside, so that a collection looks only at what later steps leave behind.
"""

import gc

__all__ = ["StepGarbage"]


class StepGarbage:
    """Takes collecting over from Python with the first step that is done.

    Args:
        every_steps: Steps between collections; 0 leaves collecting to Python.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._in_charge = False

    def step_done(self, step: int) -> None:
        """Collect if it is time.

        Args:
            step: Steps since the run's start, the same on all ranks.
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
        """Give it back to Python."""
        if self._in_charge:
            gc.unfreeze()
            gc.enable()
            self._in_charge = False
