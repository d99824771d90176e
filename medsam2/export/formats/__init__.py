"""One exporter a file; `targets.py` finds them by their `TARGET`."""
