"""The method: its network and loss terms, schedules, and the queue of scores."""
