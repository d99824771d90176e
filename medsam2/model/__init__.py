"""The network: `build` (sizes, checkpoints), `tracker` (frame after frame), `memory_bank`, `policies`, `losses`.

Nothing here knows Lightning, Hydra's composition, cases or shards; only `build` and `checkpoint` read files.
"""
