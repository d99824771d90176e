"""Shards to `ClipBatch` to augmented batches: which clip when (`plan`), reading (`reader`), the device (`augment`)."""
