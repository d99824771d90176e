"""Evaluation: protocols as data, metrics in native geometry, tables with intervals.

`protocol` turns ground truth into prompts, `run` takes cases through checkpoints, `metrics` scores them, `statistics`
and `report` say what came out.
"""
