"""Pretraining: from batches to a checkpoint."""
