"""Backbones, motion excitation, heads and prototypes."""
