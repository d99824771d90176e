"""The same network in less time and memory: encoder, attention, recomputation, compilation, oneDNN on a CPU."""
