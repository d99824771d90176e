"""The `medsam2` command: `main.py` is the root, every sub-command has a file of its own."""
