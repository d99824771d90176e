"""One exporter a file; `targets.py` lists them."""
