"""Cases through checkpoints: sources, ranks, corrections, resumption."""
