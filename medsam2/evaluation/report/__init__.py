"""Tables, overlays and the page of an evaluation."""
