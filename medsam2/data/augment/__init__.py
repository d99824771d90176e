"""Augmentation of whole batches on the device, one resampling per clip."""
