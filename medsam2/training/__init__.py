"""Training: the Lightning module, its optimiser and callbacks, and `fit`, which `train.py` calls."""
