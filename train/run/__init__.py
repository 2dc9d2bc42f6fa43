"""The state of a run: saved, resumed, stopped, and what it does about bad steps."""
