"""Settings and computations of the protocols."""
