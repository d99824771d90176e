"""Protocols: which frames are prompted, with what, and which are scored."""
