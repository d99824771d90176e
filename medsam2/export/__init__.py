"""Checkpoints that other tools open: one file a format (`official.py`), each proving itself (`verify.py`)."""
