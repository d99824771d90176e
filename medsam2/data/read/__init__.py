"""Index and shards to batches, from a disk or from a bucket by byte range."""
