"""Scores of masks: overlap, surface distances, presence."""
