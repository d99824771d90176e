"""Programs of users, started as files in a process that has none of medsam2."""
