"""Checkpoints of others, brought into our format."""
