"""Fine-tune SAM 2: python train.py experiment=NAME data.shards=SHARDS output=RUN [group=option ...] [key=value ...]."""

import os
from typing import Any

# Waiting threads sleep instead of spinning: on a shared machine, spinning makes a small model ten times slower. OpenMP
# reads the variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from medsam2.config import hydra_entry  # noqa: E402


def main(config: dict[str, Any]) -> None:
    if config["mode"] == "check":
        from medsam2.training.preflight import check

        check(config)
        return
    from medsam2.training.launch.signals import install_handlers

    install_handlers()  # before the import of torch, which takes seconds in which a signal may arrive
    from medsam2.training.fit import fit

    fit(config)


if __name__ == "__main__":
    hydra_entry("train", main)
