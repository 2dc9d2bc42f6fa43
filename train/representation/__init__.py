"""A network's features over a set, and what they are worth without training."""
