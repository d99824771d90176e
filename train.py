"""Fine-tune SAM 2: python train.py experiment=NAME data.shards=SHARDS output=RUN [group=option ...] [key=value ...]."""

import os
from typing import Any

# Threads that wait for each other sleep instead of spinning: on a machine that does something else as well, spinning
# makes a small model ten times slower. OpenMP reads it when torch is imported, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from medsam2.config import hydra_entry  # noqa: E402


def main(config: dict[str, Any]) -> None:
    if config["mode"] == "check":
        from medsam2.training.preflight import check

        check(config)
        return
    from medsam2.training.launch.signals import install_handlers

    install_handlers()  # loading torch takes seconds, in which a signal may come
    from medsam2.training.fit import fit

    fit(config)


if __name__ == "__main__":
    hydra_entry("train", main)
