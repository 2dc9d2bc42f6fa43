"""Benchmarks of each part; they run from a checkout and are not in the wheel."""
