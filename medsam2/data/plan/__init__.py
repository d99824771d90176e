"""Which clip comes at which step, as a function of seed and position."""
