"""`Case` to shards: plan the split, stage each case, publish tars and index in one step."""
