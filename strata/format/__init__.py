"""The shard format, read and written: records of a sample, index, manifest, payloads."""
