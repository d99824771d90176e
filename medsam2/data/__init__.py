"""Shards to `ClipBatch` to augmented batches: `plan` says which clip when, `read` reads it, `augment` warps it."""
