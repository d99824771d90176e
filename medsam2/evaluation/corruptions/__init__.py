"""Damage that scans and videos suffer in practice, at five severities: what a robustness run evaluates on."""

from medsam2.evaluation.corruptions.registry import (
    SEVERITIES,
    SUITES,
    Corruption,
    CorruptionSettings,
    Scene,
    corrupt,
    names,
    registry,
)

__all__ = ["SEVERITIES", "SUITES", "Corruption", "CorruptionSettings", "Scene", "corrupt", "names", "registry"]
