"""Evaluation: one streaming predictor, protocols as data, metrics in native geometry, honest tables.

`predictor.py` segments volumes and clips (also used by validation and `predict`); `protocols.py` turns
ground truth into prompts; `metrics.py` scores; `evaluate.py` runs cases through checkpoints; `summary.py`,
`report.py` and `overlays.py` say what came out.
"""
