"""Survey raw data and shards, check them, and show both as tables and a page."""
