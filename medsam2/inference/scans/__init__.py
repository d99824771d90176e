"""What `medsam2 predict` adds: prompts from a command line or a file, scans and videos, masks as files."""
