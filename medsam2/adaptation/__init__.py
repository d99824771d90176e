"""What of a network is trained: frozen parts, LoRA and other adapters, anchors to the start, interpolation."""
