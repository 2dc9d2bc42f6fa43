"""Strata: self-supervised video representation learning, from video files to an evaluated model."""

__all__ = ["__version__"]

__version__ = "0.1.0"
