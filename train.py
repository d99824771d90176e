"""Fine-tune SAM 2: python train.py experiment=NAME data.shards=SHARDS output=RUN [group=option ...] [key=value ...]."""

from typing import Any

from medsam2.config import hydra_entry


def main(config: dict[str, Any]) -> None:
    from medsam2.training.fit import fit

    fit(config)


if __name__ == "__main__":
    hydra_entry("train", main)
