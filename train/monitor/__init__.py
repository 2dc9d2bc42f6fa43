"""Measurements of a run: time, bottleneck, cost and health of the representation."""
