"""Features of a network over a data set, and their evaluation without training."""
