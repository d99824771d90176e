"""What a dataset holds and what looks odd in it, as tables and a page."""
