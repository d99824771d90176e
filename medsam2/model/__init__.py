"""The network: `build.py` (sizes, checkpoints), `tracker.py` (one frame after another), `memory.py` (bank and policies).

Nothing here knows Lightning, Hydra's composition, cases or shards; only `build.py` reads files.
"""
