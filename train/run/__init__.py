"""State of a run: checkpoints, resume, graceful shutdown, watchdog and non-finite steps."""
