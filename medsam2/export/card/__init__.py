"""The README.md of an export: a model card."""
