"""The method: its network, loss terms, schedules and the queue of prototype scores."""
