"""Prepare shards from cases: plan the splits, stage each case, write the tars and publish the index."""
