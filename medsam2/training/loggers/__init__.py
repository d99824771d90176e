"""Where a run's numbers and pictures go: one file a logger."""
