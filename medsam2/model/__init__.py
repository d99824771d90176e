"""The network: `build.py` (sizes, checkpoints), `tracker.py` (frame after frame), `memory.py` (bank and policies).

Nothing here knows Lightning, Hydra's composition, cases or shards; only `build.py` reads files.
"""
