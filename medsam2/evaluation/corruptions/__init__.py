"""Image corruptions of scans and videos at five severities, for robustness runs."""

# Importing the modules registers their corruptions; this order is that of the tables and pictures.
from medsam2.evaluation.corruptions import natural, surgical, scanners  # noqa: F401, I001
