"""Damage that scans and videos suffer in practice, at five severities: what a robustness run evaluates on."""
