"""Shards to batches on the device."""
