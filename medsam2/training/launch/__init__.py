"""How a run starts and ends: ranks, signals, limits of the machine, shutdown."""
