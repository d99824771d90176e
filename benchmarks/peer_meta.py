"""Meta's `training.dataset` on a folder of JPEG + PNG: CPU seconds per clip and memory, as one line of JSON.

    python benchmarks/peer_meta.py FOLDER OBJECTS CLIPS

`benchmarks/input.py` runs it in a separate process, because it adds `build/peers` (`make peers`) to the path. The
transforms are those of `sam2.1_hiera_b+_MOSE_finetune.yaml` at 512 pixels. The time excludes Meta's collate function.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

SIDE = 512
PEERS = Path(__file__).resolve().parents[1] / "build" / "peers"


def pipeline(folder: Path, objects: int) -> Any:
    """Build Meta's dataset: 8 frames, at most `objects` objects, and Meta's augmentation."""
    from training.dataset import transforms as t
    from training.dataset.vos_dataset import VOSDataset
    from training.dataset.vos_raw_dataset import PNGRawDataset
    from training.dataset.vos_sampler import RandomUniformSampler

    steps = [
        t.RandomHorizontalFlip(consistent_transform=True),
        t.RandomAffine(degrees=25, shear=20, image_interpolation="bilinear", consistent_transform=True),
        t.RandomResizeAPI(sizes=SIDE, square=True, consistent_transform=True),
        t.ColorJitter(consistent_transform=True, brightness=0.1, contrast=0.03, saturation=0.03, hue=None),
        t.RandomGrayscale(p=0.05, consistent_transform=True),
        t.ColorJitter(consistent_transform=False, brightness=0.1, contrast=0.05, saturation=0.05, hue=None),
        t.ToTensorAPI(),
        t.NormalizeAPI(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    return VOSDataset(
        transforms=[t.ComposeAPI(steps)],
        training=True,
        video_dataset=PNGRawDataset(str(folder / "JPEGImages"), str(folder / "Annotations")),
        sampler=RandomUniformSampler(num_frames=8, max_num_objects=objects),
        multiplier=1,
    )


def main() -> None:
    folder, objects, clips = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source = next(iter(sorted(PEERS.glob("sam2-*/training"))), None)
    if source is None:
        sys.exit(f"{PEERS}: holds no sam2-*/training, the package to compare with; run `make peers` first.")
    sys.path[:0] = [str(source.parent), str(PEERS / "site")]
    import torch

    torch.set_num_threads(1)
    dataset = pipeline(folder, objects)
    idle = _peak_kb()
    seconds = []
    for clip in range(clips):
        start = time.process_time()
        datapoint = dataset[clip % len(dataset)]
        seconds.append(time.process_time() - start)
        assert len(datapoint.frames) == 8 and datapoint.frames[0].data.shape == (3, SIDE, SIDE)
        assert len(datapoint.frames[0].objects) == objects
    print(json.dumps({"ms": [1e3 * s for s in seconds], "memory_mb": (_peak_kb() - idle) / 1024}))


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
