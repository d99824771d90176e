"""Generated cases and the quick start, for tests, tutorials and pretraining."""
