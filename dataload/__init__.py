"""Data loading: from shards to batches on the device."""
