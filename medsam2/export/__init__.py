"""Checkpoints that other tools open: one exporter a format (`formats/`), each of which proves itself (`verify/`)."""
