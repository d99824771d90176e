"""medsam2: fine-tune SAM 2 on medical images and videos, and trust the result."""

__version__ = "0.1.0"
