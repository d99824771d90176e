"""Damage that scans and videos suffer in practice, at five severities: what a robustness run evaluates on."""

# They register theirs, in the order of tables and pictures.
from medsam2.evaluation.corruptions import natural, surgical, scanners  # noqa: F401, I001
